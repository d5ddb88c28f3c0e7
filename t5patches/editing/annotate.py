"""Marks what a model must not say: rules over text, then tokens, then sets of tokens.

A rule is any callable `rule(inputs, output)` that returns the character spans of `output` to
push down. The ones here match word lists, regular expressions, and names that the source does
not hold; a classifier of your own is as good.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from t5patches.editing.batches import example_batches, largest, largest_shapes
from t5patches.editing.data import Batch, Example, make_example, pad_rows, token_mask
from t5patches.editing.plan import require_room
from t5patches.editing.words import MARKS, UNSPACED, WORD, spaced
from t5patches.model.batches import Group, by_length
from t5patches.model.generate import generate, working_memory
from t5patches.model.memory import beside as memory_beside
from t5patches.model.protocol import LanguageModel, Params, require_positions
from t5patches.model.tokenizer import Inputs, Span, TokenizedText, Tokenizer, input_text
from t5patches.runs.claims import make_part

Rule = Callable[[str, str], Iterable[Span]]
Keep = Callable[[str, Callable[[], Any]], Any]

_BARE_NAME = re.compile(r"(?:(?:the|an?)\s+)?(\S.*?)(?:['’]s?)?", re.IGNORECASE | re.DOTALL)
_BEGINS_A_SENTENCE = re.compile(r"[.!?:…\n]|,\s*[\"'“„«‘]")
_BEGINS_A_QUOTATION, _NEXT_LETTER = re.compile(r"[\s(][\"'“„«‘]"), re.compile(r"\s+(\w)")
# Words whose full stop ends no sentence: initials, also of U.S. and p.m., and titles.
_ABBREVIATED = re.compile(
    r"[^\W\d_]|Mr|Mrs|Ms|Dr|Prof|St|Mt|Ft|Gov|Sen|Rep|Pres|Gen|Col|Maj|Capt|Lt|Sgt|Rev|Fr|Hon|Messrs"
)
_PRONOUN = re.compile(r"I(?:['’]\w+)?")
# Of a text read backwards. Where there are no spaces, a run of letters is no word. A letter that is
# cut off within its bytes is read as U+FFFD.
_LAST_WORD = re.compile(rf"\ufffd*(?:(?![{UNSPACED}])[\w{MARKS}])*")


def word_list(words: Iterable[str], *, ignore_case: bool = True) -> Rule:
    """A rule that marks words and phrases, whole words only.

    Thai, Lao, Burmese, Khmer, Japanese and Chinese put no spaces between words: there it marks
    them wherever they stand.

    Args:
        words: what to mark. A space in a phrase matches any white space, an apostrophe the
            straight one (') and the curly one (’), and an accent matches whether it is a part of
            its letter or a character of its own.
        ignore_case: whether "Paris" on the list marks "PARIS".

    Returns:
        The rule.

    Raises:
        ValueError: the list is empty or holds an empty word.
        TypeError: `words` is one string.

    Example:
        >>> list(word_list(["new york"])("", "in New York, not in New Yorkshire"))
        [(3, 11)]
    """
    if isinstance(words, str):
        raise TypeError(
            f"words must be a list of words, got the string {words!r}: put it in a list"
        )
    parts = [word.split() for word in words]
    if not parts or not all(parts):
        raise ValueError("a word list needs words, and none of them empty")
    # "é" is one character, or "e" and an accent: a text may have either, whichever the list has.
    parts += [[unicodedata.normalize(f, w) for w in p] for p in parts for f in ("NFC", "NFD")]
    expressions = dict.fromkeys(r"\s+".join(map(re.escape, part)) for part in parts)
    # The longest first: "new york city" wins over "new york".
    phrases = "|".join(sorted(expressions, key=len, reverse=True))
    either = re.sub("['’]", "['’]", phrases)
    return pattern(whole_words(either), flags=re.IGNORECASE if ignore_case else 0)


def whole_words(expression: str) -> str:
    """A regular expression whose matches do not begin or end inside a word.

    A sign, and `_` is one, may stand right beside a word: "—" and "!" are found there. Scripts that
    put no spaces between words do not show where one begins: there a match is only kept from
    parting a character from its marks.

    Args:
        expression: what to match.

    Returns:
        The expression for `pattern`.
    """
    unspaced = rf"(?:(?<=[{UNSPACED}])|(?=[{UNSPACED}]))(?![{MARKS}])"
    behind, ahead = rf"(?<![^\W_])(?<![{MARKS}])", rf"(?![^\W_])(?![{MARKS}])"
    begin = rf"(?:{behind}|{ahead}|{unspaced})"
    end = rf"(?:{ahead}|{behind}|{unspaced})"
    return f"{begin}(?:{expression}){end}"


def pattern(expression: str, *, flags: int = 0, group: int | str = 0) -> Rule:
    r"""A rule that marks the matches of a regular expression.

    Args:
        expression: Python's `re` syntax.
        flags: as in `re.compile`.
        group: the group of the match to mark; 0 for all of it.

    Returns:
        The rule. Empty matches are left out.

    Raises:
        ValueError: the expression does not compile or has no such group.

    Example:
        >>> list(pattern(r"aged (\d+)", group=1)("", "a man aged 52"))
        [(11, 13)]
    """
    try:
        compiled = re.compile(expression, flags)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{expression!r:.80} is not a regular expression: {error}") from error
    if group not in (*range(compiled.groups + 1), *compiled.groupindex):
        raise ValueError(f"{expression!r} has no group {group!r}: it has {compiled.groups} groups")

    def rule(inputs: str, output: str) -> list[Span]:
        spans = (match.span(group) for match in compiled.finditer(output))
        return [span for span in spans if span[0] < span[1]]

    return rule


def capitalized_names(inputs: str, output: str) -> list[Span]:
    """A rule that marks runs of capitalised words.

    The first word of a sentence, a line or what somebody said is left out, as its capital says
    nothing; so are the English "I", but not behind a name, and a possessive 's behind the run. What
    stands in quotation marks without a comma before them may be a title: its first word is left out
    where the second one is small. The full stop of initials and titles (U.S., J., Mr.) ends no
    sentence, and no run: "the U.S. Navy" is one name, and so is, wrongly, "U.S. The" where a
    sentence ends in between. For more than this, use a named-entity recogniser as the rule.

    Args:
        inputs: not used.
        output: the text to search.

    Returns:
        The characters of each run.

    Example:
        >>> text = "The mayor of New York met Mr. Lee's son, I hear."
        >>> [text[a:b] for a, b in capitalized_names("", text)]
        ['New York', 'Mr. Lee']
    """
    names: list[Span] = []
    word, last = "", 0  # the word before, and where it ends
    for match in WORD.finditer(output):
        between = output[last : match.start()]
        if _ABBREVIATED.fullmatch(word):
            between = between.removeprefix(".")
        begins = not word or _BEGINS_A_SENTENCE.search(between) is not None
        letter = _BEGINS_A_QUOTATION.search(between) and _NEXT_LETTER.match(output, match.end())
        begins |= letter is not None and letter[1].islower()
        joined = names and names[-1][1] == last and not between.strip()
        word, last = match.group(), match.end()
        if begins or not word[0].isupper() or (not joined and _PRONOUN.fullmatch(word)):
            continue
        names[-1:] = [(names[-1][0], last)] if joined else [*names[-1:], match.span()]
    return [bare_name(output, name) for name in names]


def bare_name(text: str, name: Span) -> Span:
    """A name without an English article before it and a possessive 's behind it.

    Args:
        text: that holds the name.
        name: where.

    Returns:
        Where it is without them: of "the Tory Party's", "Tory Party".

    Example:
        >>> bare_name("in the Alps' shade", (3, 12))
        (7, 11)
    """
    bare = _BARE_NAME.fullmatch(text, *name)
    return bare.span(1) if bare else name


def absent_from_source(names: Rule = capitalized_names, *, ignore_case: bool = True) -> Rule:
    """A rule that marks named things which the source does not name.

    Args:
        names: a rule that finds the names in the output: a word list, a pattern, a named-entity
            recogniser.
        ignore_case: whether "paris" in the source covers "Paris" in the output.

    Returns:
        The rule. A name counts as present where the source holds it as whole words, whatever signs
        stand between them; signs without a word, such as an emoji, where it holds just them.

    Example:
        >>> rule = absent_from_source(word_list(["Paris", "Rome"]))
        >>> list(rule("A fire in Rome.", "From Paris to Rome"))
        [(5, 10)]
    """

    def rule(inputs: str, output: str) -> list[Span]:
        source = _words(inputs, ignore_case)

        def present(name: str) -> bool:
            words = _words(name, ignore_case)
            return words in source if words.strip() else name.strip() in inputs

        return [span for span in names(inputs, output) if not present(output[slice(*span)])]

    return rule


def mark_nothing(inputs: str, output: str) -> list[Span]:
    """The rule where nothing is known to be unwanted."""
    del inputs, output
    return []


def find_spans(rule: Rule, inputs: Inputs, output: str) -> list[Span]:
    """Applies a rule and checks what it returns.

    Args:
        rule: the rule.
        inputs: the source text, or a conversation, of which the rule is given all that was said.
        output: what the model said.

    Returns:
        The spans, sorted, each once.

    Raises:
        ValueError: the rule returned something else than spans inside `output`.
    """
    found = rule(input_text(inputs), output)
    if not isinstance(found, Iterable):
        raise ValueError(
            f"the rule {rule!r} returned {found!r}: a list of spans (start, end) is needed"
        )
    spans = set()
    for span in found:
        try:
            start, end = map(_character, span)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the rule {rule!r} returned {span!r}: whole numbers (start, end) of "
                "characters are needed"
            ) from error
        if not 0 <= start < end <= len(output):
            raise ValueError(
                f"the rule {rule!r} returned the span [{start}, {end}] for an output of "
                f"{len(output)} characters: 0 <= start < end <= length is needed"
            )
        spans.add((start, end))
    return sorted(spans)


def whole_part(text: str, ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """An output without its last word where the length cut that off.

    Args:
        text: what the model said.
        ids: the tokens of it, an end token included where it was said.
        tokenizer: the model's.

    Returns:
        The text; where no end token was said, without the letters that it ends with.
    """
    if {*tokenizer.end_ids} & {*ids}:
        return text
    return _LAST_WORD.sub("", text[::-1], count=1)[::-1]


def _character(number: Any) -> int:
    """A whole number, numpy's too: no fraction, text or bool that could be made one."""
    if isinstance(number, bool | np.bool_):
        raise TypeError("a bool is no number of a character")
    return operator.index(number)


def annotate(
    inputs: Sequence[Inputs],
    outputs: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    rule: Rule,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
) -> list[Example]:
    """Marks the tokens of a model's outputs that a rule forbids.

    An output without an end token was cut off, most often inside a word: what that would have been
    nobody knows, and the rule is not shown it.

    Args:
        inputs: the source texts, or conversations.
        outputs: for each of them, the token ids that the model generated, end token included
            where it was said.
        tokenizer: the model's.
        rule: says which characters to push down.
        prompts: what the model was given for each of the inputs; default, what it is given now.

    Returns:
        One example for each output, with nothing marked where the rule finds nothing.

    Raises:
        ValueError: the numbers of inputs and outputs differ, or the rule returns bad spans, of
            which the output is told and the rule, where it is one of several.
    """
    if len(inputs) != len(outputs):
        raise ValueError(f"got {len(inputs)} inputs and {len(outputs)} outputs: one each is needed")
    examples = []
    given = [None] * len(inputs) if prompts is None else prompts
    for number, (source, ids, prompt) in enumerate(zip(inputs, outputs, given, strict=True), 1):
        said = tokenizer.decode(ids)
        try:
            spans = find_spans(rule, source, whole_part(said.text, ids, tokenizer))
            _require_tokens(rule, source, said, spans)
            examples.append(make_example(source, said, spans, tokenizer, prompt=prompt))
        except ValueError as error:
            raise ValueError(f"output {number}, {said.text!r:.300}: {error}") from error
    return examples


def _require_tokens(rule: Rule, inputs: Inputs, said: TokenizedText, spans: Sequence[Span]) -> None:
    """Refuses white space that is of no token; `make_example` could not name the rule."""
    several = getattr(rule, "rules", {})  # by name, as `t5patches.editing.rules.Rules` has them
    for start, end in spans:
        if said.text[start:end].strip() or any(token_mask(said, [(start, end)])):
            continue
        for name, one in several.items():
            if (start, end) in find_spans(one, inputs, said.text):
                raise ValueError(
                    f"rule {name!r} marks [{start}, {end}] ({said.text[start:end]!r}), which "
                    "covers no token: let it mark what stands beside it too"
                )


def until_end(rows: np.ndarray, end_ids: Sequence[int]) -> list[tuple[int, ...]]:
    """Cuts generated rows after their end token.

    Args:
        rows: integer [N, L], from `t5patches.model.generate.generate`.
        end_ids: the end tokens.

    Returns:
        N tuples of ids; a row that never ended is whole and has no end token.
    """
    outputs = []
    for row in np.asarray(rows):
        ends = np.flatnonzero(np.isin(row, end_ids))
        outputs.append(tuple(row[: ends[0] + 1 if len(ends) else len(row)].tolist()))
    return outputs


def require_room_to_speak(
    model: LanguageModel,
    inputs: Sequence[Inputs],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    temperature: float = 0.0,
    samples: int = 1,
    greedy_first: bool = False,
    batch_size: int = 256,
    beside: int = 0,
) -> None:
    """Refuses what `speak` would run out of positions or memory with, before it begins.

    Args:
        model: the network.
        inputs: as for `speak`, and so are the other arguments.
        tokenizer: the model's.
        max_length: tokens that an output may have.
        temperature: 0 for greedy decoding.
        samples: outputs to each input.
        greedy_first: whether there is a greedy output besides.
        batch_size: outputs made at a time.
        beside: bytes that are yet to be read, parameters for one.

    Raises:
        ValueError: naming what to change.
    """
    streams = samples + greedy_first
    ids, groups = _by_length(inputs, tokenizer, batch_size, streams)
    require_positions(model.config, np.array([len(row) for row in ids]), max_length)
    group = largest(groups)
    working = working_memory(
        model,
        rows=len(group.filled),
        input_length=group.length,
        max_length=max_length,
        streams=streams,
        sample=temperature > 0,
        greedy_first=greedy_first,
    )
    count = len(group.filled) * streams
    what = f"{count} outputs at a time, to inputs of {group.length} tokens"
    require_room(what, working, beside, count, least=streams)


def require_room_to_expand(
    model: LanguageModel,
    inputs: Sequence[Inputs],
    tokenizer: Tokenizer,
    *,
    count: int,
    max_length: int,
    batch_size: int = 512,
    beside: int = 0,
) -> None:
    """Refuses what `expand_negatives` would run out of memory with, before anything is said.

    What will be marked is not known then: any of the outputs may be, and have any length.

    Args:
        model: the network.
        inputs: of the examples.
        tokenizer: the model's.
        count: as for `expand_negatives`, and so are the other arguments.
        max_length: tokens that an output may have.
        batch_size: rollouts made at a time.
        beside: bytes that are yet to be read, parameters for one.

    Raises:
        ValueError: naming what to change.
    """
    less = ("--truncate-inputs", "--skip-longer", "--max-length", "a smaller --expand")
    lengths = [len(tokenizer.encode_prompt(text)) for text in inputs]
    params = model.param_shapes()
    batch = largest_shapes(lengths, min(batch_size, _WITH_LOGITS), max_length)
    program = _likeliest_others.lower(params, batch, model, tokenizer.vocab_size, count).compile()
    rows, length = batch["inputs"].shape
    what = f"{rows} outputs with their logits at a time, to inputs of {length} tokens,"
    require_room(what, memory_beside(params, program), beside, rows, less=less)
    # A long input may have all of the marked tokens.
    rows, length = max(1, batch_size // count), max(lengths)
    working = working_memory(
        model,
        rows=rows,
        input_length=length,
        max_length=max_length,
        streams=count,
        forced=max_length,
    )
    what = f"{rows * count} rollouts at a time, to inputs of {length} tokens,"
    require_room(what, working, beside, rows * count, least=count, less=less)


def _by_length(
    inputs: Sequence[Inputs], tokenizer: Tokenizer, batch_size: int, streams: int
) -> tuple[list[tuple[int, ...]], list[Group]]:
    """The prompts, and which of them are answered at a time."""
    ids = [tokenizer.encode_prompt(text) for text in inputs]
    return ids, by_length([len(row) for row in ids], max(1, batch_size // streams))


def speak(
    model: LanguageModel,
    params: Params,
    inputs: Sequence[Inputs],
    rule: Rule,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    temperature: float = 0.0,
    samples: int = 1,
    greedy_first: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    keep: Keep = make_part,
    progress: Progress | None = None,
) -> list[Example]:
    """What a model says, marked by a rule.

    Args:
        model: the network.
        params: its parameters.
        inputs: the source texts, or conversations.
        rule: says what is unwanted.
        tokenizer: the model's.
        max_length: tokens that an output may have.
        temperature: 0 for greedy decoding.
        samples: outputs to each input.
        greedy_first: whether to make the greedy output too, from the same reading of the input.
        seed: of the sampling.
        batch_size: outputs made at a time.
        keep: `t5patches.runs.claims.Parts.get`, which makes no output again that a killed run
            has made.
        progress: shows how far it is; None shows nothing.

    Returns:
        `samples` examples for each input, one after the other; with `greedy_first` the greedy one
        and then these, which are the same without it.
    """
    streams = samples + greedy_first
    ids, groups = _by_length(inputs, tokenizer, batch_size, streams)
    tokens = pad_rows(ids, model.config.pad_id)
    params = jax.tree.map(jnp.asarray, params)

    def say(rows: np.ndarray) -> list[list[list[int]]]:
        said = generate(
            model,
            params,
            tokens[rows],
            max_length=max_length,
            prefixes=np.zeros((len(rows), streams, 0), np.int32),
            temperature=temperature,
            greedy_first=greedy_first,
            rng=jax.random.key(seed),
            batch_size=batch_size,
            numbers=rows,
        )
        return [[list(ids) for ids in until_end(row, model.config.end_ids)] for row in said]

    name = "sampled outputs" if temperature and not greedy_first else "outputs"
    task = progress.add_task(name, total=len(inputs) * streams, note="") if progress else None
    outputs: list[list[list[int]]] = [[] for _ in inputs]
    for number, group in enumerate(groups):
        made = keep(f"outputs-by-length-{number}", functools.partial(say, group.rows))
        for row, said in zip(group.rows, made, strict=True):
            outputs[row] = said
        if progress and task is not None:
            progress.update(task, advance=len(group.rows) * streams)
    numbers = [number for number, said in enumerate(outputs) for _ in said]
    return annotate(
        [inputs[number] for number in numbers],
        [said for several in outputs for said in several],
        tokenizer,
        rule,
        prompts=[ids[number] for number in numbers],
    )


def expand_negatives(
    examples: Sequence[Example],
    rule: Rule,
    tokenizer: Tokenizer,
    model: LanguageModel,
    params: Params,
    *,
    count: int,
    max_length: int,
    everywhere: bool = False,
    rollout_length: int | None = None,
    batch_size: int = 512,
    keep: Keep = make_part,
    progress: Progress | None = None,
) -> list[Example]:
    """Finds what else the model would say at each marked position and the rule forbids too.

    Pushing down the one name that was said makes room for the next invention. So the `count`
    likeliest other tokens are tried at every marked position: the text before it and the
    candidate are forced, the model finishes greedily, and a candidate that lies inside a
    forbidden span of the result joins the position's negatives. `count` rollouts are made for
    each marked token.

    Where the model might have said something unwanted and did not, an edit on its outputs as they
    are holds it to a distribution with all of that. `everywhere` tries the alternatives there too.

    Args:
        examples: outputs with marked tokens.
        rule: the rule that marked them.
        tokenizer: the model's.
        model: the original model.
        params: its parameters.
        count: K, how many alternatives to try at a position.
        max_length: tokens that an output may have.
        everywhere: try them at each position where the model gave less than 99% to what was said,
            marked or not.
        rollout_length: tokens that a rollout goes on for behind the alternative, where the rule
            has seen enough by then; None for to the end of the output.
        batch_size: rollouts made at a time.
        keep: `t5patches.runs.claims.Parts.get`, which makes no rollout again that a killed run
            has made.
        progress: shows how many rollouts there are to make, and how far it is; None shows nothing.

    Returns:
        The examples, with `negatives` at these positions, likeliest first.

    Raises:
        ValueError: `count` is not between 1 and what the vocabulary leaves to try.
    """
    check_count(count, tokenizer)
    params = jax.tree.map(jnp.asarray, params)
    at_a_time = min(batch_size, _WITH_LOGITS)
    places = list(_alternatives(examples, model, params, count, tokenizer, at_a_time, everywhere))
    # Enough at a time for `generate` to put alike prefixes together.
    size = 8 * max(1, batch_size // count)

    def try_out(start: int) -> list[_Place]:
        part = places[start : start + size]
        rollouts = _roll_out(examples, part, model, params, max_length, rollout_length, batch_size)
        found = []
        for (number, position, candidates), rows in zip(part, rollouts, strict=True):
            last = None if rollout_length is None else position + 1 + rollout_length
            outputs = until_end(rows[:, :last], model.config.end_ids)
            source = examples[number].inputs
            forbidden = (
                token
                for token, output in zip(candidates, outputs, strict=True)
                if _forbids(rule, source, output, position, tokenizer)
            )
            found.append((number, position, tuple(forbidden)))
        return found

    task = None
    if progress:
        which = "marked or uncertain" if everywhere else "marked"
        progress.console.print(
            f"{len(places)} {which} tokens, {count} alternatives to each: "
            f"{len(places) * count} rollouts to make",
            highlight=False,
        )
        task = progress.add_task("rollouts", total=len(places) * count, note="")
    negatives: list[dict[int, tuple[int, ...]]] = [{} for _ in examples]
    for start in range(0, len(places), size):
        for number, position, ids in keep(
            f"rollouts-by-length-{start}", functools.partial(try_out, start)
        ):
            negatives[number][position] = tuple(ids)
        if progress and task is not None:
            progress.update(task, completed=min(start + size, len(places)) * count)
    return [
        dataclasses.replace(example, negatives={p: ids for p, ids in found.items() if ids})
        for example, found in zip(examples, negatives, strict=True)
    ]


def check_count(count: int, tokenizer: Tokenizer) -> None:
    """Refuses a number of alternatives that `expand_negatives` cannot try.

    Args:
        count: K.
        tokenizer: the model's.

    Raises:
        ValueError: `count` is not between 1 and what the vocabulary leaves to try.
    """
    # Neither padding nor the end tokens have characters that a rule could forbid, and the token
    # that was said is already pushed down.
    most = tokenizer.vocab_size - len(tokenizer.end_ids) - 2
    if not 1 <= count <= most:
        raise ValueError(
            f"count is {count}: from 1 to {most} alternatives can be tried "
            f"with a vocabulary of {tokenizer.vocab_size}"
        )


_WITH_LOGITS = 64
"""Outputs at a time whose logits are all held, [64, length, vocabulary]."""

_SURE = 0.99
"""What a model gives to a token beside which it has no alternative to speak of."""

_Place = tuple[int, int, tuple[int, ...]]
"""An example's number, a marked position in it, and the tokens to try there."""


def _alternatives(
    examples: Sequence[Example],
    model: LanguageModel,
    params: Params,
    count: int,
    tokenizer: Tokenizer,
    batch_size: int,
    everywhere: bool,
) -> Iterator[_Place]:
    numbers = [i for i, example in enumerate(examples) if everywhere or any(example.marked)]
    asked = [examples[i] for i in numbers]
    for rows, batch in example_batches(asked, batch_size, model.config.pad_id):
        found = _likeliest_others(params, batch, model, tokenizer.vocab_size, count)
        for row, ids, unsure in zip(rows, *map(np.asarray, found), strict=False):
            marked = np.array(asked[row].marked, bool)
            for position in np.flatnonzero(marked | (everywhere & unsure[: len(marked)])):
                yield numbers[row], int(position), tuple(ids[position].tolist())


@functools.partial(jax.jit, static_argnames=("model", "known", "count"))
def _likeliest_others(
    params: Params, batch: Batch, model: LanguageModel, known: int, count: int
) -> tuple[jax.Array, jax.Array]:
    """The likeliest ids but padding, the ends, what was said, and rows that are no token.

    And where what was said had less than `_SURE`.
    """
    logits = model.head(params).logits(model.hidden(params, batch))
    said = jnp.take_along_axis(logits, batch["outputs"][..., None], axis=-1)
    log_p = (said - jax.nn.logsumexp(logits, axis=-1, keepdims=True))[..., 0]
    ids = jnp.arange(logits.shape[-1])[None, None]
    special = jnp.array([model.config.pad_id, *model.config.end_ids])
    barred = jnp.isin(ids, special) | (ids == batch["outputs"][..., None]) | (ids >= known)
    return jax.lax.top_k(jnp.where(barred, -jnp.inf, logits), count)[1], log_p < math.log(_SURE)


def _roll_out(
    examples: Sequence[Example],
    places: Sequence[_Place],
    model: LanguageModel,
    params: Params,
    max_length: int,
    rollout_length: int | None,
    batch_size: int,
) -> np.ndarray:
    """The original model's outputs from each of the candidates on, [places, K, max_length]."""
    # As wide for every file: the program is the one that the memory was planned for.
    longest = max(max_length, *(len(example.output_ids) for example in examples))
    pad_id = model.config.pad_id
    prefixes = np.full((len(places), len(places[0][2]), longest), pad_id, np.int32)
    for row, (number, position, candidates) in zip(prefixes, places, strict=True):
        row[:, :position] = examples[number].output_ids[:position]
        row[:, position] = candidates
    # As wide for every chunk, so that generation is compiled for few lengths.
    width = max(len(example.input_ids) for example in examples)
    return generate(
        model,
        params,
        pad_rows([examples[n].input_ids for n, _, _ in places], pad_id, width),
        max_length=max_length,
        prefixes=prefixes,
        beyond_prefix=rollout_length,
        batch_size=batch_size,
    )


def _forbids(
    rule: Rule, inputs: Inputs, output: Sequence[int], position: int, tokenizer: Tokenizer
) -> bool:
    said = tokenizer.decode(output)
    spans = find_spans(rule, inputs, whole_part(said.text, output, tokenizer))
    return token_mask(said, spans)[position]


def _words(text: str, ignore_case: bool) -> str:
    """The text's words with a space around each, so that `in` compares whole words.

    A + or # belongs to the word before it: C++ and C# are not C.
    """
    found = re.findall(rf"(?:[^\W_]|[{MARKS}])+[+#]*", spaced(unicodedata.normalize("NFC", text)))
    words = " ".join(found)
    return f" {words.casefold() if ignore_case else words} "
