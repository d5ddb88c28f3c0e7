"""GGUF files of Llama's and Gemma 3's kind, read as the folders that they were made of.

What the format does otherwise: the rows of Llama's query and key matrices are interleaved for its
rotary embedding, Gemma's norms are stored with the 1 that the network adds, and sizes, tokenizer
and chat template are key-value pairs of the file. Weights of 4 to 8 bits become the float32 numbers
that they stand for.
"""

from __future__ import annotations

import collections
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from sentencepiece import sentencepiece_model_pb2

from t5patches.model.decoder.network import Rotary
from t5patches.model.huggingface import understand
from t5patches.model.protocol import LanguageModel
from t5patches.model.tokenizer_files import byte_level_json

pb: Any = sentencepiece_model_pb2  # its names are made when it is imported

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {
    "llama": _LAYER | {"ffn_norm": "post_attention_layernorm"},
    "gemma3": _LAYER
    | {
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
# How a text is cut before its pieces are found, by the name that a file gives it.
_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3")
_LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS: Mapping[str, list[dict[str, Any]]] = {
    "default": [],
    "gpt-2": [],
    "smollm": [{"type": "Digits", "individual_digits": True}],
    **{
        name: [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            }
        ]
        for name, pattern in {
            **dict.fromkeys(_LLAMA_3, _LLAMA_3_WORDS),
            "qwen2": _LLAMA_3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"),
        }.items()
    },
}
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # kinds of tokens, as sentencepiece numbers them


class Gguf(NamedTuple):
    """What a GGUF file holds.

    Attributes:
        model: the network.
        params: its parameters, float32.
        files: more files of a folder: tokenizer, what is beside it, and README.md.
        types: how many numbers are stored as each type.
    """

    model: LanguageModel
    params: Mapping[str, Any]
    files: Mapping[str, str | bytes]
    types: Mapping[str, int]


def load_gguf(path: str | os.PathLike[str]) -> Gguf:
    """Reads a GGUF file.

    Args:
        path: of the file.

    Returns:
        Its model, parameters and tokenizer.

    Raises:
        ValueError: it cannot be read, is of a kind that is not known here, or lacks something; or
            the package `gguf` is missing.
    """
    try:
        import gguf
        from gguf.quants import dequantize
    except ImportError as error:
        raise ValueError("GGUF needs the package gguf: pip install 't5patches[gguf]'") from error
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    try:
        reader = gguf.GGUFReader(path)
        said = {name: field.contents() for name, field in reader.fields.items()}
        types: dict[str, int] = collections.Counter()
        found = {}
        for tensor in reader.tensors:
            value = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
            found[tensor.name] = value.reshape([int(n) for n in reversed(tensor.shape)])
            types[tensor.tensor_type.name] += value.size
    # Where a file is spoilt, anything may fail in the library that reads it.
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError) as error:
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from error
    family = said.get("general.architecture")
    if family not in _NAMES:
        raise ValueError(f"{path} is of the architecture {family!r}; known are {sorted(_NAMES)}")
    try:
        config = _config(family, said, found)
        model = understand(config, {}, path)
        params = _params(model, family, found)
        files = _tokenizer_files(said, config)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from error
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    stored = ", ".join(f"{name} ({count:,} numbers)" for name, count in sorted(types.items()))
    files["README.md"] = (
        f"Made of {path.name} by `t5patches convert`. That file holds its weights as {stored}: "
        "where that is fewer than 16 bits, they were quantised, and are the float32 numbers here "
        "that the quantised ones stand for, not those of the model before.\n"
    )
    return Gguf(model, params, files, dict(types))


def _config(family: str, said: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` that the file was made of; takes what belongs to it out of the tensors."""
    of = {
        name.removeprefix(f"{family}."): _decimal(value)
        for name, value in said.items()
        if name.startswith(f"{family}.")
    }
    heads, width = of["attention.head_count"], of["embedding_length"]
    for name in ("attention.head_count", "embedding_length"):
        if type(of[name]) is not int:
            raise ValueError(f"{family}.{name} is {of[name]!r}; a whole number is needed")
    size = of.get("attention.key_length", width // max(1, heads))
    config = {
        "model_type": {"llama": "llama", "gemma3": "gemma3_text"}[family],
        "vocab_size": len(found["token_embd.weight"]),
        "hidden_size": width,
        "intermediate_size": of["feed_forward_length"],
        "num_hidden_layers": of["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": of.get("attention.head_count_kv", heads),
        "head_dim": size,
        "max_position_embeddings": of["context_length"],
        "rms_norm_eps": of["attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": "output.weight" not in found,
        "bos_token_id": said.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_ids(said),
        "num_local_experts": of.get("expert_count"),
    }
    if of.get("rope.freq_base") is not None:
        config["rope_theta"] = of["rope.freq_base"]
    # As llama.cpp has it, under the old name too.
    factor = of.get("rope.scaling.factor", of.get("rope.scale_linear"))
    scaling = of.get("rope.scaling.type", "none" if factor is None else "linear")
    factors = found.pop("rope_freqs.weight", None)
    if factors is not None:
        config["rope_scaling"] = _llama_3(factors, of.get("rope.freq_base", 10_000.0), size)
    elif scaling != "none":
        config["rope_scaling"] = {"rope_type": scaling, "factor": factor}
    if family == "gemma3":
        window = of.get("attention.sliding_window")
        # The largest one alone scales by something else than its heads' size.
        largest = of["block_count"] == 62
        config |= {
            "sliding_window": window,
            "sliding_window_pattern": of.get("attention.sliding_window_pattern", 6),
            "rope_local_base_freq": of.get("rope.freq_base_swa"),
            "query_pre_attn_scalar": width // heads if largest else size,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": of.get("final_logit_softcapping"),
        }
    known = {
        "rope.dimension_count": size,
        "attention.causal": True,
        "attention.scale": config.get("query_pre_attn_scalar", size) ** -0.5,
        **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale"), 1.0),
    }
    for name, value in known.items():
        there = of.get(name)
        # 0 stands for what is usual, but of a switch.
        if there is None or (there == 0 and value is not True):
            continue
        if isinstance(there, int | float) and math.isclose(there, value, rel_tol=1e-5):
            continue
        raise ValueError(f"{family}.{name} is {there!r}; only {value} is known")
    return config


def _decimal(value: Any) -> Any:
    """A float32 as it was written in decimals."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _end_ids(said: Mapping[str, Any]) -> list[Any] | None:
    """Of the end of a text, and of a turn.

    Many a chat model's file names the end of a text alone; llama.cpp knows the other by its
    spelling.
    """
    names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    spelled = [
        i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == _CONTROL and token in _TURN_ENDS
    ]
    named = [said[name] for name in names if said.get(name) is not None]
    return list(dict.fromkeys([*named, *spelled])) or None


def _llama_3(factors: np.ndarray, base: float, head_dim: int) -> dict[str, Any]:
    """The scaling whose division of each frequency the file has in place of its settings."""
    factor = round(float(factors.max()), 3)
    scaled = Rotary(base, scaling="llama3", factor=factor, low=1.0, high=4.0, positions=8192)
    expected = Rotary(base).turns(head_dim) / scaled.turns(head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise ValueError(
            "rope_freqs.weight is none of Llama 3's, which are known: factor 8 or 32, say, with "
            "low_freq_factor 1, high_freq_factor 4 and 8192 positions"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _params(model: LanguageModel, family: str, found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters, by the names that a folder of the model has."""
    values, config = {}, vars(model.config)
    heads = {"attn_q": config["num_heads"], "attn_k": config["num_kv_heads"]}
    for name, value in found.items():
        module, _, leaf = name.rpartition(".")
        if module.startswith("blk."):
            _, number, module = module.split(".", 2)
            if module not in _NAMES[family]:
                raise ValueError(f"{name} is not part of a {family}")
            there = f"model.layers.{number}.{_NAMES[family][module]}.{leaf}"
        elif module in _TOP:
            there = f"{_TOP[module]}.{leaf}"
        else:
            raise ValueError(f"{name} is not part of a {family}")
        if family == "llama" and module in heads:
            # Pairs of rows are what rotates; here it is the two halves of a head.
            value = value.reshape(heads[module], -1, 2, *value.shape[1:]).swapaxes(1, 2)
            value = value.reshape(-1, *value.shape[3:])
        if family == "gemma3" and module.endswith("norm"):
            value = value - 1.0
        values[there] = value
    tensors = model.family.tensors(model.config)
    missing = sorted(tensors.keys() - values.keys())
    more = sorted(values.keys() - tensors.keys())
    if missing or more:
        raise ValueError(f"missing are the tensors {missing[:5]}, not known are {more[:5]}")
    flat = {
        tensor.path: values[name].T if tensor.transposed else values[name]
        for name, tensor in tensors.items()
    }
    return traverse_util.unflatten_dict(flat)


def _tokenizer_files(said: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str | bytes]:
    """The tokenizer, and what `tokenizer_config.json` says of it."""
    tokens, kind = said["tokenizer.ggml.tokens"], said.get("tokenizer.ggml.model")
    begin, ends = config["bos_token_id"], config["eos_token_id"]
    beside: dict[str, Any] = {"eos_token": tokens[ends[0]] if ends else None}
    begins = False
    if begin is not None:
        beside["bos_token"] = tokens[begin]
        # Where a file says nothing, sentencepiece models and Llama 3's begin with it.
        begins = kind == "llama" or said.get("tokenizer.ggml.pre") in _LLAMA_3
        begins = bool(said.get("tokenizer.ggml.add_bos_token", begins))
        beside["add_bos_token"] = begins
    if kind == "llama":
        files: dict[str, str | bytes] = {"tokenizer.model": _sentencepiece(said)}
    elif kind == "gpt2":
        files = {"tokenizer.json": _byte_level(said, begin if begins else None)}
    else:
        raise ValueError(f"its tokenizer is a {kind!r}; known are 'gpt2' and 'llama'")
    if said.get("tokenizer.chat_template"):
        beside["chat_template"] = said["tokenizer.chat_template"]
    return files | {"tokenizer_config.json": json.dumps(beside, indent=2) + "\n"}


def _byte_level(said: Mapping[str, Any], before: int | None) -> str:
    """A `tokenizer.json` of GPT-2's kind, with the token that it puts in front of a text."""
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    cut = said.get("tokenizer.ggml.pre")
    if cut is None:
        raise ValueError(
            "it does not say how texts are cut (tokenizer.ggml.pre), as files of before May 2024 "
            "do not: convert the model to GGUF anew with a present llama.cpp"
        )
    if cut not in _WORDS:
        raise ValueError(f"it cuts texts as {cut!r} does; known are {sorted(_WORDS)}")
    return byte_level_json(
        {token: i for i, token in enumerate(tokens)},
        [merge.split(" ", 1) for merge in said["tokenizer.ggml.merges"]],
        {
            i: (token, kind == _CONTROL)
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (_CONTROL, _USER_DEFINED)
        },
        {"use_regex": cut in ("default", "gpt-2", "smollm")},  # GPT-2's own expression
        words=_WORDS[cut],
        normalizer={"type": "NFC"} if cut == "qwen2" else None,
        ignore_merges=cut in _LLAMA_3,  # Llama 3 takes a word that is a token whole
        before=None if before is None else (tokens[before], before),
    )


def _sentencepiece(said: Mapping[str, Any]) -> bytes:
    """A `tokenizer.model` of Llama 2's and Gemma's kind."""
    model = pb.ModelProto()
    for token, score, kind in zip(
        said["tokenizer.ggml.tokens"],
        said["tokenizer.ggml.scores"],
        said["tokenizer.ggml.token_type"],
        strict=True,
    ):
        # llama.cpp writes Gemma's runs of spaces as the text that they stand for.
        piece = token.replace(" ", "▁") if kind == _USER_DEFINED else token
        model.pieces.add(piece=piece, score=float(score), type=int(kind))
    model.trainer_spec.model_type = pb.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(model.pieces)
    names = {"unk": "unknown", "bos": "bos", "eos": "eos", "pad": "padding"}
    for name, long in names.items():
        i = said.get(f"tokenizer.ggml.{long}_token_id")
        setattr(model.trainer_spec, f"{name}_id", -1 if i is None else int(i))
        if i is not None:
            setattr(model.trainer_spec, f"{name}_piece", said["tokenizer.ggml.tokens"][i])
        if i is not None and name == "unk":  # llama.cpp writes Gemma's as a control token
            model.pieces[i].type = _UNKNOWN
    spaced = bool(said.get("tokenizer.ggml.add_space_prefix", True))
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = spaced
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    return model.SerializeToString()
