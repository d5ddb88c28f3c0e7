"""The tokenizer of a Hugging Face T5 folder: `spiece.model`, or `tokenizer.json` made into one.

A T5's `tokenizer.json` says in JSON what its sentencepiece model says: pieces with scores, and the
table of the text's normalisation. It becomes a sentencepiece model in memory, so that both files
give the same ids and the same characters of tokens. The `tokenizers` library does not: to it a
piece of white space alone has the first character of the next word (so that marking the word marks
the space), `</s>` in a text is the end token, and decoding gives no characters at all.

Two differences stay. White space beside a sentinel is a token here, as in T5's own code; the
`tokenizers` library drops it. And a tab or a line's end counts as a space where the table of
normalisation says so, which every published T5's does.

The sentinels of span corruption (`<extra_id_0>` and so on) are pieces of `tokenizer.json`. Beside
a `spiece.model` only `tokenizer_config.json` says how many there are: they are added at its end,
the last one first, as in T5.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from t5patches.model.tokenizer import SentencePieceTokenizer
from t5patches.runs.files import read_regular

pb: Any = sentencepiece_model_pb2  # its names are made when it is imported
_Piece = pb.ModelProto.SentencePiece
_PAD, _END = "<pad>", "</s>"
_MOST_SENTINELS = 100_000  # T5 has 100
TOKENIZER_FILES = ("spiece.model", "tokenizer.json")  # the first that is there is taken


def load_tokenizer(folder: str | os.PathLike[str]) -> SentencePieceTokenizer:
    """The tokenizer of a Hugging Face T5 folder.

    Args:
        folder: with `spiece.model`, or else `tokenizer.json`.

    Returns:
        The tokenizer.

    Raises:
        ValueError: there is none, or it cannot be read.
        NotImplementedError: `tokenizer.json` is of another kind than T5's.
    """
    folder = Path(folder)
    for name, read in zip(TOKENIZER_FILES, (_from_spiece, _from_json), strict=True):
        if (folder / name).exists():
            try:
                return SentencePieceTokenizer(read(folder / name))
            except NotImplementedError as error:
                raise NotImplementedError(f"{folder / name}: {error}") from error
            # Where a value is none of the expected kind, anything may fail: the file is at fault.
            except (
                *(ValueError, KeyError, TypeError, IndexError, AttributeError),
                *(OSError, RecursionError, DecodeError),
            ) as error:
                raise ValueError(
                    f"{folder / name} cannot be read ({type(error).__name__}: {error}): copy the "
                    "model's own again"
                ) from error
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no folder"
    raise ValueError(
        f"{folder} holds neither spiece.model nor tokenizer.json (found: {found}): copy the "
        "model's own tokenizer there"
    )


def _from_spiece(path: Path) -> bytes:
    content = read_regular(path)
    if not content:
        raise ValueError("the file is empty")
    sentinels = _sentinels(path.parent / "tokenizer_config.json")
    if not sentinels:
        return content
    model = pb.ModelProto.FromString(content)
    for i in reversed(range(sentinels)):
        _add(model, f"<extra_id_{i}>", 0.0, _Piece.USER_DEFINED)
    return model.SerializeToString()


def _sentinels(path: Path) -> int:
    """How many there are, by a `tokenizer_config.json`."""
    if not path.exists():
        return 0
    config = json.loads(read_regular(path))
    if not isinstance(config, dict):
        raise ValueError(f"the {path.name} beside it must hold an object, got {config!r}")
    found = config.get("extra_ids") or 0
    if type(found) is not int or not 0 <= found <= _MOST_SENTINELS:
        raise ValueError(
            f"the {path.name} beside it has {found!r} extra_ids: a number from 0 to "
            f"{_MOST_SENTINELS} is needed"
        )
    return found


def _from_json(path: Path) -> bytes:
    found = json.loads(read_regular(path))
    unigram = found["model"]
    if unigram.get("type", "Unigram") != "Unigram" or isinstance(unigram["vocab"], dict):
        raise NotImplementedError(
            f"its model is {unigram.get('type')!r} and T5's are 'Unigram': put the "
            "sentencepiece model it was made from there as spiece.model"
        )
    model = pb.ModelProto()
    _set_normalizer(model.normalizer_spec, found)
    added = {token["id"]: token["content"] for token in found.get("added_tokens") or ()}
    for i, (piece, score) in enumerate(unigram["vocab"]):
        _add(model, piece, score, _kind(i, piece, unigram, added))
    for i in range(len(unigram["vocab"]), max(added, default=-1) + 1):
        _add(model, added[i], 0.0, _Piece.USER_DEFINED)
    model.trainer_spec.model_type = pb.TrainerSpec.UNIGRAM
    model.trainer_spec.byte_fallback = bool(unigram.get("byte_fallback"))
    model.trainer_spec.unk_piece = unigram["vocab"][unigram["unk_id"]][0]
    model.trainer_spec.pad_piece, model.trainer_spec.eos_piece = _PAD, _END
    return model.SerializeToString()


def _add(model: Any, piece: str, score: float, kind: Any) -> None:
    model.pieces.add(piece=piece, score=score, type=kind)


def _kind(i: int, piece: str, unigram: dict[str, Any], added: dict[int, str]) -> Any:
    if i == unigram["unk_id"]:
        return _Piece.UNKNOWN
    if piece in (_PAD, _END):
        return _Piece.CONTROL
    if unigram.get("byte_fallback") and len(piece) == 6 and piece.startswith("<0x"):
        return _Piece.BYTE
    return _Piece.USER_DEFINED if i in added else _Piece.NORMAL


def _set_normalizer(spec: Any, found: dict[str, Any]) -> None:
    """Says what happens to a text first; refuses what sentencepiece does not do."""
    for step in _steps(found.get("normalizer"), "normalizers"):
        if step["type"] == "Precompiled":
            spec.precompiled_charsmap = base64.b64decode(step["precompiled_charsmap"])
        # Sentencepiece drops spaces at the ends and repeated ones by itself.
        elif step["type"] != "Strip" and not _joins_spaces(step):
            raise NotImplementedError(f"its normalizer {step} is none of a T5's")
    for step in _steps(found.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            always = step.get("prepend_scheme", "always") != "never"
            spec.add_dummy_prefix = always and step.get("add_prefix_space", True)
        elif step["type"] != "WhitespaceSplit":
            raise NotImplementedError(f"its pre-tokenizer {step} is none of a T5's")


def _steps(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return step[name] if step["type"] == "Sequence" else [step]


def _joins_spaces(step: dict[str, Any]) -> bool:
    return step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"}
