"""Fill-in-the-middle: a text whose middle is told last, so that a model learns to fill gaps.

A text is cut at two characters, drawn evenly, into prefix, middle and suffix, and told in one of
two orders, with a sentinel in front of each part and an end token behind the middle:

* PSM: ``PREFIX prefix SUFFIX suffix MIDDLE middle``;
* SPM: ``PREFIX SUFFIX suffix MIDDLE prefix middle``.

A share of the texts is so transformed, and a share of those in the second order: both orders in one
training help one another. Cuts are between characters and not tokens, so that a gap may begin
within a word.

Bavarian et al., "Efficient Training of Language Models to Fill in the Middle", 2022,
arXiv:2207.14255, sections 3 and 4.
"""

from __future__ import annotations

import dataclasses
import difflib

import numpy as np

from t5patches.model.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """How texts are transformed.

    Attributes:
        rate: the share of texts.
        spm: the share of these that are told suffix first.
        sentinels: special tokens of the tokenizer, in front of prefix, suffix and middle.
    """

    rate: float
    sentinels: tuple[str, str, str]
    spm: float = 0.5

    def __post_init__(self) -> None:
        """Refuses what is no share, and sentinels that do not tell the parts apart."""
        for name in ("rate", "spm"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"fim {name} is {getattr(self, name)}: a share from 0 to 1 is needed"
                )
        if len(set(self.sentinels)) != 3:
            raise ValueError(f"three different sentinels are needed, got {list(self.sentinels)}")

    def ids(self, tokenizer: Tokenizer) -> tuple[int, int, int]:
        """The sentinels' ids.

        Args:
            tokenizer: the model's.

        Returns:
            Of prefix, suffix and middle.

        Raises:
            ValueError: one is no special token, so that any text may hold it, or an end token.
            NotImplementedError: parts of a text cannot be split into tokens one by one.
        """
        controls = tokenizer.controls
        absent = [name for name in self.sentinels if name not in controls]
        if absent:
            near = difflib.get_close_matches(absent[0], controls, n=3) or list(controls)[:8]
            raise ValueError(
                f"the tokenizer has no special token {absent[0]!r} to tell the parts of a text "
                f"apart; it has {', '.join(map(repr, near))}, {len(controls)} in all"
            )
        ends = [name for name in self.sentinels if controls[name] in tokenizer.end_ids]
        if ends:
            raise ValueError(f"{ends[0]!r} ends an output, so it can begin no part of a text")
        parts = ("a ", " b", "c")
        told = tokenizer.decode([i for part in parts for i in tokenizer.encode(part).ids]).text
        if told != "".join(parts):
            raise NotImplementedError(
                f"the tokenizer makes {told!r} of the parts {parts}, as sentencepiece does that "
                "puts a space in front of every text: a middle that begins within a word would "
                "be told as another word. Leave --fim out, or take a byte-level model"
            )
        prefix, suffix, middle = (controls[name] for name in self.sentinels)
        return prefix, suffix, middle

    def tokens(
        self, text: str, tokenizer: Tokenizer, most: int, rng: np.random.Generator
    ) -> tuple[int, ...] | None:
        """A text with its middle last.

        Args:
            text: the text; what is too long is cut off its end first.
            tokenizer: the model's.
            most: tokens, sentinels and the end token counted.
            rng: draws whether, where and in which order.

        Returns:
            Its tokens; None where the text stays as it is.
        """
        drawn, order, *cuts = rng.random(4)
        if drawn >= self.rate:
            return None
        before, behind, between = self.ids(tokenizer)
        spans = tokenizer.encode(text).spans
        # Parts may split into more tokens than the whole.
        for count in range(min(len(spans), most - 4), 0, -1):
            whole = text if count == len(spans) else text[: spans[count - 1][1]]
            first, second = sorted(int(cut * (len(whole) + 1)) for cut in cuts)
            parts = (whole[:first], whole[first:second], whole[second:])
            if order < self.spm:
                suffix, rest = (tokenizer.encode(x).ids for x in (parts[2], parts[0] + parts[1]))
                told = (before, behind, *suffix, between, *rest)
            else:
                prefix, middle, suffix = (tokenizer.encode(x).ids for x in parts)
                told = (before, *prefix, behind, *suffix, between, *middle)
            if len(told) < most:
                return (*told, tokenizer.eos_id)
        return None
