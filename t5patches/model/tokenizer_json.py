"""A `tokenizer.json` of any kind, through the `tokenizers` library, with the characters of tokens.

The library gives ids and text. The characters of each token are worked out here, so that every
byte of a character has that character, a space belongs to the token that carries it, and what a
normalizer puts in front of a text has none.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from t5patches.model.tokenizer import (
    Inputs,
    Span,
    SpecialIds,
    TokenizedText,
    prompt_ids,
    split_controls,
)

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACES = ("▁", "Ġ")  # how pieces spell a space
_MOST_IDS = 2**24
_SECONDS = 2.0  # for a line of text


class JsonTokenizer:
    """A `tokenizer.json`.

    The text of a control token (`</s>`, `<|im_end|>`) in a text is spelled like any other text:
    no input and no output turns into a control token by what it says. (In a Unigram model special
    tokens are pieces like others, and are found.) Added tokens that are not special (runs of
    spaces, `<tool_call>`) are found in it.

    Attributes:
        special: the ids that stand for no text.
        controls: the special tokens' ids, for `encode_template`.
    """

    def __init__(self, content: bytes, ends: Sequence[int], before: str = ""):
        """Reads a tokenizer.

        Args:
            content: of the file.
            ends: the ids that end an output, the one that is put behind a text first.
            before: the token in front of a prompt, nothing for none, where no post-processor of the
                file says what stands there.

        Raises:
            ValueError: the library cannot read it, it lacks that token, or it does not get through
                a line of text in time.
        """
        with _panics_are_errors():
            tokenizer: Any = tokenizers.Tokenizer.from_buffer(content)
            # What is cut off or filled up is decided elsewhere.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            first = _put_before(tokenizer, before)
            # A post-processor may take the spaces at a token's ends off its characters.
            tokenizer.post_processor = None
            tokenizer.encode_special_tokens = True
            added = tokenizer.get_added_tokens_decoder()
            vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self._tokenizer = tokenizer
        self.controls: Mapping[str, int] = {
            token.content: i for i, token in added.items() if token.special and token.content
        }
        self.special = SpecialIds(-1, tuple(ends), first)
        self.chat: bool | None = None
        self.pad_id, self.end_ids, self.eos_id = -1, tuple(ends), ends[0]
        self._silent = frozenset(self.controls.values()) | frozenset(ends)
        # Some hold special tokens beyond the model's embedding: for images, say.
        spelled = (i for i in vocabulary.values() if i not in self._silent)
        self.vocab_size: int = 1 + max((*spelled, *ends, *first), default=-1)
        if self.vocab_size > _MOST_IDS:
            raise ValueError(f"it has an id {self.vocab_size - 1}: no model has so many")
        decoder = tokenizer.decoder
        self._decoder = decoder
        self._steps = _steps(decoder)
        self._pieces: dict[int, bytes] = {}
        self._following_: Any = None
        self._try_out()

    def encode(self, text: str) -> TokenizedText:
        """Splits a text into tokens.

        Args:
            text: any text. Spans refer to it as it is, before any normalisation.

        Returns:
            The tokens of `text`, without a token in front or at the end.

        Raises:
            ValueError: the tokenizer has no tokens for it.
        """
        with _panics_are_errors():
            found = self._tokenizer.encode(text, add_special_tokens=False)
        return TokenizedText(text, tuple(found.ids), _spans(text, found.tokens, found.offsets))

    def encode_prompt(self, inputs: Inputs) -> tuple[int, ...]:
        """What the model is given for a text.

        Args:
            inputs: a text.

        Returns:
            Its ids, with what stands in front of a prompt.

        Raises:
            ValueError: it is a conversation.
        """
        return prompt_ids(self, inputs)

    def encode_template(self, text: str, mark: str = "") -> tuple[int, ...]:
        """Splits a rendered chat template, in which special tokens are control tokens.

        Args:
            text: what the template has made.
            mark: is taken out, after the control tokens were found; see `split_controls`.

        Returns:
            The ids, nothing added.
        """

        def encode(piece: str, first: bool) -> Sequence[int]:
            tokenizer = self._tokenizer if first else self._following()
            return tokenizer.encode(piece, add_special_tokens=False).ids

        with _panics_are_errors():
            if mark and mark in text:
                for token in self._tokenizer.get_added_tokens_decoder().values():
                    if token.content in self.controls and (token.lstrip or token.rstrip):
                        # As the library does below, it takes the spaces beside it.
                        before = r"(?<!\s)\s*" if token.lstrip else ""
                        after = r"\s*" if token.rstrip else ""
                        pattern = f"{before}({re.escape(token.content)}){after}"
                        text = re.sub(pattern, r"\1", text)
                return split_controls(text, mark, self.controls, encode)
            self._tokenizer.encode_special_tokens = False
            try:
                return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
            finally:
                self._tokenizer.encode_special_tokens = True

    def decode(self, ids: Sequence[int]) -> TokenizedText:
        """Turns token ids into text.

        Args:
            ids: token ids. Special tokens, end tokens and ids that are no token have no
                characters.

        Returns:
            The text that the library gives, with a span for each of `ids`.
        """
        ids = [int(i) for i in ids]
        shown = [0 <= i < self.vocab_size and i not in self._silent for i in ids]
        known = [i for i, here in zip(ids, shown, strict=True) if here]
        with _panics_are_errors():
            text = self._tokenizer.decode(known, skip_special_tokens=False) if known else ""
            found = iter(self._decoded_spans(known, text))
        spans, at = [], 0
        for here in shown:
            spans.append(next(found) if here else (at, at))
            at = spans[-1][1]
        return TokenizedText(text, tuple(ids), tuple(spans))

    def _decoded_spans(self, ids: Sequence[int], text: str) -> list[Span]:
        """The characters of each token of a decoded text."""
        pieces = [self._piece(i) for i in ids]
        if "ByteFallback" in self._steps:
            pieces = _whole_runs(pieces, [self._token(i) for i in ids])
        places, joined = _places(b"".join(pieces))
        # Of the first or the last token, a decoder may leave a space out.
        if joined.endswith(text):
            shift = len(joined) - len(text)
        elif joined.startswith(text):
            shift = 0
        else:
            return self._spans_by_prefixes(ids, text)
        spans: list[Span] = []
        byte = at = 0
        for piece in pieces:
            start, end = at + shift, at + shift
            if piece:
                start, end = places[byte][0], places[byte + len(piece) - 1][1]
            start, at = (min(max(0, place - shift), len(text)) for place in (start, end))
            spans.append((start, at))
            byte += len(piece)
        return spans

    def _spans_by_prefixes(self, ids: Sequence[int], text: str) -> list[Span]:
        """The same where tokens read otherwise beside others: by what each of them adds."""
        ends = [0]
        for count in range(1, len(ids) + 1):
            begun = self._tokenizer.decode(ids[:count], skip_special_tokens=False)
            pairs = enumerate(zip(begun, text, strict=False))
            alike = next((n for n, (a, b) in pairs if a != b), min(len(begun), len(text)))
            ends.append(max(ends[-1], alike))
        return list(itertools.pairwise(ends))

    def _token(self, i: int) -> str:
        return self._tokenizer.id_to_token(i) or ""

    def _piece(self, i: int) -> bytes:
        """What a token adds to a text, in bytes."""
        if i not in self._pieces:
            token = self._token(i)
            byte = _BYTE.fullmatch(token) if "ByteFallback" in self._steps else None
            if byte:
                self._pieces[i] = bytes([int(byte[1], 16)])
            elif "ByteLevel" in self._steps:
                spelled = all(character in _OF_BYTE for character in token)
                self._pieces[i] = (
                    bytes(_OF_BYTE[character] for character in token) if spelled else token.encode()
                )
            else:
                self._pieces[i] = self._between(token).encode()
        return self._pieces[i]

    def _between(self, token: str) -> str:
        """The text of a token that is neither the first nor the last."""
        if self._decoder is None:
            return f" {token}"  # the library joins tokens so
        before, after = self._decoder.decode(["a"]), self._decoder.decode(["a", "a"])
        text = self._decoder.decode(["a", token, "a"])
        return text[len(before) : len(text) - (len(after) - len(before))]

    def _following(self) -> Any:
        """The same tokenizer for a text that goes on after a control token."""
        if self._following_ is None:
            found = json.loads(self._tokenizer.to_str())
            steps = json.dumps(found["pre_tokenizer"])
            found["pre_tokenizer"] = json.loads(steps, object_hook=_never_first)
            self._following_ = tokenizers.Tokenizer.from_str(json.dumps(found))
            self._following_.encode_special_tokens = True
        return self._following_

    def _try_out(self) -> None:
        """Refuses a file that a text stops at: a stranger's regular expression may run on and on.

        The library gives up on one that goes back and forth in one place; each line here has so
        few places that the rest ends.
        """
        for sample in _SAMPLES:
            for length in (8, 16, 32, 64):
                began = time.monotonic()
                self.encode((sample * length)[:length] + "!\n")
                if time.monotonic() - began > _SECONDS:
                    raise ValueError(
                        f"it takes more than {_SECONDS:g} s to split {length} characters: a "
                        "regular expression in it goes back and forth without end"
                    )


_SAMPLES = ("a", " ", "1", "aB", "a ", "\n", "é", "-", "日")


@contextlib.contextmanager
def _panics_are_errors() -> Iterator[None]:
    """What goes wrong in the library becomes a `ValueError`; its panics are no `Exception`."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library says: {error}".splitlines()[0]) from error


def _put_before(tokenizer: Any, before: str) -> tuple[int, ...]:
    """What stands in front of a prompt."""
    if _steps(tokenizer.post_processor) - {"ByteLevel"}:  # which says nothing of it
        found = tokenizer.encode("a")
        added = found.special_tokens_mask
        count = next((n for n, special in enumerate(added) if not special), 0)
        return tuple(found.ids[:count])
    if before and tokenizer.token_to_id(before) is None:
        raise ValueError(f"it lacks {before!r}, which is to stand in front of a prompt")
    return (tokenizer.token_to_id(before),) if before else ()


def _never_first(step: dict[str, Any]) -> dict[str, Any]:
    """A step without the space that it puts in front of a text."""
    return step | {"prepend_scheme": "never"} if step.get("prepend_scheme") == "first" else step


def _steps(part: Any) -> frozenset[str]:
    """The kinds of steps in a decoder or a post-processor."""
    if part is None:
        return frozenset()
    found = json.loads(part.__getstate__())
    steps = found.get("decoders", found.get("processors", [found]))
    return frozenset(step["type"] for step in steps)


def _spans(text: str, tokens: Sequence[str], offsets: Sequence[Span]) -> tuple[Span, ...]:
    """The characters of each token of a text that was split."""
    spans: list[Span] = []
    at = 0
    for token, (start, end) in zip(tokens, offsets, strict=True):
        # A space that the tokenizer has put in front of a text: the library gives it the first
        # character.
        put = token and not token.strip("".join(_SPACES)) and not _is_space(text[start:end])
        if put:
            spans.append((at, at))
            continue
        gap = text[at:start]
        if gap.isspace():  # dropped by a normalizer: it belongs to the word behind it
            start = at
        elif gap and spans:  # a normalizer has dropped it, or put it and what is before it together
            spans[-1] = (spans[-1][0], start)
        spans.append((start, end))
        at = max(at, end)
    if spans and text[at:].strip():
        spans[-1] = (spans[-1][0], len(text.rstrip()))
    return tuple(spans)


def _is_space(piece: str) -> bool:
    return piece.isspace() or any(space in piece for space in _SPACES)


def _whole_runs(pieces: list[bytes], tokens: Sequence[str]) -> list[bytes]:
    """Bytes in a row that spell no text become a replacement character each, as in the library."""
    pieces, start = list(pieces), 0
    while start < len(tokens):
        end = start
        while end < len(tokens) and _BYTE.fullmatch(tokens[end]):
            end += 1
        try:
            b"".join(pieces[start:end]).decode()
        except UnicodeDecodeError:
            pieces[start:end] = ["\ufffd".encode()] * (end - start)
        start = max(end, start + 1)
    return pieces


def _places(data: bytes) -> tuple[list[Span], str]:
    r"""The character of each byte, and the text; what is no UTF-8 is a replacement character.

    Example:
        >>> _places(b"a\xc3\xa9\xff")
        ([(0, 1), (1, 2), (1, 2), (2, 3)], 'aé�')
    """
    places: list[Span] = []
    text = ""
    while len(places) < len(data):
        rest = data[len(places) :]
        try:
            whole, wrong = rest.decode(), 0
        except UnicodeDecodeError as error:
            whole, wrong = rest[: error.start].decode(), error.end - error.start
        for character in whole:
            places += [(len(text), len(text) + 1)] * len(character.encode())
            text += character
        if wrong:
            places += [(len(text), len(text) + 1)] * wrong
            text += "\ufffd"
    return places, text


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level piece stands for.

    Printable bytes of Latin 1 stand for themselves, the others for the characters from 256 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(other)}


_OF_BYTE = _byte_alphabet()
