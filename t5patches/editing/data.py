"""Files of unwanted outputs, checked line by line, and the batches that training takes.

A file holds one JSON object a line, in either of two forms:

* `inputs`, `negative_targets`, `corrected_targets`: T5Patches' three fields. The correction
  repeats the negative text except for the tokens to push down.
* `inputs`, `outputs`, `spans`: what the model was given, what it said, and the characters
  `[start, end]` of `outputs` to push down (none at all keeps the whole output as it is).

Both may have `messages` in place of `inputs`: a conversation, `[{"role": "user", "content":
"..."}]`, for models with a chat template. The second form may also hold

* `tokens`: the ids of `outputs` as the model generated them, when they are not the ones that
  the tokenizer would choose;
* `edits`: more ids to push down, by position, likeliest first: `[{"position": 3, "ids": [17, 5]}]`;
  where no span covers the position, the token that was said is none of them;
* `corrected_targets`: how the output should have read, for corrective fine-tuning;
* `chat`: whether the model was given the inputs in its chat template; a command that does otherwise
  refuses the line;
* `prompt`: the ids that it was given, where they are not what the tokenizer makes of the inputs on
  any day, as chat templates may hold the date;
* `meta`: anything; it is ignored.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from t5patches.model.tokenizer import Inputs, Message, Span, TokenizedText, Tokenizer
from t5patches.runs.files import write_file

PAIR_FIELDS = frozenset({"inputs", "negative_targets", "corrected_targets"})
SPAN_FIELDS = frozenset({"inputs", "outputs", "spans"})
OPTIONAL_FIELDS = frozenset({"tokens", "edits", "corrected_targets", "chat", "prompt"})
ROLES = ("system", "user", "assistant")
JSON_LINES = (".jsonl", ".ndjson")
"""How the names of files end that hold a JSON object a line; other files hold a text a line."""

Batch = dict[str, np.ndarray]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Example:
    """One output of the model with the parts to push down.

    Attributes:
        inputs: the source text, or a conversation.
        outputs: what the model said.
        spans: the characters of `outputs` to push down.
        input_ids: the prompt: what the model is given for `inputs`.
        output_ids: tokens of `outputs`, end token included where the model said it.
        marked: for each of `output_ids`, whether it is pushed down.
        negatives: by position, more ids to push down there, likeliest first. Where nothing is
            marked, the token that was said is none of them.
        corrected: how the output should have read; None where nobody said.
        chat: whether `input_ids` are of a chat template; None where the model has none.
    """

    inputs: Inputs
    outputs: str
    spans: tuple[Span, ...]
    input_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    marked: tuple[bool, ...]
    negatives: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    corrected: str | None = None
    chat: bool | None = None


def token_mask(tokenized: TokenizedText, spans: Iterable[Span]) -> tuple[bool, ...]:
    """Says which tokens have a character in common with any of the spans.

    The space that a sentencepiece token carries in front of its word is not one of its
    characters, unless it has no others: a span that ends with the space before "Paris" leaves
    "▁Paris" alone.

    Args:
        tokenized: a text and its tokens.
        spans: characters of that text.

    Returns:
        One bool for each token. A token without characters is never marked.
    """
    covered = np.zeros(len(tokenized.text) + 1, np.int64)
    for start, end in spans:
        covered[start:end] = 1
    before = np.concatenate([[0], np.cumsum(covered)])
    marked = []
    for start, end in tokenized.spans:
        start, end = _without_spaces(tokenized.text, start, end)
        marked.append(bool(before[end] > before[start]))
    return tuple(marked)


def make_example(
    inputs: Inputs,
    tokenized: TokenizedText,
    spans: Sequence[Span],
    tokenizer: Tokenizer,
    *,
    negatives: Mapping[int, tuple[int, ...]] | None = None,
    corrected: str | None = None,
    prompt: Sequence[int] | None = None,
) -> Example:
    """Puts an output and the characters to push down together.

    Args:
        inputs: the source text, or a conversation.
        tokenized: the output, with its end token where it has one.
        spans: characters of the output to push down.
        tokenizer: makes the prompt.
        negatives: more ids to push down, by position.
        corrected: how the output should have read.
        prompt: what the model was given; default, what it is given for `inputs` now.

    Returns:
        The example.

    Raises:
        ValueError: a span is outside the text or covers no token; negatives are at no position of
            the output, or one is what was said at a position that is not marked.
    """
    for start, end in spans:
        if not 0 <= start < end <= len(tokenized.text):
            raise ValueError(
                f"span [{start}, {end}] is not inside the output, which has "
                f"{len(tokenized.text)} characters: give 0 <= start < end <= length"
            )
        if not any(token_mask(tokenized, [(start, end)])):
            raise ValueError(
                f"span [{start}, {end}] ({tokenized.text[start:end]!r}) covers no token: "
                "give the characters of a word"
            )
    marked = token_mask(tokenized, spans)
    for position, ids in (negatives or {}).items():
        if not 0 <= position < len(marked):
            raise ValueError(
                f"edits at position {position}: the output has {len(marked)} tokens, from 0 on"
            )
        if not marked[position] and tokenized.ids[position] in ids:
            raise ValueError(
                f"edits at position {position} push down {tokenized.ids[position]}, which was said "
                "there, and no span covers it: the pushed-down positions are "
                f"{[i for i, m in enumerate(marked) if m]}"
            )
    return Example(
        inputs=inputs,
        outputs=tokenized.text,
        spans=tuple((int(start), int(end)) for start, end in spans),
        input_ids=tokenizer.encode_prompt(inputs) if prompt is None else tuple(prompt),
        output_ids=tokenized.ids,
        marked=marked,
        negatives=dict(negatives or {}),
        corrected=corrected,
        chat=tokenizer.chat,
    )


def read_examples(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    max_input_length: int | None = None,
    max_output_length: int | None = None,
) -> list[Example]:
    """Reads a file of outputs to push down and checks every line of it.

    Args:
        path: a file with one JSON object a line; the two forms are described at the top of
            `t5patches.editing.data`. Blank lines are skipped.
        tokenizer: the model's.
        max_input_length: the most tokens that a prompt may have: the inputs as the model is given
            them.
        max_output_length: the same for the output, the end token counted.

    Returns:
        The examples in the order of the file.

    Raises:
        ValueError: some lines are bad. All of them are named, by number and reason.
    """

    def parse(line: str) -> Example:
        example = _example(fields_of(line), tokenizer)
        _check_length("inputs", len(example.input_ids), max_input_length)
        _check_length("outputs", len(example.output_ids), max_output_length)
        return example

    return read_lines(path, parse, "examples: write one JSON object a line")


class Source(NamedTuple):
    """Something to give to the model.

    Attributes:
        inputs: the source text, or a conversation.
        references: what a good output would be; empty where nobody said.
    """

    inputs: Inputs
    references: tuple[str, ...] = ()


def read_inputs(path: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> list[Source]:
    """Reads what the model is to be given.

    Args:
        path: a file whose name ends in one of `JSON_LINES`, in small letters or large ones, with
            `{"inputs": "...", "references": ["..."]}` a line (`references` and `meta` may be
            absent; `messages` may stand for `inputs`), or any other text file, with one input a
            line. Blank lines are skipped.
        tokenizer: the model's, if each input is to be tried as its prompt.

    Returns:
        The inputs in the order of the file.

    Raises:
        ValueError: some lines are bad (the first are named, by number and reason), or there are
            none.
    """

    def parse(line: str) -> Source:
        source = _source(fields_of(line)) if json_lines else Source(line)
        if tokenizer is not None:
            tokenizer.encode_prompt(source.inputs)
        return source

    json_lines = is_json_lines(path)
    write = 'write {"inputs": "..."} a line' if json_lines else "write one a line"
    return read_lines(path, parse, f"inputs: {write}")


def read_kept(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    max_input_length: int | None = None,
    max_output_length: int | None = None,
) -> list[Source | Example]:
    """Reads inputs to which the model is to answer as it does, with or without what it answers.

    Args:
        path: see `read_inputs`. A line of JSON may also have `outputs`, with `tokens`, `chat` and
            `prompt` as a marked output may; `spans` and `edits`, where there are any, are empty.
        tokenizer: the model's.
        max_input_length: see `read_examples`.
        max_output_length: see `read_examples`.

    Returns:
        In the order of the file, a source where there is no output, and else an example with
        nothing marked.

    Raises:
        ValueError: some lines are bad (the first are named, by number and reason), or there are
            none.
    """

    def parse(line: str) -> Source | Example:
        fields = fields_of(line) if json_lines else {}
        if "outputs" not in fields:
            source = _source(fields) if json_lines else Source(line)
            _check_length("inputs", len(tokenizer.encode_prompt(source.inputs)), max_input_length)
            return source
        if "corrected_targets" in fields:
            raise ValueError(
                "'corrected_targets' says how the output should have read, and this is a file of "
                "what is kept: leave it out, or give the line as data"
            )
        example = _example({"spans": [], **fields}, tokenizer)
        pushed = {at for at, marked in enumerate(example.marked) if marked} | {*example.negatives}
        if pushed:
            raise ValueError(
                f"'spans' and 'edits' are at {len(pushed)} tokens, and this is a file of what is "
                "kept: give the line as data"
            )
        _check_length("inputs", len(example.input_ids), max_input_length)
        _check_length("outputs", len(example.output_ids), max_output_length)
        return example

    json_lines = is_json_lines(path)
    return read_lines(path, parse, "inputs to keep the outputs of")


def is_json_lines(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name says that it has a JSON object a line.

    Args:
        path: of the file.

    Returns:
        Whether it ends in one of `JSON_LINES`, in small letters or large ones.
    """
    return Path(path).suffix.lower() in JSON_LINES


def read_lines(path: str | os.PathLike[str], parse: Callable[[str], T], nothing: str) -> list[T]:
    """Reads a text file line by line and tells everything that is wrong with it at once.

    Args:
        path: of a file in UTF-8, with or without a byte-order mark. A line ends with
            a line feed, a carriage return, or both; blank ones are skipped.
        parse: makes something of a line without white space at its ends, or raises `ValueError`.
        nothing: what the file has none of where it is empty.

    Returns:
        What `parse` made of the lines.

    Raises:
        ValueError: some lines are bad (the first of them are named, by number and reason, and the
            rest counted), or there are none.
    """
    found, problems = [], []
    with open(path, "rb") as file:
        ended = (line.removesuffix(b"\n").removesuffix(b"\r") for line in file)
        lines = (part for line in ended for part in line.split(b"\r"))
        for number, line in enumerate(lines, start=1):
            try:
                text = _decoded(line)
                if len(text) > MOST_CHARACTERS:
                    raise ValueError(
                        f"it has {len(text)} characters and a line may have {MOST_CHARACTERS}: "
                        "no model takes so long a text; shorten or split it"
                    )
                if text:
                    found.append(parse(text))
            except ValueError as error:
                problems.append(f"line {number}: {error}")
    if problems:
        raise ValueError(told(f"{path}:", problems, "bad line"))
    if not found:
        raise ValueError(f"{path} has no {nothing}")
    return found


@dataclasses.dataclass(frozen=True)
class Limits:
    """What becomes of texts that are too long, instead of a refusal.

    Tokens are counted as the model is given them, with an end token or a chat template, and before
    an instruction is put around an input.

    Attributes:
        truncate_inputs: longer inputs are cut to so many tokens; None cuts none.
        skip_longer: what has an input, or an output, of more tokens is left out; None leaves out
            none. It goes by the length before the cut.
    """

    truncate_inputs: int | None = None
    skip_longer: int | None = None

    def __post_init__(self) -> None:
        """Refuses limits that leave no text."""
        for name, limit in vars(self).items():
            if limit is not None and limit < 2:
                raise ValueError(
                    f"{name} is {limit}: at least 2 is needed, a token and the end token"
                )


class Within(NamedTuple):
    """What limits have left.

    Attributes:
        kept: sources or examples, in their order.
        truncated: how many of them have a shorter input than before.
        skipped: how many are left out.
    """

    kept: list[Any]
    truncated: int
    skipped: int

    def text(self, limits: Limits) -> str:
        """What was done, in a line.

        Args:
            limits: that were kept to.

        Returns:
            The line.
        """
        if not (self.truncated or self.skipped):
            return "nothing is longer than the limits"
        parts = []
        if self.truncated:
            parts.append(f"{self.truncated} inputs truncated to {limits.truncate_inputs} tokens")
        if self.skipped:
            parts.append(f"{self.skipped} of more than {limits.skip_longer} tokens left out")
        return ", ".join(parts)


def within(items: Sequence[Source | Example], limits: Limits, tokenizer: Tokenizer) -> Within:
    """Cuts inputs that are too long, and leaves out what is longer still.

    Args:
        items: sources, or examples, whose outputs count for `skip_longer` too.
        limits: how long they may be.
        tokenizer: the model's.

    Returns:
        What is left, and what was done.

    Raises:
        ValueError: nothing is left.
    """
    kept: list[Any] = []
    truncated = 0
    for item in items:
        if isinstance(item, Example):
            length, longest = len(item.input_ids), max(len(item.input_ids), len(item.output_ids))
        else:
            length = longest = len(tokenizer.encode_prompt(item.inputs))
        if limits.skip_longer is not None and longest > limits.skip_longer:
            continue
        if limits.truncate_inputs is None or length <= limits.truncate_inputs:
            kept.append(item)
            continue
        truncated += 1
        text, ids = _truncated(item.inputs, limits.truncate_inputs, tokenizer)
        if isinstance(item, Example):
            kept.append(dataclasses.replace(item, inputs=text, input_ids=ids))
        else:
            kept.append(item._replace(inputs=text))
    if not kept:
        raise ValueError(
            f"all of {len(items)} are longer than {limits.skip_longer} tokens and nothing is left: "
            "raise --skip-longer"
        )
    return Within(kept, truncated, len(items) - len(kept))


def _truncated(text: Inputs, most: int, tokenizer: Tokenizer) -> tuple[str, tuple[int, ...]]:
    """The longest beginning of a text whose prompt has `most` tokens or fewer, and that prompt."""
    if not isinstance(text, str):
        raise ValueError(
            f"a conversation of more than {most} tokens cannot be truncated: leave such out "
            "(--skip-longer), or shorten it"
        )
    tokenized = tokenizer.encode(text)
    around = len(tokenizer.encode_prompt(text)) - len(tokenized.ids)
    # A beginning may split otherwise, and so into more tokens, than in the whole text.
    for count in range(min(most - around, len(tokenized.ids)), 0, -1):
        cut = text[: tokenized.spans[count - 1][1]].rstrip()
        prompt = tokenizer.encode_prompt(cut)
        if cut and len(prompt) <= most:
            return cut, prompt
    raise ValueError(f"{text[:20]!r}... has no beginning of {most} tokens: raise --truncate-inputs")


def told(what: str, problems: Sequence[str], thing: str) -> str:
    """A message of several things that are wrong.

    Args:
        what: they are wrong with.
        problems: each in a line.
        thing: what to call one of them.

    Returns:
        The number of problems and the first of them.

    Example:
        >>> print(told("x.jsonl:", ["line 3: it is empty"], "bad line"))
        x.jsonl: 1 bad line
          line 3: it is empty
    """
    count = len(problems)
    lines = [f"{what} {count} {thing}{'' if count == 1 else 's'}"]
    lines += [f"  {_shortened(problem)}" for problem in problems[:TOLD]]
    if count > TOLD:
        lines.append(f"  and {count - TOLD} more")
    return "\n".join(lines)


def _shortened(problem: str) -> str:
    """Without the middle of what a long line or value holds; the reason stands at the end."""
    return problem if len(problem) <= 600 else f"{problem[:300]} ... {problem[-300:]}"


TOLD = 20

MOST_CHARACTERS = 1_000_000
"""In a line of a data file: attention over the tokens of more has no room in any machine."""


def write_examples(path: str | os.PathLike[str], examples: Iterable[Example]) -> None:
    """Writes examples so that `read_examples` gives them back.

    The file appears whole or not at all.

    Args:
        path: where to; a file already there is replaced.
        examples: what to write.
    """
    write_file(path, examples_text(examples))


def examples_text(examples: Iterable[Example]) -> str:
    """What `write_examples` writes.

    Args:
        examples: marked outputs.

    Returns:
        One JSON object a line.
    """
    return "".join(_line(example) + "\n" for example in examples)


def corrected_examples(examples: Sequence[Example], tokenizer: Tokenizer) -> list[Example]:
    """The examples as they should have read, for corrective fine-tuning.

    Args:
        examples: outputs; where nothing is marked and no correction given, the output stands.
        tokenizer: splits the corrections.

    Returns:
        As many examples, with nothing marked.

    Raises:
        ValueError: a marked output has no correction, or is its own.
    """
    missing = [i for i, e in enumerate(examples) if any(e.marked) and e.corrected is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(examples)} examples have marked tokens and no correction "
            f"(the first is number {missing[0] + 1}): corrective training needs `corrected_targets`"
        )
    out = []
    for number, e in enumerate(examples, start=1):
        if e.corrected is None:
            out.append(e)
            continue
        corrected = with_end(tokenizer.encode(e.corrected), tokenizer)
        if any(e.marked) and corrected.ids == e.output_ids:
            raise ValueError(
                f"example {number} has {sum(e.marked)} marked tokens, and its `corrected_targets` "
                f"is the output as it is, {e.corrected[:40]!r}: say how it should have read"
            )
        out.append(make_example(e.inputs, corrected, [], tokenizer, prompt=e.input_ids))
    return out


def with_end(tokenized: TokenizedText, tokenizer: Tokenizer) -> TokenizedText:
    """Adds the end token, which has no characters.

    Args:
        tokenized: a text and its tokens.
        tokenizer: knows the end token.

    Returns:
        The same with one more token.
    """
    end = len(tokenized.text)
    return TokenizedText(
        tokenized.text, (*tokenized.ids, tokenizer.eos_id), (*tokenized.spans, (end, end))
    )


def to_arrays(
    examples: Sequence[Example],
    *,
    pad_id: int,
    negatives: int = 0,
    input_length: int | None = None,
    output_length: int | None = None,
) -> Batch:
    """Pads examples to arrays, which training cuts into batches.

    Args:
        examples: N of them.
        pad_id: the model's; fills the ends.
        negatives: 0 pushes down the token that was said and nothing else. With K > 0 a marked
            position gets a set of at most K ids: the token that was said, then the first of
            its `negatives`; and where nothing is marked and there are some, the first K of these.
        input_length: S; default: the longest input.
        output_length: L; default: the longest output.

    Returns:
        `inputs` [N, S] and `outputs` [N, L], int32; `weights` [N, L], float32: 1 kept, -1 pushed
        down, 0 padding.
        With `negatives`, also `edit_ids` [N, L, K], int32, -1 for none, and `edit_factors`
        [N, L, K], float32: 0, as these ids are to lose all of their mass.

    Raises:
        ValueError: there are no examples, or one is longer than the given length.
    """
    if not examples:
        raise ValueError("there are no examples: at least one is needed")
    inputs = pad_rows([e.input_ids for e in examples], pad_id, input_length)
    outputs = pad_rows([e.output_ids for e in examples], pad_id, output_length)
    weights = np.zeros(outputs.shape, np.float32)
    for row, example in zip(weights, examples, strict=True):
        row[: len(example.marked)] = np.where(example.marked, -1, 1)
        if negatives:
            row[[at for at, ids in example.negatives.items() if ids]] = -1
    arrays = {"inputs": inputs, "outputs": outputs, "weights": weights}
    if negatives:
        arrays["edit_ids"] = _edit_ids(examples, outputs.shape, negatives)
        arrays["edit_factors"] = np.zeros(arrays["edit_ids"].shape, np.float32)
    return arrays


def largest_set(examples: Iterable[Example]) -> int:
    """How many ids the largest set of negatives has, with the token that was said where marked.

    Args:
        examples: with negatives or without.

    Returns:
        The number; 0 where nothing has negatives.
    """
    sizes = [
        example.marked[at] + len(ids)
        for example in examples
        for at, ids in example.negatives.items()
        if ids
    ]
    return max(sizes, default=0)


def said_is_pushed_down(batch: Mapping[str, Any]) -> Any:
    """Where the token that was said is to lose its mass.

    Args:
        batch: of `to_arrays`, of NumPy or JAX.

    Returns:
        Bool [N, L]. False where only other tokens are pushed down, see `Example.negatives`.
    """
    pushed = batch["weights"] < 0
    if "edit_ids" not in batch:
        return pushed
    return pushed & (batch["edit_ids"] == batch["outputs"][..., None]).any(-1)


def only_where_marked(example: Example) -> Example:
    """An example without the negatives where nothing is marked.

    Args:
        example: with negatives anywhere.

    Returns:
        What it would be if none had been looked for there.
    """
    negatives = {at: ids for at, ids in example.negatives.items() if example.marked[at]}
    return dataclasses.replace(example, negatives=negatives)


CHOSEN, CHOSEN_WEIGHTS = "chosen", "chosen_weights"
"""What pairs have beside the arrays of `to_arrays`: the corrections, padded as the outputs."""


def pair_arrays(examples: Sequence[Example], tokenizer: Tokenizer, *, pad_id: int) -> Batch:
    """Pads outputs and their corrections, for objectives that compare the two.

    Args:
        examples: N of them.
        tokenizer: splits the corrections.
        pad_id: see `to_arrays`.

    Returns:
        The arrays of `to_arrays`, `chosen` [N, L] and `chosen_weights` [N, L]: 1 for the tokens of
        a correction, 0 for padding and where nothing of the output is pushed down.

    Raises:
        ValueError: a marked output has no correction.
    """
    corrected = corrected_examples(examples, tokenizer)
    length = max(len(e.output_ids) for e in (*examples, *corrected))
    arrays, chosen = (
        to_arrays(part, pad_id=pad_id, output_length=length) for part in (examples, corrected)
    )
    is_pair = (arrays["weights"] < 0).any(-1, keepdims=True)
    weights = np.where(is_pair, chosen["weights"], np.float32(0))
    return arrays | {CHOSEN: chosen["outputs"], CHOSEN_WEIGHTS: weights}


def training_arrays(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    objective: str,
    *,
    pad_id: int,
    negatives: int,
) -> Batch:
    """The arrays that an objective trains on.

    Args:
        examples: N of them.
        tokenizer: splits the corrections.
        objective: `ce` takes the corrections, `dpo` pairs of outputs and corrections, every other
            one the outputs; `ftpo` sets a margin against the token that was said, and takes no
            negatives where that is not pushed down.
        pad_id: see `to_arrays`.
        negatives: see `to_arrays`.

    Returns:
        Arrays for `t5patches.editing.train.train`.

    Raises:
        ValueError: a marked output has no correction, and one is needed.
    """
    if objective == "dpo":
        return pair_arrays(examples, tokenizer, pad_id=pad_id)
    if objective == "ce":
        examples = corrected_examples(examples, tokenizer)
    if objective == "ftpo":
        examples = [only_where_marked(example) for example in examples]
    return to_arrays(examples, pad_id=pad_id, negatives=negatives)


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, length: int | None = None) -> np.ndarray:
    """Puts token ids into an array.

    Args:
        rows: N of them.
        pad_id: the model's; fills the ends.
        length: L; default: the longest row.

    Returns:
        [N, L] int32.

    Raises:
        ValueError: a row is longer than `length`.
    """
    longest = max(len(row) for row in rows)
    if length is not None and longest > length:
        raise ValueError(f"a text has {longest} tokens and the length is {length}: raise it")
    padded = np.full((len(rows), longest if length is None else length), pad_id, np.int32)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Which examples make the batch of a step.

    A function of its arguments alone, so that a resumed run sees what an unbroken one would.
    Every epoch is a fresh permutation; a batch may run from one epoch into the next.

    Args:
        count: how many examples there are.
        batch_size: how many to take.
        step: 0 for the first batch.
        seed: chooses the permutations.

    Returns:
        [batch_size], integers below `count`.

    Example:
        >>> [batch_indices(4, 3, step, seed=0).tolist() for step in range(2)]
        [[2, 0, 1], [3, 3, 0]]
    """
    wanted = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = {
        int(e): np.random.default_rng([seed, int(e)]).permutation(count)
        for e in np.unique(wanted // count)
    }
    return np.array([epochs[int(i) // count][i % count] for i in wanted])


def _decoded(line: bytes) -> str:
    if b"\0" in line:
        raise ValueError("it holds a NUL byte, as text in UTF-16 does: save the file as UTF-8")
    try:
        # Editors put a byte-order mark at the start; files put together have it in the middle.
        return line.decode("utf-8").lstrip("\ufeff").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from error


def _source(fields: Mapping[str, Any]) -> Source:
    names = names_of(fields)
    if not {"inputs"} <= names <= {"inputs", "references"}:
        raise ValueError(
            f"got the fields {sorted(names)}; needed is 'inputs' or 'messages', with or without "
            "'references'; other things go under 'meta'"
        )
    inputs, references = inputs_of(fields), fields.get("references", [])
    if isinstance(references, str):
        references = [references]
    if not (isinstance(references, list) and all(isinstance(r, str) for r in references)):
        raise ValueError(f"'references' must be a text or a list of them, got {references!r}")
    return Source(inputs, tuple(references))


def _example(fields: Mapping[str, Any], tokenizer: Tokenizer) -> Example:
    names = names_of(fields)
    if names != PAIR_FIELDS and not SPAN_FIELDS <= names <= SPAN_FIELDS | OPTIONAL_FIELDS:
        raise ValueError(
            f"got the fields {sorted(names)}; needed are {sorted(PAIR_FIELDS)}, or "
            f"{sorted(SPAN_FIELDS)} with any of {sorted(OPTIONAL_FIELDS)} ('messages' may stand "
            "for 'inputs'); other things go under 'meta'"
        )
    inputs = inputs_of(fields)
    _check_chat(fields, tokenizer)
    if "negative_targets" in fields:
        return _from_pair(
            inputs,
            text_of(fields, "negative_targets"),
            text_of(fields, "corrected_targets"),
            tokenizer,
        )
    # A model can say nothing at all, and then there are tokens to show that it did.
    outputs = text_of(fields, "outputs", may_be_empty="tokens" in fields)
    tokenized = _tokens(fields, outputs, tokenizer)
    corrected = text_of(fields, "corrected_targets") if "corrected_targets" in fields else None
    return make_example(
        inputs,
        tokenized,
        _spans(fields["spans"]),
        tokenizer,
        negatives=_negatives(fields.get("edits", []), tokenizer),
        corrected=corrected,
        prompt=_prompt(fields),
    )


def fields_of(line: str) -> dict[str, Any]:
    """The fields of a line.

    Args:
        line: a JSON object.

    Returns:
        Values by name.

    Raises:
        ValueError: it is something else, or a name is there twice.
    """
    try:
        fields = json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: brackets within brackets too deep") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON object is needed, got {type(fields).__name__}")
    return fields


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object; `json` would take the last of two of a name."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice: which of the two is meant?")
        found[name] = value
    return found


def names_of(fields: Mapping[str, Any]) -> set[str]:
    """The names of a line's fields, with `inputs` for `messages`, which may stand in its place.

    Args:
        fields: of the line.

    Returns:
        The names without `meta`, which may hold anything.
    """
    names = fields.keys() - {"meta"}
    return names if "inputs" in names else {"inputs" if n == "messages" else n for n in names}


def inputs_of(fields: Mapping[str, Any]) -> Inputs:
    """What a line says that a model is given.

    Args:
        fields: of the line, with `inputs` or `messages`.

    Returns:
        A text, or a conversation.

    Raises:
        ValueError: it is neither.
    """
    if "messages" not in fields:
        return text_of(fields, "inputs")
    messages = fields["messages"]
    if not (isinstance(messages, list) and messages):
        raise ValueError(
            f"'messages' must be a list of them, as {{'role': 'user', 'content': '...'}}, got "
            f"{messages!r}"
        )
    for message in messages:
        if not (isinstance(message, dict) and message.keys() == {"role", "content"}):
            raise ValueError(
                f"a message must be {{'role': 'user', 'content': '...'}}, got {message!r}"
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"a message's role must be one of {', '.join(ROLES)}, got {message['role']!r}"
            )
    if messages[-1]["role"] != "user":
        raise ValueError(
            f"the last message is of the role {messages[-1]['role']!r}, and the model is to answer "
            "one of the user's"
        )
    return tuple(Message(message["role"], text_of(message, "content")) for message in messages)


def _check_chat(fields: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Refuses an output to another prompt than this run makes."""
    chat = fields.get("chat", bool(tokenizer.chat))
    if not isinstance(chat, bool):
        raise ValueError(f"'chat' must be true or false, got {chat!r}")
    if chat != bool(tokenizer.chat):
        words = {True: "in its chat template", False: "without a chat template"}
        raise ValueError(
            f"the model was given the inputs {words[chat]}, and this run has them "
            f"{words[not chat]}: give --chat {'on' if chat else 'off'}, or other data"
        )


def _prompt(fields: Mapping[str, Any]) -> tuple[int, ...] | None:
    ids = fields.get("prompt")
    if ids is None:
        return None
    if not (isinstance(ids, list) and ids and all(_is_count(i) for i in ids)):
        raise ValueError(f"'prompt' must be a list of token ids, got {ids!r}")
    return tuple(ids)


def text_of(fields: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    """A text that a line holds.

    Args:
        fields: of the line.
        name: of the field.
        may_be_empty: whether it may hold nothing.

    Returns:
        The text.

    Raises:
        ValueError: there is something else, or half a character in it.
    """
    text = fields[name]
    if not isinstance(text, str) or not (text.strip() or may_be_empty):
        raise ValueError(f"{name!r} must be a text that is not empty, got {text!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name!r} holds half a character ({error.reason})") from error
    return text


def _spans(value: Any) -> list[Span]:
    if not isinstance(value, list):
        raise ValueError(f"'spans' must be a list of [start, end], got {value!r}")
    for span in value:
        if not (isinstance(span, list) and len(span) == 2 and all(_is_count(x) for x in span)):
            raise ValueError(f"a span must be [start, end], two characters' numbers, got {span!r}")
    return [(start, end) for start, end in value]


def _tokens(fields: Mapping[str, Any], outputs: str, tokenizer: Tokenizer) -> TokenizedText:
    if "tokens" not in fields:
        return with_end(tokenizer.encode(outputs), tokenizer)
    ids = fields["tokens"]
    if not (isinstance(ids, list) and ids and all(_is_count(i) for i in ids)):
        raise ValueError(f"'tokens' must be a list of token ids, got {ids!r}")
    end = next((number for number, i in enumerate(ids, 1) if i in tokenizer.end_ids), len(ids))
    if end < len(ids):
        raise ValueError(
            f"'tokens' go on after the end token {ids[end - 1]}, which is number {end} of "
            f"{len(ids)}: no output does"
        )
    tokenized = tokenizer.decode(ids)
    if tokenized.text == outputs:
        return tokenized
    # A tokenizer may take two texts for the same, and spell them as one of the two.
    split = with_end(tokenizer.encode(outputs), tokenizer)
    if split.ids != tuple(ids):
        raise ValueError(
            f"'tokens' spell {tokenized.text!r} with this model's tokenizer and 'outputs' is "
            f"{outputs!r}: was the file made with another tokenizer?"
        )
    return split


def _negatives(value: Any, tokenizer: Tokenizer) -> dict[int, tuple[int, ...]]:
    if not isinstance(value, list):
        raise ValueError(f"'edits' must be a list, got {value!r}")
    negatives = {}
    for edit in value:
        if not (isinstance(edit, dict) and edit.keys() == {"position", "ids"}):
            raise ValueError(f"an edit must be {{'position': 3, 'ids': [17, 5]}}, got {edit!r}")
        position, ids = edit["position"], edit["ids"]
        if not (_is_count(position) and isinstance(ids, list) and all(_is_count(i) for i in ids)):
            raise ValueError(f"an edit's position and ids must be whole numbers, got {edit!r}")
        if ids and max(ids) >= tokenizer.vocab_size:
            raise ValueError(
                f"an edit has id {max(ids)}, and the tokenizer has {tokenizer.vocab_size} ids"
            )
        if position in negatives:
            raise ValueError(f"two edits at position {position}: put their ids together")
        negatives[position] = tuple(ids)
    return negatives


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_length(name: str, length: int, limit: int | None) -> None:
    if limit is not None and length > limit:
        raise ValueError(
            f"{name!r} has {length} tokens and the limit is {limit}: shorten it or raise the limit"
        )


def _from_pair(inputs: Inputs, negative: str, corrected: str, tokenizer: Tokenizer) -> Example:
    """Marks the tokens of `negative` that the correction does not repeat.

    Aligned rather than compared position by position: one token more in the correction must not
    mark all that follows.
    """
    tokenized = with_end(tokenizer.encode(negative), tokenizer)
    repeated = (*tokenizer.encode(corrected).ids, tokenizer.eos_id)
    matcher = difflib.SequenceMatcher(None, tokenized.ids, repeated, autojunk=False)
    changed = [
        at
        for what, first, last, _, _ in matcher.get_opcodes()
        if what in ("replace", "delete")
        for at in range(first, last)
    ]
    if negative != corrected and not changed:
        raise ValueError(
            "the correction adds to the negative text and changes none of it: there is nothing "
            "to push down"
        )
    spans = {at: _without_spaces(tokenized.text, *tokenized.spans[at]) for at in changed}
    spans = {at: (start, end) for at, (start, end) in spans.items() if start < end}
    example = make_example(inputs, tokenized, [*spans.values()], tokenizer, corrected=corrected)
    # Of a character spelled in bytes the correction may repeat some.
    marked = tuple(at in spans for at in range(len(tokenized.ids)))
    return dataclasses.replace(example, marked=marked)


def _without_spaces(text: str, start: int, end: int) -> Span:
    """The characters of a token without white space at its ends, unless it has no others."""
    piece = text[start:end]
    if not piece.strip():
        return start, end
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


def _line(example: Example) -> str:
    fields: dict[str, Any] = {}
    if isinstance(example.inputs, str):
        fields["inputs"] = example.inputs
    else:
        fields["messages"] = [message._asdict() for message in example.inputs]
    fields |= {
        "outputs": example.outputs,
        "spans": example.spans,
        "tokens": example.output_ids,
    }
    if example.chat is not None:
        fields["chat"] = example.chat
    if example.chat:
        fields["prompt"] = example.input_ids
    if example.negatives:
        fields["edits"] = [
            {"position": position, "ids": ids} for position, ids in example.negatives.items()
        ]
    if example.corrected is not None:
        fields["corrected_targets"] = example.corrected
    return json.dumps(fields, ensure_ascii=False)


def _edit_ids(examples: Sequence[Example], shape: tuple[int, ...], size: int) -> np.ndarray:
    ids = np.full((*shape, size), -1, np.int32)
    for row, example in zip(ids, examples, strict=True):
        marked = {at: example.output_ids[at : at + 1] for at, m in enumerate(example.marked) if m}
        for at in marked.keys() | example.negatives.keys():
            chosen = dict.fromkeys((*marked.get(at, ()), *example.negatives.get(at, ())))
            row[at, : min(size, len(chosen))] = list(chosen)[:size]
    return ids
