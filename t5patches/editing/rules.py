r"""Rules from a file: what a model must not say, with no code to write.

A list of words, one a line in a .txt file, is a rule by itself. All else is said in TOML.

Each `[[rule]]` finds characters of an output in one of five ways:

    [[rule]]
    words = ["New York", "Rome"]   # whole words; or words_file = "words.txt", one a line

    [[rule]]
    name = "ages"                  # what the counts call it
    pattern = 'aged (\d+)'         # Python's `re`, with 5 seconds for an output
    group = 1                      # the part of the match to mark; default, all of it
    whole_words = true             # the match begins and ends with a word

    [[rule]]
    names = "capitalized"          # runs of capitalised words; or "spacy", a recogniser:
    # model = "en_core_web_sm"     # its name or folder
    # labels = ["PERSON", "GPE"]   # what to mark; default, everything it knows
    absent_from_source = true      # only what the input does not hold as whole words

    [[rule]]
    call = "package.module:function"   # function(inputs, output) -> [(start, end), ...]; it is
                                       # tried on a sample first

An output that was cut off by its length is judged without its last word, which may be cut too; a
name is judged without an English article before it and a possessive 's behind it.

Thai, Lao, Burmese, Khmer, Japanese and Chinese put no spaces between words: whole words are found
there wherever they stand.

`absent_from_source` goes with every rule. `ignore_case` goes with words (default true), patterns
(default false) and `absent_from_source` (default true).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import os
import re
import signal
import sys
import threading
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5patches.editing.annotate import (
    Rule,
    absent_from_source,
    bare_name,
    capitalized_names,
    find_spans,
    pattern,
    whole_part,
    whole_words,
    word_list,
)
from t5patches.editing.data import TOLD, Example, read_lines, told
from t5patches.model.tokenizer import Span, Tokenizer
from t5patches.runs.files import require_regular

_FINDERS = ("words", "words_file", "pattern", "names", "call")
# For each key, what it must be and the finders that it goes with.
_KEYS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "words": ("a list of texts", ("words",)),
    "words_file": ("a text", ("words_file",)),
    "pattern": ("a text", ("pattern",)),
    "names": ("a text", ("names",)),
    "call": ("a text", ("call",)),
    "name": ("a text", _FINDERS),
    "absent_from_source": ("true or false", _FINDERS),
    "ignore_case": ("true or false", _FINDERS),
    "whole_words": ("true or false", ("pattern",)),
    "group": ("a number or a name", ("pattern",)),
    "model": ("a text", ("names",)),
    "labels": ("a list of texts", ("names",)),
}
_WITH_CASE = ("words", "words_file", "pattern")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Several named rules as one.

    Attributes:
        rules: by name; called like any rule, this marks what any of them marks.
        fingerprint: another one where the file is another, or a list of words or a module that
            it names.
    """

    rules: Mapping[str, Rule]
    fingerprint: str = ""

    def __call__(self, inputs: str, output: str) -> list[Span]:
        """What any of the rules marks.

        Args:
            inputs: the source text.
            output: what the model said.

        Returns:
            The spans of all rules.

        Raises:
            ValueError: a rule returned bad spans; it is named.
        """
        spans = []
        for name, rule in self.rules.items():
            try:
                spans += find_spans(rule, inputs, output)
            except ValueError as error:
                raise ValueError(f"rule {name!r}: {error}") from error
        return spans

    def counts(self, examples: Iterable[Example], tokenizer: Tokenizer) -> dict[str, int]:
        """In how many outputs each rule finds something that is marked.

        Args:
            examples: outputs that these rules marked.
            tokenizer: the model's.

        Returns:
            The numbers by name, in the order of the rules.
        """

        def whole(example: Example) -> str:
            return whole_part(example.outputs, example.output_ids, tokenizer)

        def finds(rule: Rule, example: Example) -> bool:
            return any(
                start < marked_end and marked_start < end
                for start, end in find_spans(rule, example.inputs, whole(example))
                for marked_start, marked_end in example.spans
            )

        examples = list(examples)
        return {
            name: sum(finds(rule, example) for example in examples)
            for name, rule in self.rules.items()
        }


def read_rules(path: str | os.PathLike[str]) -> Rules:
    """Reads a file of rules; the form is described at the top of `t5patches.editing.rules`.

    Args:
        path: a TOML file, or a .txt file of words, one a line. Files that it names are looked for
            beside it, and so are the modules that it calls.

    Returns:
        The rules as one.

    Raises:
        ValueError: the file is not TOML or rules in it are wrong: all of them are told, with line,
            key and reason.
    """
    path = Path(path)
    content = path.read_bytes()
    # Before lists of words were taken, rules might have any name.
    if path.suffix.lower() == ".txt" and b"[[rule]]" not in content:
        return Rules({path.name: _listed(path)}, hashlib.sha256(content).hexdigest())
    try:
        text = content.decode("utf-8-sig")
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # tomllib's own, and of a number too long
        raise ValueError(
            f"{path} is not TOML: {error}. Rules stand under lines [[rule]]; a list of words, one "
            "a line, is taken from a file whose name ends in .txt"
        ) from error
    tables: Any = found.get("rule")
    if found.keys() != {"rule"} or not _are_tables(tables):
        raise ValueError(
            f"{path} holds {sorted(found) or 'nothing'}: rules are needed, each under a line "
            "[[rule]], and nothing else"
        )
    rules: dict[str, Rule] = {}
    problems: list[str] = []
    for number, table in enumerate(tables):
        try:
            finder = _check(table)
            name = table.get("name", f"rule {number + 1}")
            if name in rules:
                raise _Wrong("name", f"{name!r} is the name of an earlier rule too")
            rules[name] = _rule(finder, table, path.parent)
        except _Wrong as wrong:
            # The others are counted, not told.
            line = _line_of(text, number, wrong.key) if len(problems) < TOLD else 0
            problems.append(f"line {line}, {wrong.key or '[[rule]]'}: {wrong}")
    if problems:
        raise ValueError(told(f"{path}:", problems, "bad rule"))
    lists = [path.parent / table["words_file"] for table in tables if "words_file" in table]
    called = [sys.modules[t["call"].partition(":")[0]] for t in tables if "call" in t]
    named = [*lists, *(m.__file__ for m in called if getattr(m, "__file__", None))]
    contents = [content, *(Path(file).read_bytes() for file in named)]
    each = "".join(hashlib.sha256(of_file).hexdigest() for of_file in contents)
    return Rules(rules, hashlib.sha256(each.encode()).hexdigest())


def load_callable(spec: str, folder: str | os.PathLike[str] = ".") -> Callable[..., Any]:
    """Finds a function by its name.

    Args:
        spec: `package.module:function`.
        folder: where to look for it where Python finds none; it joins `sys.path`.

    Returns:
        The function, or whatever else of that name can be called.

    Raises:
        ValueError: the text has another form, there is no such module or nothing of that name in
            it, or it cannot be called.

    Example:
        >>> load_callable("math:hypot")(3, 4)
        5.0
    """
    module_name, _, name = spec.partition(":")
    if not (module_name and name):
        raise ValueError(f"{spec!r} must be of the form 'package.module:function'")
    # Left there, as what the function imports when it runs may lie beside it; last, as it must not
    # hide a module of the same name from anybody else.
    folder = str(Path(folder).absolute())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        with exits_are_errors():
            found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{spec!r}: {module_name} cannot be imported ({error}); it is looked for where Python "
            f"looks and in {folder}"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{spec!r}: {module_name} cannot be imported: {_failure(error)}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{spec!r}: {module_name} has no {name}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{spec!r} is {found!r}, which cannot be called")
    return found


@contextlib.contextmanager
def exits_are_errors() -> Iterator[None]:
    """Code of a user's that ends the program fails: the program would end as if all were well.

    Raises:
        RuntimeError: it did.
    """
    try:
        yield
    except SystemExit as left:
        if isinstance(left.code, int) and left.code >= 128:  # of a signal
            raise
        raise RuntimeError(f"it calls sys.exit({left.code!r})") from left


class _Wrong(ValueError):  # noqa: N818 (never leaves this module)
    """What is wrong with a rule, and the key at which; None for the rule as a whole."""

    def __init__(self, key: str | None, reason: str):
        super().__init__(reason)
        self.key = key


def _check(table: Mapping[str, Any]) -> str:
    """Refuses keys and values that mean nothing; returns the key that finds."""
    for key, value in table.items():
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_KEYS)}"
            raise _Wrong(key, f"there is no such key; {hint}")
        if not _IS[_KEYS[key][0]](value):
            raise _Wrong(key, f"{_KEYS[key][0]} is needed, got {value!r}")
    finders = [key for key in table if key in _FINDERS]
    if len(finders) != 1:
        raise _Wrong(
            finders[-1] if finders else None,
            f"a rule has one of {', '.join(_FINDERS)}; this one has "
            f"{' and '.join(finders) or 'none of them'}",
        )
    for key in table:
        if finders[0] not in _KEYS[key][1]:
            raise _Wrong(key, f"it does not go with {finders[0]}")
    if "ignore_case" in table and not (finders[0] in _WITH_CASE or table.get("absent_from_source")):
        raise _Wrong("ignore_case", f"it needs absent_from_source = true beside {finders[0]}")
    return finders[0]


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_IS["a text"], value))


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)


_IS: Mapping[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str) and bool(value.strip()),
    "true or false": lambda value: isinstance(value, bool),
    "a number or a name": lambda x: isinstance(x, int | str) and not isinstance(x, bool),
    "a list of texts": _is_texts,
}


def _rule(finder: str, table: Mapping[str, Any], folder: Path) -> Rule:
    try:
        rule = _MAKERS[finder](table, folder)
    except _Wrong:
        raise
    except (ValueError, OSError) as error:
        raise _Wrong(finder, str(error)) from error
    if table.get("absent_from_source"):
        return absent_from_source(rule, ignore_case=table.get("ignore_case", True))
    return rule


def _words(table: Mapping[str, Any], folder: Path) -> Rule:
    ignore_case = table.get("ignore_case", True)
    if "words_file" in table:
        return _listed(folder / table["words_file"], ignore_case=ignore_case)
    return word_list(table["words"], ignore_case=ignore_case)


def _listed(file: Path, *, ignore_case: bool = True) -> Rule:
    """The words of a file, one a line."""
    require_regular(file)  # a device may be endless
    words = read_lines(file, str, "words: write one a line")
    return word_list(words, ignore_case=ignore_case)


def _pattern(table: Mapping[str, Any], folder: Path) -> Rule:
    expression, group = table["pattern"], table.get("group", 0)
    flags = re.IGNORECASE if table.get("ignore_case") else 0
    # As it is in any case, so that what is wrong with it is said of what the user wrote.
    rule = pattern(expression, flags=flags, group=group)
    if table.get("whole_words"):
        try:
            rule = pattern(whole_words(expression), flags=flags, group=group)
        except ValueError as error:
            reason = getattr(error.__cause__, "msg", error)
            raise _Wrong(
                "pattern",
                f"{expression!r} cannot be kept to whole words ({reason}): put it without "
                "whole_words, or flags around a part, as in (?i:...)",
            ) from error
    limited = _within(_SECONDS, rule, f"{expression!r}")
    probe = " a b\n1 "
    if any(not probe[start:end].strip() for start, end in limited("", probe)):
        raise _Wrong(
            "pattern",
            f"{expression!r} matches white space alone, which is no token: let it match what "
            "stands beside it too",
        )
    return limited


def _within(seconds: float, rule: Rule, name: str) -> Rule:
    """A rule that is given so long for an output: some patterns go back and forth without end."""

    def late(number: int, frame: Any) -> None:
        raise _Late

    def limited(inputs: str, output: str) -> list[Span]:
        if threading.current_thread() is not threading.main_thread():
            return list(rule(inputs, output))  # signals reach the main thread alone
        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return list(rule(inputs, output))
        except _Late:
            raise ValueError(
                f"{name} took longer than {seconds:g} s on {output!r}: a repetition within a "
                "repetition, such as (a+)+, goes through its matches without end; write it plainer"
            ) from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before or signal.SIG_DFL)

    return limited


class _Late(Exception):  # noqa: N818 (never leaves this module)
    """An output has taken too long."""


_SECONDS = 5.0


def _names(table: Mapping[str, Any], folder: Path) -> Rule:
    which = table["names"]
    if which not in ("capitalized", "spacy"):
        raise _Wrong("names", f'"capitalized" or "spacy" is needed, got {which!r}')
    if which == "spacy":
        if "model" not in table:
            raise _Wrong("names", 'a model is needed beside it, such as model = "en_core_web_sm"')
        beside = folder / table["model"]
        model = str(beside) if beside.is_dir() else table["model"]
        return spacy_names(model, table.get("labels"))
    for key in ("model", "labels"):
        if key in table:
            raise _Wrong(key, 'it goes with names = "spacy" only')
    return capitalized_names


def _call(table: Mapping[str, Any], folder: Path) -> Rule:
    function = load_callable(table["call"], folder)

    def rule(inputs: str, output: str) -> Iterable[Span]:
        try:
            with exits_are_errors():
                found = function(inputs, output)
                return list(found) if isinstance(found, Iterator) else found
        except Exception as error:
            raise ValueError(f"{table['call']} failed: {_failure(error)}") from error

    find_spans(rule, *_SAMPLE)
    return rule


_SAMPLE = ("This is an input.", "This is what a model said.")


def _failure(error: Exception) -> str:
    """An error in the code of a user, and where."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({error.filename}, line {error.lineno})"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"


_MAKERS: Mapping[str, Callable[[Mapping[str, Any], Path], Rule]] = {
    "words": _words,
    "words_file": _words,
    "pattern": _pattern,
    "names": _names,
    "call": _call,
}


def spacy_names(model: str, labels: Sequence[str] | None = None) -> Rule:
    """A rule that marks what a spaCy pipeline takes for a named thing.

    An English article before it and a possessive 's behind it, which spaCy takes for parts of a
    name, are left out.

    Args:
        model: the name of an installed pipeline, or a folder.
        labels: which kinds to mark, such as `["PERSON", "GPE"]`; default, all.

    Returns:
        The rule.

    Raises:
        ValueError: spaCy or the pipeline is not installed, or the pipeline knows no such label.
    """
    try:
        import spacy
    except ImportError as error:
        raise ValueError(
            "spaCy is not installed: pip install 't5patches[names]', or take "
            'names = "capitalized", which needs nothing'
        ) from error
    try:
        pipeline = spacy.load(model)
    except OSError as error:
        raise ValueError(
            f"spaCy has no pipeline {model!r}, and nothing is downloaded here: install it "
            f"(python -m spacy download {model}) or give its folder"
        ) from error
    known = {label for name in pipeline.pipe_names for label in pipeline.pipe_labels.get(name, ())}
    unknown = sorted(set(labels or ()) - known)
    if unknown:
        raise ValueError(f"spaCy's {model!r} has no labels {unknown}; it has {sorted(known)}")

    # Rollouts of one output say the same thing many times.
    @functools.lru_cache(maxsize=4096)
    def names(output: str) -> list[Span]:
        return [
            bare_name(output, (entity.start_char, entity.end_char))
            for entity in pipeline(output).ents
            if labels is None or entity.label_ in labels
        ]

    return lambda inputs, output: names(output)


def _line_of(text: str, number: int, key: str | None) -> int:
    """The line at which a rule, or a key of it, begins.

    The lines that look like it are few, and it is the one before which the file is whole TOML with
    as many rules as there should be: inside a text of several lines it is not.
    """
    lines = text.splitlines(keepends=True)
    if key is None:
        start, rules = re.compile(r"\s*\[\[\s*[\"']?rule[\"']?\s*\]\]"), number
    else:
        start, rules = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]"), number + 1
    header, begun = re.compile(r"\s*\[\[\s*[\"']?rule"), 0
    for i, line in enumerate(lines):
        if start.match(line) and begun >= rules:
            try:
                before = tomllib.loads("".join(lines[:i]))
            except tomllib.TOMLDecodeError:
                continue
            if len(before.get("rule", [])) == rules:
                return i + 1
        begun += bool(header.match(line))
    return 1  # rules in one line, `rule = [{...}]`
