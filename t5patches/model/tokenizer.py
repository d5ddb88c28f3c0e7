"""Text to token ids and back, and which characters each token covers.

Editing marks characters (a name, a word on a list) and trains on tokens, so both directions
return the same thing: the text, its ids, and the characters of each id.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import sentencepiece

Span = tuple[int, int]
"""Characters `text[start:end]`."""


class TokenizedText(NamedTuple):
    """A text, its token ids, and the characters `text[start:end]` of each token.

    Attributes:
        text: the text.
        ids: the token ids.
        spans: one span for each id; empty (start equal to end) where a token has no characters,
            as the end token has none.
    """

    text: str
    ids: tuple[int, ...]
    spans: tuple[Span, ...]


class Tokenizer(Protocol):
    """What the editing steps need to know of a vocabulary."""

    vocab_size: int
    pad_id: int
    eos_id: int

    def encode(self, text: str) -> TokenizedText:
        """Splits `text` into tokens; no end token is added."""

    def decode(self, ids: Sequence[int]) -> TokenizedText:
        """The text of `ids`, with the characters that each of them contributes."""


class SentencePieceTokenizer:
    """A sentencepiece model, such as the `spiece.model` of a T5.

    Example:
        >>> tokenizer = SentencePieceTokenizer(train_sentencepiece(["a cat", "a cat sat"], 16))
        >>> tokenizer.decode(tokenizer.encode("a cat").ids).text
        'a cat'
    """

    def __init__(self, model: bytes | str | os.PathLike[str]):
        """Loads a model.

        Args:
            model: the path of a model file, or the bytes of one.

        Raises:
            ValueError: it is no sentencepiece model, or has no padding or end token.
        """
        content = model if isinstance(model, bytes) else _read(model)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            name = "what was given" if isinstance(model, bytes) else os.fspath(model)
            raise ValueError(f"{name} is no sentencepiece model: {error}") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.pad_id: int = self._processor.pad_id()
        self.eos_id: int = self._processor.eos_id()
        if min(self.pad_id, self.eos_id) < 0:
            raise ValueError(
                f"the sentencepiece model has pad id {self.pad_id} and eos id {self.eos_id}, and "
                "both are needed: train it with pad_id=0, eos_id=1, unk_id=2, as T5 has them"
            )

    def encode(self, text: str) -> TokenizedText:
        """Splits a text into tokens.

        Args:
            text: any text. Spans refer to it as it is, before the model's own normalisation.

        Returns:
            The tokens of `text`, without an end token.
        """
        found = self._processor.encode(text, return_type="offset_mapping")
        return TokenizedText(text, tuple(found["ids"]), self._spans(found["ids"], found["offsets"]))

    def decode(self, ids: Sequence[int]) -> TokenizedText:
        """Turns token ids into text.

        Args:
            ids: token ids. Padding, the end token and ids beyond the sentencepiece model (T5 has
                more rows in its embedding than pieces) have no characters.

        Returns:
            The text, with a span for each of `ids`.
        """
        ids = [int(i) for i in ids]
        known = [i for i in ids if 0 <= i < self.vocab_size]
        if not known:
            return TokenizedText("", tuple(ids), ((0, 0),) * len(ids))
        found = self._processor.decode(known, return_type="offset_mapping")
        spans = iter(self._spans(known, found["offsets"]))
        empty = (len(found["text"]), len(found["text"]))
        return TokenizedText(
            found["text"],
            tuple(ids),
            tuple(next(spans) if 0 <= i < self.vocab_size else empty for i in ids),
        )

    def _spans(self, ids: Sequence[int], offsets: Sequence[Sequence[int]]) -> tuple[Span, ...]:
        """Gives every byte of a character that character.

        Sentencepiece gives a character spelled in bytes to the last of its byte pieces and
        nothing to the others.
        """
        spans = [(start, end) for start, end in offsets]
        for i in reversed(range(len(spans) - 1)):
            start, end = spans[i]
            of_a_character = self._processor.is_byte(ids[i]) and self._processor.is_byte(ids[i + 1])
            if start == end and of_a_character:
                spans[i] = spans[i + 1]
        return tuple(spans)


def train_sentencepiece(texts: Sequence[str], vocab_size: int) -> bytes:
    """Trains a BPE vocabulary with T5's special tokens and byte fallback off.

    Args:
        texts: the texts to learn from.
        vocab_size: how many pieces, the special ones included.

    Returns:
        The bytes of a sentencepiece model; pad is 0, the end token 1, unknown 2.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def _read(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        return file.read()
