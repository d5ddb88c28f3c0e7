"""Text to token ids and back, and which characters each token covers.

Editing marks characters (a name, a word on a list) and trains on tokens, so both directions
return the same thing: the text, its ids, and the characters of each id.
"""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from t5patches.runs.files import read_regular

Span = tuple[int, int]
"""Characters `text[start:end]`."""


class Message(NamedTuple):
    """A message of a conversation.

    Attributes:
        role: who says it: "system", "user" or "assistant".
        content: what is said.
    """

    role: str
    content: str


Inputs = str | tuple[Message, ...]
"""What a model is given: a text, or a conversation for a chat template."""


def input_text(inputs: Inputs) -> str:
    """The text of what a model is given, for rules and for people.

    Args:
        inputs: a text or a conversation.

    Returns:
        The text; of a conversation, what was said in it, an empty line between two messages.
    """
    return inputs if isinstance(inputs, str) else "\n\n".join(m.content for m in inputs)


def messages_of(inputs: Inputs) -> tuple[Message, ...]:
    """What a model is given, as a conversation: in this form inputs are equal or are not.

    Args:
        inputs: a text or a conversation.

    Returns:
        The messages; of a text, one of the user.
    """
    return (Message("user", inputs),) if isinstance(inputs, str) else inputs


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
    """What the editing steps need to know of a vocabulary.

    Attributes:
        vocab_size: one more than the largest id that a text can have.
        pad_id: as the model's config has it; -1 where padding is no token.
        eos_id: ends an output that is given as text.
        end_ids: end an output that was generated; `eos_id` is one of them.
        chat: whether `encode_prompt` puts the folder's chat template around what it is given; None
            where the folder has none.
        controls: the ids of the special tokens, which no text has.
    """

    vocab_size: int
    pad_id: int
    eos_id: int
    end_ids: tuple[int, ...]
    chat: bool | None

    @property
    def controls(self) -> Mapping[str, int]:
        """See the class."""

    def encode(self, text: str) -> TokenizedText:
        """Splits `text` into tokens; no token is added, and none of a text is a control token."""

    def encode_prompt(self, inputs: Inputs) -> tuple[int, ...]:
        """What the model is given for a text, or for a conversation where there is a template."""

    def decode(self, ids: Sequence[int]) -> TokenizedText:
        """The text of `ids`, with the characters that each of them contributes."""


def same_vocabulary(tokenizer: Tokenizer, other: Tokenizer) -> bool:
    """Whether ids mean the same to two tokenizers.

    Args:
        tokenizer: the first.
        other: the second.

    Returns:
        True where each id that both have is written alike.
    """
    every = range(min(tokenizer.vocab_size, other.vocab_size))
    return tokenizer.decode(every).text == other.decode(every).text


class SpecialIds(NamedTuple):
    """Ids that stand for no text.

    Attributes:
        pad: fills the ends of rows; -1 where padding is no token.
        ends: end an output, the one that is put behind a text first.
        before: stand in front of a prompt.
        after: stand behind a prompt.
    """

    pad: int
    ends: tuple[int, ...]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class SentencePieceTokenizer:
    """A sentencepiece model: the `spiece.model` of a T5, the `tokenizer.model` of a Llama.

    Control pieces (`</s>`) in a text are spelled like any other text, as sentencepiece has it; user
    defined ones (the sentinels of a T5) are found in it, and it is split at added tokens.

    Attributes:
        controls: the control pieces' ids, for `encode_template`.

    Example:
        >>> tokenizer = SentencePieceTokenizer(train_sentencepiece(["a cat", "a cat sat"], 16))
        >>> tokenizer.decode(tokenizer.encode("a cat").ids).text
        'a cat'
    """

    def __init__(
        self,
        model: bytes | str | os.PathLike[str],
        special: SpecialIds | None = None,
        *,
        joined: bool = False,
        added: Collection[str] = (),
    ):
        """Loads a model.

        Args:
            model: the path of a model file, or the bytes of one.
            special: the ids that stand for no text. Default, as a T5 has them: the model's padding,
                and its end token behind outputs and prompts.
            joined: whether what follows an added token, or a control token in a template, goes on
                without the space that sentencepiece puts in front of a text.
            added: pieces between which each part of a text is a text of its own.

        Raises:
            ValueError: it is no sentencepiece model, or has no padding or end token.
        """
        content = model if isinstance(model, bytes) else read_regular(model)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            name = "what was given" if isinstance(model, bytes) else os.fspath(model)
            raise ValueError(f"{name} is no sentencepiece model: {error}") from error
        self._dropped: frozenset[int] = frozenset()
        if special is None:
            pad_id, eos_id = self._processor.pad_id(), self._processor.eos_id()
            if min(pad_id, eos_id) < 0:
                raise ValueError(
                    f"the sentencepiece model has pad id {pad_id} and eos id {eos_id}, and both "
                    "are needed: train it with pad_id=0, eos_id=1, unk_id=2, as T5 has them"
                )
            special = SpecialIds(pad_id, (eos_id,), after=(eos_id,))
        else:
            self._dropped = frozenset((*special.ends, self._processor.unk_id()))
        self.special = special
        self.chat: bool | None = None
        self.vocab_size: int = self._processor.vocab_size()
        self.pad_id, self.end_ids, self.eos_id = special.pad, special.ends, special.ends[0]
        self._joined = joined
        self._added = {text: self._processor.piece_to_id(text) for text in added}

    def encode(self, text: str) -> TokenizedText:
        """Splits a text into tokens.

        Args:
            text: any text. Spans refer to it as it is, before the model's own normalisation.

        Returns:
            The tokens of `text`, without an end token.
        """
        ids: list[int] = []
        spans: list[Span] = []
        at = 0
        for part in control_pattern(self._added).split(text) if self._added else [text]:
            if part in self._added:
                ids.append(self._added[part])
                spans.append((at, at + len(part)))
            else:
                processor = self._following if at else self._processor
                found = processor.encode(part, return_type="offset_mapping")
                ids += found["ids"]
                offsets = self._spans(found["ids"], found["offsets"])
                spans += [(at + start, at + end) for start, end in offsets]
            at += len(part)
        return TokenizedText(text, tuple(ids), tuple(spans))

    def encode_prompt(self, inputs: Inputs) -> tuple[int, ...]:
        """What the model is given for a text.

        Args:
            inputs: a text.

        Returns:
            Its ids, with what stands in front of a prompt and behind it.

        Raises:
            ValueError: it is a conversation.
        """
        return prompt_ids(self, inputs)

    def encode_template(self, text: str, mark: str = "") -> tuple[int, ...]:
        """Splits a rendered chat template, in which control pieces are control tokens.

        Args:
            text: what the template has made.
            mark: is taken out, after the control pieces were found; see `split_controls`.

        Returns:
            The ids, nothing added.
        """

        def encode(piece: str, first: bool) -> Sequence[int]:
            return (self._processor if first else self._following).encode(piece)

        return split_controls(text, mark, self.controls, encode)

    def decode(self, ids: Sequence[int]) -> TokenizedText:
        """Turns token ids into text.

        Args:
            ids: token ids. Padding, end tokens and ids beyond the sentencepiece model (T5 has
                more rows in its embedding than pieces) have no characters.

        Returns:
            The text, with a span for each of `ids`.
        """
        ids = [int(i) for i in ids]
        shown = [0 <= i < self.vocab_size and i not in self._dropped for i in ids]
        known = [i for i, here in zip(ids, shown, strict=True) if here]
        if not known:
            return TokenizedText("", tuple(ids), ((0, 0),) * len(ids))
        found = self._processor.decode(known, return_type="offset_mapping")
        spans = iter(self._spans(known, found["offsets"]))
        empty = (len(found["text"]), len(found["text"]))
        return TokenizedText(
            found["text"], tuple(ids), tuple(next(spans) if here else empty for here in shown)
        )

    @functools.cached_property
    def controls(self) -> Mapping[str, int]:
        """The control pieces and their ids."""
        processor = self._processor
        ids = range(self.vocab_size)
        return {processor.id_to_piece(i): i for i in ids if processor.is_control(i)}

    @functools.cached_property
    def _following(self) -> sentencepiece.SentencePieceProcessor:
        """The same model for a text that goes on after a control token."""
        if not self._joined:
            return self._processor
        model = _pb.ModelProto.FromString(self._processor.serialized_model_proto())
        model.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

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


def prompt_ids(tokenizer: Any, inputs: Inputs) -> tuple[int, ...]:
    """What a model without a chat template is given for a text.

    Args:
        tokenizer: has `special` and `encode`.
        inputs: a text.

    Returns:
        Its ids, with what stands in front of a prompt and behind it.

    Raises:
        ValueError: it is a conversation.
    """
    if not isinstance(inputs, str):
        off = "it is off: give --chat on" if tokenizer.chat is False else "the model has none"
        raise ValueError(f"'messages' are for a model's chat template, and {off}; or give 'inputs'")
    special = tokenizer.special
    return (*special.before, *tokenizer.encode(inputs).ids, *special.after)


def split_controls(
    text: str,
    mark: str,
    controls: Mapping[str, int],
    encode: Callable[[str, bool], Sequence[int]],
) -> tuple[int, ...]:
    """Token ids of a text in which control tokens are spelled out.

    Args:
        text: of a template, for one.
        mark: stands inside of what reads like a control token and is none; it is taken out once
            the control tokens are found.
        controls: the ids by their spelling.
        encode: gives the ids of a piece of text between them, which is told whether it is the
            first.

    Returns:
        The ids.

    Example:
        >>> split_controls("<s>hi <~s>", "~", {"<s>": 1}, lambda piece, first: [*piece.encode()])
        (1, 104, 105, 32, 60, 115, 62)
    """
    if not controls:
        return tuple(encode(text.replace(mark, ""), True))
    ids: list[int] = []
    for number, piece in enumerate(control_pattern(controls).split(text)):
        if number % 2:
            ids.append(controls[piece])
        elif piece:
            ids.extend(encode(piece.replace(mark, ""), number == 0))
    return tuple(ids)


def control_pattern(controls: Mapping[str, int]) -> re.Pattern[str]:
    """Matches any control token as a group, the longest where several begin alike."""
    names = sorted(controls, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, names))})")


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


_pb: Any = sentencepiece_model_pb2  # its names are made when it is imported
