"""The tokenizer of a Hugging Face folder, and its chat template.

**A decoder-only model's** is its `tokenizer.json`, whatever its kind, or else a sentencepiece
`tokenizer.model`, or else GPT-2's `vocab.json` and `merges.txt`, both with the added tokens that
the files beside them name. What stands in front of a prompt, the post-processor of
`tokenizer.json` says, or else `add_bos_token` of `tokenizer_config.json`. Whether a text gets a
space in front, `add_prefix_space` there says where it is true or false and the tokenizer's class is
one that goes by it (GPT-2's, GPT-NeoX's, Qwen's and Llama's, but not of a Mistral), or else the
tokenizer's own file.

**A T5's** is its `spiece.model`, or `tokenizer.json` made into one. That says in JSON what the
sentencepiece model says: pieces with scores, and the table of the text's normalisation. It becomes
a sentencepiece model in memory, so that both files give the same ids and the same characters of
tokens, and white space is split as T5's own code splits it.

Tokens that were added to it are those of `tokenizer.json`, of `added_tokens.json` and of
`tokenizer_config.json`. A text is split at them, and each piece between two is a text of its own.

The sentinels of span corruption (`<extra_id_0>` and so on) are added tokens too. Beside a
`spiece.model`, `extra_ids` of `tokenizer_config.json` says how many there are, or else the files
that list added tokens do; where neither does and the model has none of its own, there are 100, or
as many as the embedding has rows for. They are put at its end, the last one first, as in T5.

Three differences to the `tokenizers` library stay. White space beside a sentinel is a token here,
as in T5's own code; the library drops it. Added tokens are found in a text as it is, and not in
what its normalisation makes of it. And a tab or a line's end counts as a space where the table of
normalisation says so, which every published T5's does.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from t5patches.model.chat import (
    CHATS,
    COPY_AGAIN,
    ChatSource,
    ChatTemplate,
    ChatTokenizer,
    read_template,
)
from t5patches.model.huggingface import read_config
from t5patches.model.protocol import ModelConfig
from t5patches.model.t5.model import T5
from t5patches.model.tokenizer import SentencePieceTokenizer, SpecialIds, Tokenizer
from t5patches.runs.files import read_object, read_regular

pb: Any = sentencepiece_model_pb2  # its names are made when it is imported
_Piece = pb.ModelProto.SentencePiece
_PAD, _END = "<pad>", "</s>"
_SENTINEL = re.compile(r"▁?<extra_id_\d+>")  # mT5's begin with a space
_SENTINELS = 100  # of T5
_MOST_SENTINELS = 100_000
_MOST_BYTES = 2**28  # the largest known have 2**25
# Of a T5's, and of any kind.
_T5_CLASSES = ("T5Tokenizer", "MT5Tokenizer", "PreTrainedTokenizer", "TokenizersBackend")
_OF_T5 = ("spiece.model", "tokenizer.json")  # the first that is there is taken
_OF_DECODERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (*_OF_T5, *_OF_DECODERS[1:], "merges.txt")
_OF_FAMILIES = {  # the library's classes, where a folder names none
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}
_SPACED = (*_OF_FAMILIES.values(), "LlamaTokenizer")  # they go by `add_prefix_space`
_GPT2_END = "<|endoftext|>"  # where a folder of GPT-2's names no other


def load_tokenizer(folder: str | os.PathLike[str], *, chat: str = "auto") -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Args:
        folder: with `spiece.model` or `tokenizer.json` for a T5; `tokenizer.json`,
            `tokenizer.model`, or `vocab.json` with `merges.txt` for any other model. Without a
            `config.json` it is a T5's.
        chat: "on" for prompts that are put into the folder's chat template, "off" for plain ones,
            "auto" for the template where there is one.

    Returns:
        The tokenizer.

    Raises:
        ValueError: there is none, it cannot be read, or it is of another model; there is no chat
            template and it is to be used, or it fails.
        NotImplementedError: a T5's tokenizer is of another kind than T5's (ByT5's has bytes for
            pieces), or `vocab.json` and `merges.txt` are of another than GPT-2's.
    """
    folder = Path(folder)
    template, config = _template(folder, chat), _decoder_config(folder)
    if config is None:
        if not any((folder / name).exists() for name in _OF_T5):
            kind = _class(_said(folder), "T5Tokenizer")
            if kind not in _T5_CLASSES:
                raise NotImplementedError(
                    f"{folder}: its tokenizer is a {kind}, and of T5 models only those with T5's "
                    "own kind are known (T5, Flan-T5, mT5): take one of them"
                )
        return _first(folder, _OF_T5, (_t5_from_spiece, _t5_from_json))
    said = _said(folder)
    if getattr(config, "family", "") == "mistral":  # the library takes its files as they are
        said = {"legacy": True} | said | {"add_prefix_space": None}
    tokenizer: Any = _first(
        folder,
        _OF_DECODERS,
        (
            lambda path: _decoder_from_json(path, said, config),
            lambda path: _decoder_from_model(path, said, config),
            lambda path: _decoder_from_merges(path, said, config),
        ),
    )
    _check_ends(tokenizer, said, config, folder)
    if template is None:
        return tokenizer
    if chat == "off":
        tokenizer.chat = False
        return tokenizer
    extra = said.get("extra_special_tokens")
    named = {**said, **extra} if isinstance(extra, dict) else said
    names = {name: _content(value) for name, value in named.items() if name.endswith("_token")}
    names = {name: content for name, content in names.items() if content is not None}
    return ChatTokenizer(tokenizer, ChatTemplate(template, names))


def uses_chat(folder: str | os.PathLike[str], chat: str) -> bool | None:
    """What `load_tokenizer(folder, chat=chat).chat` is; the tokenizer is not read.

    Args:
        folder: of a model.
        chat: "auto", "on" or "off".

    Returns:
        Whether prompts are put into the folder's chat template; None where it has none.

    Raises:
        ValueError: there is none, and it is to be used.
    """
    return None if _template(Path(folder), chat) is None else chat != "off"


def _template(folder: Path, chat: str) -> ChatSource | None:
    """The chat template that may be used here: a T5 has none."""
    if chat not in CHATS:
        raise ValueError(f"chat is {chat!r}: one of {', '.join(CHATS)} is needed")
    of_t5 = _decoder_config(folder) is None
    found = None if of_t5 else read_template(folder, used=chat != "off")
    if found is None and chat == "on":
        raise ValueError(
            f"{folder} has no chat template for --chat on (chat_template.jinja, or chat_template "
            "in tokenizer_config.json, of a decoder-only model): leave it out"
        )
    return found


def _decoder_config(folder: Path) -> ModelConfig | None:
    """Of a decoder-only model; None for a T5."""
    if not (folder / "config.json").exists():
        return None
    model = read_config(folder)
    return None if isinstance(model, T5) else model.config


def _first(folder: Path, names: Sequence[str], reads: Sequence[Callable[[Path], Any]]) -> Any:
    """What is read of the first of some files that is there."""
    for name, read in zip(names, reads, strict=True):
        if (folder / name).exists():
            try:
                return read(folder / name)
            except NotImplementedError as error:
                raise NotImplementedError(f"{folder / name}: {error}") from error
            # Where a value is none of the expected kind, anything may fail: the file is at fault.
            except (
                *(ValueError, KeyError, TypeError, IndexError, AttributeError),
                *(OSError, RecursionError, DecodeError),
            ) as error:
                raise ValueError(
                    f"{folder / name} cannot be read ({type(error).__name__}: {error}): "
                    f"{COPY_AGAIN}"
                ) from error
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no folder"
    raise ValueError(
        f"{folder} holds neither {' nor '.join(names)} (found: {found}): copy the "
        "model's own tokenizer there"
    )


def _said(folder: Path) -> dict[str, Any]:
    """What the files beside a decoder-only model's tokenizer say of it."""
    of_map, said = (
        read_object(folder / name, COPY_AGAIN) if (folder / name).exists() else {}
        for name in ("special_tokens_map.json", "tokenizer_config.json")
    )
    # The map is of the time before tokens were listed in the config, and counts more then.
    return of_map | said if "added_tokens_decoder" in said else said | of_map


def _content(token: Any) -> str | None:
    """The text of a special token, which is a text or an object."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) and found else None


def _special_tokens(said: Mapping[str, Any]) -> set[str | None]:
    """The texts that the files beside a tokenizer name as special tokens."""
    named = {_content(value) for name, value in said.items() if name.endswith("_token")}
    return named | {_content(value) for value in said.get("additional_special_tokens") or ()}


def _class(said: Mapping[str, Any], default: str) -> str:
    """The library's class of a tokenizer, of which there were two once."""
    return str(said.get("tokenizer_class") or default).removesuffix("Fast")


def _decoder_from_json(path: Path, said: Mapping[str, Any], config: ModelConfig) -> Any:
    content = _bounded(path)
    kind = _class(said, _OF_FAMILIES.get(getattr(config, "family", ""), ""))
    spaced, beside = said.get("add_prefix_space"), _added_entries(path.parent, said)
    if beside or (isinstance(spaced, bool) and kind in _SPACED):
        found = json.loads(content)
        if isinstance(spaced, bool) and kind in _SPACED:
            scheme = ("always" if said.get("legacy") is True else "first") if spaced else "never"
            _set_prefix_space(found, kind, scheme)
        _add_missing(found, {i: x for i, x in beside.items() if i < config.vocab_size})
        content = json.dumps(found, ensure_ascii=False).encode()
    return _json_tokenizer(content, said, config)


def _add_missing(found: dict[str, Any], beside: Mapping[int, Mapping[str, Any]]) -> None:
    """Adds to a `tokenizer.json` the added tokens that only the files beside it have.

    Raises:
        ValueError: a token has another id there than the library would give it.
    """
    listed = found.setdefault("added_tokens", None) or []
    there, vocabulary = {token["content"] for token in listed}, found["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    after = 1 + max((*vocabulary.values(), *(token["id"] for token in listed)), default=-1)
    for i, token in sorted(beside.items()):
        if token["content"] in there:
            continue
        if vocabulary.get(token["content"], after) != i:
            raise ValueError(
                f"it has no added token {token['content']!r}, and the files beside it have it with "
                f"the id {i}, where {vocabulary.get(token['content'], after)} is next"
            )
        after = max(after, i + 1)
        listed.append({"id": i, **token})
    found["added_tokens"] = listed


def _set_prefix_space(found: dict[str, Any], kind: str, scheme: str) -> None:
    """Makes the steps of a `tokenizer.json` those that the library's class makes.

    Args:
        found: the file, which is changed.
        kind: the class.
        scheme: where a space is put: "never", "first" (in front of a text) or "always" (behind an
            added token as well).
    """
    bytes_ = [
        step
        for step in _steps(found.get("pre_tokenizer"), "pretokenizers")
        if step["type"] == "ByteLevel"
    ]
    if kind != "LlamaTokenizer":
        for step in bytes_:
            step["add_prefix_space"] = scheme != "never"
    elif not bytes_:  # else it is Llama 3's, which only gives the class of Llama 2
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        found["normalizer"] = None
        found["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": scheme,
            "split": False,
        }
        found["decoder"] = {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([strip] if scheme != "never" else []),
            ],
        }


def _decoder_from_merges(path: Path, said: Mapping[str, Any], config: ModelConfig) -> Any:
    """GPT-2's own two files, as the `tokenizer.json` that they would be."""
    kind = _class(said, "GPT2Tokenizer")
    if kind != "GPT2Tokenizer":
        raise NotImplementedError(
            f"it is a {kind}'s, and without a tokenizer.json only GPT2Tokenizer's are known: load "
            "the folder's tokenizer with transformers and save_pretrained() it, which writes one"
        )
    lines = _bounded(path.with_name("merges.txt")).decode().splitlines()
    vocabulary = json.loads(_bounded(path))
    special = {_GPT2_END, *_special_tokens(said)} & vocabulary.keys()
    added = {vocabulary[text]: (text, True) for text in special} | _added_tokens(path.parent, said)
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    spaced = said.get("add_prefix_space") is True
    content = byte_level_json(vocabulary, merges, added, {"add_prefix_space": spaced})
    return _json_tokenizer(content.encode(), said, config)


def byte_level_json(
    vocabulary: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    added: Mapping[int, tuple[str, bool]],
    bytes_: Mapping[str, Any],
    *,
    words: Sequence[Mapping[str, Any]] = (),
    normalizer: Mapping[str, Any] | None = None,
    ignore_merges: bool = False,
    before: tuple[str, int] | None = None,
) -> str:
    """A `tokenizer.json` of byte pairs over bytes, GPT-2's kind.

    Args:
        vocabulary: ids of the pieces, added tokens among them.
        merges: pairs of pieces, the first to be joined first.
        added: tokens that are found whole, by id, and whether they are special.
        bytes_: settings of the step that spells bytes, where they are not GPT-2's.
        words: steps that cut a text before it.
        normalizer: what happens to a text first.
        ignore_merges: take a word that is a piece whole, however its pieces would join.
        before: the token in front of a text, and its id.

    Returns:
        The content of the file.
    """
    spelled = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    spelled["use_regex"] = True
    found = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": text,
                "special": special,
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
            }
            for i, (text, special) in sorted(added.items())
        ],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*words, spelled | {**bytes_}]},
        # Other libraries read it here and not in tokenizer_config.json.
        "post_processor": before and _beginning_with(*before),
        "decoder": spelled,
        "model": {
            "type": "BPE",
            "vocab": dict(vocabulary),
            "merges": [[*pair] for pair in merges],
            "ignore_merges": ignore_merges,
            "byte_fallback": False,
            "fuse_unk": False,
        },
    }
    return json.dumps(found, ensure_ascii=False)


def _beginning_with(token: str, i: int) -> dict[str, Any]:
    """The step that puts a token in front of a text, and of each of two."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [special, texts[0]],
        "pair": [special, texts[0], special, texts[1]],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
    }


def _json_tokenizer(content: bytes, said: Mapping[str, Any], config: ModelConfig) -> Any:
    from t5patches.model.tokenizer_json import JsonTokenizer  # loads a large library

    before = _content(said.get("bos_token")) if said.get("add_bos_token") is True else None
    return JsonTokenizer(content, config.end_ids, before or "")


def _decoder_from_model(path: Path, said: Mapping[str, Any], config: ModelConfig) -> Any:
    """A sentencepiece model with added tokens: special ones become control pieces."""
    model = pb.ModelProto.FromString(_bounded(path))
    if not model.pieces:
        raise ValueError("it has no pieces")
    spaced = said.get("add_prefix_space")
    if isinstance(spaced, bool) and _class(said, "") == "LlamaTokenizer":
        model.normalizer_spec.add_dummy_prefix = spaced
    # Those beyond the model's embedding are for images and the like: no text has them.
    added = {i: x for i, x in _added_entries(path.parent, said).items() if i < config.vocab_size}
    for i, token in sorted(added.items()):
        if token["lstrip"] or token["rstrip"]:
            raise NotImplementedError(
                f"its added token {token['content']!r} takes the white space beside it, which is "
                "known of a tokenizer.json alone: load the folder's tokenizer with transformers "
                "and save_pretrained() it, which writes one"
            )
        kind = _Piece.CONTROL if token["special"] else _Piece.USER_DEFINED
        _place(model, i, token["content"], kind)
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    begin = _content(said.get("bos_token")) or model.trainer_spec.bos_piece
    before = (ids[begin],) if said.get("add_bos_token", begin in ids) else ()
    ids_of_none = SpecialIds(-1, config.end_ids, before)
    # "legacy": what follows a control token begins anew, with a space in front.
    joined = said.get("legacy") is not True
    split = [token["content"] for token in added.values() if not token["special"]]
    content = model.SerializeToString()
    return SentencePieceTokenizer(content, ids_of_none, joined=joined, added=split)


def _added_tokens(folder: Path, said: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """The added tokens and whether they are special, by id."""
    entries = _added_entries(folder, said).items()
    return {i: (token["content"], token["special"]) for i, token in entries}


def _added_entries(folder: Path, said: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The added tokens that the files beside a tokenizer have, as `tokenizer.json` would."""
    named, path = _special_tokens(said), folder / "added_tokens.json"
    added = read_object(path, COPY_AGAIN) if path.exists() else {}
    found: dict[int, Mapping[str, Any]] = {i: {"content": text} for text, i in added.items()}
    found |= {int(i): token for i, token in (said.get("added_tokens_decoder") or {}).items()}
    switches = ("single_word", "lstrip", "rstrip", "normalized")
    return {
        i: {
            "content": token["content"],
            "special": bool(token.get("special")) or token["content"] in named,
            **{name: bool(token.get(name)) for name in switches},
        }
        for i, token in found.items()
        if token["content"]
    }


def _place(model: Any, i: int, content: str, kind: Any) -> None:
    """Makes an added token a piece of a sentencepiece model."""
    while len(model.pieces) < i:
        _add(model, f"<no token {len(model.pieces)}>", 0.0, _Piece.CONTROL)
    if i == len(model.pieces):
        _add(model, content, 0.0, kind)
    elif model.pieces[i].piece != content:
        raise ValueError(
            f"its piece {i} is {model.pieces[i].piece!r}, and the files beside it have "
            f"{content!r} there"
        )
    elif model.pieces[i].type in (_Piece.NORMAL, _Piece.USER_DEFINED):
        model.pieces[i].type = kind


def _check_ends(tokenizer: Any, said: Mapping[str, Any], config: ModelConfig, folder: Path) -> None:
    """Refuses a tokenizer whose special tokens are not the model's."""
    of_another = "the tokenizer is of another model, or one of these files is"
    text = _content(said.get("eos_token"))
    controls = tokenizer.controls
    if text is not None and controls.get(text, -1) not in config.end_ids:
        raise ValueError(
            f"{folder}: the tokenizer's end token is {text!r} (id {controls.get(text)}), and the "
            f"end ids of config.json and generation_config.json are {list(config.end_ids)}: "
            f"{of_another}. Where the model does end with it, add its id to eos_token_id in "
            "generation_config.json"
        )
    if config.end_id not in controls.values():
        raise ValueError(
            f"{folder}: the model's end id {config.end_id} is no special token of the tokenizer: "
            f"{of_another}"
        )
    begin = read_object(folder / "config.json", COPY_AGAIN).get("bos_token_id")
    if tokenizer.special.before and begin is not None and begin not in tokenizer.special.before:
        raise ValueError(
            f"{folder}: the tokenizer puts {tokenizer.special.before} in front of a prompt, and "
            f"bos_token_id in config.json is {begin}: {of_another}"
        )


def _bounded(path: Path) -> bytes:
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"it has {size} bytes, and no tokenizer has more than {_MOST_BYTES}")
    return read_regular(path)


def _t5_from_spiece(path: Path) -> SentencePieceTokenizer:
    content = read_regular(path)
    if not content:
        raise ValueError("the file is empty")
    model, folder = pb.ModelProto.FromString(content), path.parent
    rows = len(model.pieces) + _MOST_SENTINELS
    if (folder / "config.json").exists():
        rows = read_config(folder).config.vocab_size
    said, other = _said(folder), folder / "tokenizer.json"
    found = read_object(other, COPY_AGAIN) if other.exists() else {}
    listed = found.get("added_tokens") or ()
    added = {token["id"]: token["content"] for token in listed}
    added |= {i: text for i, (text, _) in _added_tokens(folder, said).items()}
    count, most = said.get("extra_ids"), _MOST_SENTINELS
    if count is None:
        known = [*(piece.piece for piece in model.pieces), *added.values()]
        count = 0 if listed or any(map(_SENTINEL.fullmatch, known)) else _SENTINELS
        most = max(0, rows - len(model.pieces))
    if type(count) is not int or not 0 <= count <= _MOST_SENTINELS:
        raise ValueError(
            f"the tokenizer_config.json beside it has {count!r} extra_ids: a number from 0 to "
            f"{_MOST_SENTINELS} is needed"
        )
    for i in [*reversed(range(count))][:most]:
        _add(model, f"<extra_id_{i}>", 0.0, _Piece.USER_DEFINED)
    for i, text in sorted(added.items()):
        if i < rows:
            _place(model, i, text, _Piece.USER_DEFINED)
        elif not _SENTINEL.fullmatch(text):
            raise ValueError(
                f"the files beside it add {text!r} with id {i}, and the model's embedding has "
                f"{rows} rows: resize_token_embeddings() of transformers makes more"
            )
    return _t5(model, added.values())


def _t5(model: Any, added: Iterable[str]) -> SentencePieceTokenizer:
    """The tokenizer of a sentencepiece model, some of whose pieces are added tokens."""
    found = {piece.piece for piece in model.pieces if piece.type == _Piece.USER_DEFINED}
    split = [text for text in found.intersection(added) if not _SENTINEL.fullmatch(text)]
    return SentencePieceTokenizer(model.SerializeToString(), added=split)


def _t5_from_json(path: Path) -> SentencePieceTokenizer:
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
    return _t5(model, added.values())


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
