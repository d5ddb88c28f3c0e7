"""What a model says more often than people do: phrases, their rates, and rules to choose from."""

from __future__ import annotations

import collections
import json
import math
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

from t5patches.editing.annotate import mark_nothing, whole_part, word_list
from t5patches.editing.collect import (
    CollectSettings,
    describe,
    let_speak,
    require_own,
    require_room,
    write_output,
)
from t5patches.editing.data import fields_of, is_json_lines, read_lines, text_of
from t5patches.editing.words import WORD, spaced
from t5patches.model.folder import LoadedModel
from t5patches.model.tokenizer import Inputs
from t5patches.runs.claims import Parts
from t5patches.runs.files import work_of

_LONGEST = 4  # words in a phrase
_LEAST = 3  # outputs with it: what one or two of them say is no habit
_SURE = 1.96  # standard errors
_RECOUNTED = 10  # candidates for each phrase to return
_WITHIN = 0.8  # of a phrase's occurrences inside a longer one, from which on it is no other


class Phrase(NamedTuple):
    """A phrase of the model.

    Attributes:
        text: its words, in small letters.
        outputs: how many outputs have it.
        rate: occurrences in 1000 words of the model.
        human_rate: the same of the human text, half an occurrence added.
        ratio: of the two rates.
        at_least: what the ratio is at least, with 95% confidence.
    """

    text: str
    outputs: int
    rate: float
    human_rate: float
    ratio: float
    at_least: float


def overused(outputs: Sequence[str], human: Iterable[str], *, most: int = 30) -> list[Phrase]:
    r"""Finds what is said more than twice as often as by people.

    Of a phrase with a occurrences in A words of the model and b in B words of people, the ratio is

    .. math:: \rho = \frac{(a + 1/2) / A}{(b + 1/2) / B}

    Of the a + b occurrences the model's share :math:`\theta` is at least :math:`\theta_0`, the
    lower end of Wilson's interval of 95% (1927), and so the ratio at least
    :math:`\theta_0 / (1 - \theta_0) \cdot B / A`, by which phrases are ranked. They have one to
    four words of the model with nothing but spaces between them (where a script has none, what
    stands between two signs is one), and occur where the rule `words` marks them: "Trump" in
    "Trump's" too. Of a phrase and a longer one without which it hardly occurs, the one that ranks
    higher is there, of equals the longer.

    Args:
        outputs: of the model.
        human: texts by people, of the same kind.
        most: phrases to return at the most.

    Returns:
        The phrases, the most overused first.

    Raises:
        ValueError: either has no words.

    Example:
        >>> said = ["a testament to the city", "It is a testament to Ann", "a testament to it"]
        >>> [(p.text, p.outputs) for p in overused(said, ["the city is a city", "it is Ann"] * 40)]
        [('a testament to', 3)]
    """
    outputs, human = list(outputs), list(human)
    words, their_words = (
        sum(len(WORD.findall(spaced(text))) for text in texts) for texts in (outputs, human)
    )
    for count, of in ((words, "the model's outputs"), (their_words, "the human text")):
        if not count:
            raise ValueError(f"{of} have no words, so there is nothing to compare")

    def at_least(count: int, other: int) -> float:
        share = _least_share(count, other)
        return share / (1 - share) * their_words / words

    small, their_small = ([_small(text) for text in texts] for texts in (outputs, human))
    said, outputs_with = _counts(small)
    theirs, _ = _counts(their_small)
    often = (text for text in said if outputs_with[text] >= _LEAST)
    ranks = {text: at_least(said[text], theirs[text]) for text in often}
    ranked: list[str] = []
    for text in sorted(ranks, key=lambda x: (-ranks[x], -len(x))):
        if ranks[text] > 2 and not any(_alike(text, other, said) for other in ranked):
            ranked.append(text)
    # That was by whole words alone. What a rule marks takes longer to find.
    found = []
    for text in ranked[: _RECOUNTED * most]:
        marks = _marks(text, outputs, small)
        count, other = sum(marks), sum(_marks(text, human, their_small))
        outputs_marked = sum(map(bool, marks))
        if outputs_marked >= _LEAST and at_least(count, other) > 2:
            rates = (1000 * count / words, 1000 * (other + 0.5) / their_words)
            ratio = (count + 0.5) / (other + 0.5) * their_words / words
            found.append(Phrase(text, outputs_marked, *rates, ratio, at_least(count, other)))
    return sorted(found, key=lambda phrase: (-phrase.at_least, phrase.text))[:most]


def rules_text(phrases: Sequence[Phrase], about: str) -> str:
    """Offers a rule for each phrase.

    Args:
        phrases: of `overused`.
        about: the first line, of what was compared.

    Returns:
        TOML, as `t5patches.editing.rules.read_rules` takes it.
    """
    lines = [f"# {about}", "# Delete the rules for what the model may say."]
    for phrase in phrases:
        lines += [
            "",
            f"# in {phrase.outputs} outputs; {phrase.rate:.3g} in 1000 words, people "
            f"{phrase.human_rate:.3g} at most: {phrase.ratio:.3g} times as often, at least "
            f"{phrase.at_least:.3g} times",
            "[[rule]]",
            f"words = [{json.dumps(phrase.text, ensure_ascii=False)}]",
        ]
    return "\n".join(lines) + "\n"


def discover(
    model: LoadedModel,
    inputs: Sequence[Inputs],
    human: Sequence[str],
    output: str | os.PathLike[str],
    settings: CollectSettings,
    *,
    most: int = 30,
    progress: Progress | None = None,
) -> list[Phrase]:
    """Lets a model speak and writes rules against what it says more often than people.

    Args:
        model: see `t5patches.model.folder.load_model`.
        inputs: the source texts, or conversations.
        human: texts by people.
        output: the TOML file to write; it appears whole or not at all. Until then `OUTPUT.work`
            holds the outputs that are made, whatever they are compared with.
        settings: how many outputs, and how.
        most: rules to offer at the most.
        progress: shows how far it is.

    Returns:
        The phrases that rules are offered for.

    Raises:
        ValueError: the file exists, `OUTPUT.work` is of another run, a batch does not fit into
            memory, or there are no words to compare.
    """
    output, described = Path(output), describe(model, inputs, settings)
    require_own(output, described)
    require_room(model, inputs, settings)
    parts = Parts(work_of(output), described)
    examples = let_speak(model, inputs, mark_nothing, settings, parts, progress)
    said = [whole_part(e.outputs, e.output_ids, model.tokenizer) for e in examples]
    phrases = overused(said, human, most=most)
    about = (
        f"{len(phrases)} phrases that {len(examples)} outputs of the model have more than twice as "
        f"often as {len(human)} texts by people."
    )
    write_output(output, rules_text(phrases, about), parts)
    return phrases


def read_human(path: str | os.PathLike[str]) -> list[str]:
    """Reads text by people.

    Args:
        path: of a file whose name ends in one of `t5patches.editing.data.JSON_LINES`, with
            `{"outputs": "..."}` a line and whatever else, or of any other one, with a text a line.

    Returns:
        The texts.

    Raises:
        ValueError: some lines are bad (the first are named, by number and reason), or there are
            none.
    """

    def text(line: str) -> str:
        fields = fields_of(line)
        if "outputs" not in fields:
            raise ValueError(f"got the fields {sorted(fields)}; 'outputs' is needed, the text")
        return text_of(fields, "outputs")

    if is_json_lines(path):
        return read_lines(path, text, 'texts: write {"outputs": "..."} a line')
    return read_lines(path, str, "texts: write one a line")


def _least_share(count: int, other: int) -> float:
    """The lower end of Wilson's interval of ``count / (count + other)``."""
    n, z = count + other, _SURE
    share = count / n
    error = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (share + z * z / (2 * n) - error) / (1 + z * z / n)


def _counts(texts: Iterable[str]) -> tuple[collections.Counter[str], collections.Counter[str]]:
    """How often each phrase occurs, and in how many of the texts."""
    occurrences: collections.Counter[str] = collections.Counter()
    texts_with: collections.Counter[str] = collections.Counter()
    for text in texts:
        found = list(_phrases(text))
        occurrences.update(found)
        texts_with.update(set(found))
    return occurrences, texts_with


def _phrases(text: str) -> Iterator[str]:
    run: list[str] = []
    last = 0
    for match in WORD.finditer(text):
        if text[last : match.start()].strip():
            run = []
        run = [*run[-_LONGEST + 1 :], match.group()]
        last = match.end()
        for start in range(len(run)):
            yield " ".join(run[start:])


def _small(text: str) -> str:
    """A text in one spelling, of those that the rule `words` takes for the same."""
    text = unicodedata.normalize("NFC", " ".join(text.split())).replace("’", "'")
    return text.replace("İ", "i").lower()  # whose small letter is two characters, for no rule


def _marks(phrase: str, texts: Sequence[str], small: Sequence[str]) -> list[int]:
    """How often the rule `words` marks a phrase in each of some texts; most are soon left out."""
    rule = word_list([phrase])
    pairs = zip(texts, small, strict=True)
    return [len([*rule("", text)]) if phrase in spelled else 0 for text, spelled in pairs]


def _alike(one: str, other: str, said: collections.Counter[str]) -> bool:
    """Whether the longer of two phrases has the other, and nearly all of its occurrences."""
    short, long = sorted((one, other), key=len)
    return f" {short} " in f" {long} " and said[long] >= _WITHIN * said[short]
