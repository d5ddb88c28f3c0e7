"""Fourteen families of decoder-only models in Hugging Face's folders.

A family is a table of settings (which key of `config.json` is which field of `DecoderConfig`), the
fields that all its members share, and a table of names (which module of a folder is which part of
the parameter tree). What versions 4 and 5 of the library write differently, and what they leave to
be understood, is brought into one form before the settings are read:

* `rope_parameters`, of version 5, is what `rope_theta`, `rope_scaling` and a key or two of a
  family's own were. Here it has an entry for full and one for sliding layers.
* `head_dim`, `num_key_value_heads` and `layer_types` may be absent or null.
* `eos_token_id` may be a number or a list, here or in `generation_config.json`.

A sliding layer of the library sees `sliding_window` tokens, the one that asks counted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from t5patches.model.decoder.network import FULL, SLIDING, DecoderConfig, Rotary, parameters
from t5patches.model.family import Family, Setting, Tensor, choice, only, positive, size

Settings = Mapping[str, Any]

_ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "silu": "silu",
}
_MOST_LAYERS = 10_000
# A folder of a version before 4.46 may hold what is computed from the config: kept as it is.
_BUFFERS = (
    "*.rotary_emb.inv_freq",
    *(f"*.{module}.{name}" for module in ("attn", "attention") for name in ("bias", "masked_bias")),
)


def _switch(field: str, *, default: bool) -> Setting:
    return choice(field, {True: True, False: False}, default)


def _bound(field: str) -> Setting:
    """A softcap, which may be null for none: 0 here."""
    return Setting(
        field,
        lambda value: float(value) if type(value) in (int, float) and 0 <= value < 1e38 else None,
        lambda value: value,
        "a positive number is needed, or null for none",
        0.0,
    )


def _read_ids(value: Any) -> tuple[int, ...] | None:
    ids = value if isinstance(value, list) else [value]
    known = ids and all(type(i) is int and 0 <= i < 2**31 for i in ids)
    return tuple(dict.fromkeys(ids)) if known else None


def _read_layer_types(value: Any) -> tuple[str, ...] | None:
    known = isinstance(value, list) and all(kind in (FULL, SLIDING) for kind in value)
    return tuple(value) if known else None


def _read_turning(value: Any) -> tuple[bool, ...] | None:
    known = isinstance(value, list) and all(
        type(turns) is int and turns in (0, 1) for turns in value
    )
    return tuple(map(bool, value)) if known else None


def _read_rotary(said: Any) -> Rotary | None:
    if not isinstance(said, Mapping):
        return None
    # The name of each number, but for those that another scaling has.
    names = {"rope_theta": "base", "partial_rotary_factor": "share"}
    scaling = said.get("rope_type", said.get("type", "default"))
    if scaling in ("linear", "llama3"):
        names["factor"] = "factor"
    if scaling == "llama3":
        names |= {"low_freq_factor": "low", "high_freq_factor": "high"}
        names["original_max_position_embeddings"] = "positions"
    elif scaling not in ("default", "linear"):
        return None
    numbers: dict[str, Any] = {field: said.get(name) for name, field in names.items()}
    if not all(type(x) in (int, float) and 0 < x < 1e18 for x in numbers.values()):
        return None
    rotary = Rotary(**{field: float(x) for field, x in numbers.items()}, scaling=scaling)
    return None if scaling == "llama3" and rotary.low >= rotary.high else rotary


def _read_rotaries(value: Any) -> tuple[Rotary, Rotary] | None:
    full, sliding = _read_rotary(value[FULL]), _read_rotary(value[SLIDING])
    return None if full is None or sliding is None else (full, sliding)


def _write_rotary(rotary: Rotary) -> dict[str, Any]:
    said: dict[str, Any] = {"rope_type": rotary.scaling}
    if rotary.scaling != "default":
        said["factor"] = rotary.factor
    if rotary.scaling == "llama3":
        said |= {"low_freq_factor": rotary.low, "high_freq_factor": rotary.high}
        said["original_max_position_embeddings"] = rotary.positions
    return {"rope_theta": rotary.base, "partial_rotary_factor": rotary.share, **said}


def _read_whole(value: Any) -> tuple[Rotary, Rotary] | None:
    """Of heads that turn as a whole."""
    rotaries = _read_rotaries(value)
    return rotaries if rotaries and all(rotary.share == 1 for rotary in rotaries) else None


_ROTARIES = Setting(
    "rotaries",
    _read_rotaries,
    lambda value: {kind: _write_rotary(x) for kind, x in zip((FULL, SLIDING), value, strict=True)},
    "known are the rope types 'default', 'linear' (with a positive factor) and 'llama3' (with "
    "factor, low_freq_factor, high_freq_factor and original_max_position_embeddings); an older "
    "config.json calls it rope_scaling and rope_theta",
)
_COMMON: Mapping[str, Setting] = {
    "vocab_size": size("vocab_size"),
    "tie_word_embeddings": _switch("tied", default=True),
    "bos_token_id": Setting(
        "begin_id",
        lambda value: value if type(value) is int and 0 <= value < 2**31 else None,
        lambda value: value,
        "an id is needed",
    ),
    "eos_token_id": Setting(
        "end_ids",
        _read_ids,
        lambda value: value[0] if len(value) == 1 else list(value),
        "an id that ends an output is needed, or a list of them, here or in generation_config.json",
    ),
    "head_dim": size("head_dim"),
    "num_key_value_heads": size("num_kv_heads"),
    "layer_types": Setting(
        "layer_types",
        _read_layer_types,
        list,
        f"a list with {FULL!r} or {SLIDING!r} for each layer is needed",
    ),
    "is_causal": only(True),
}
_SIZES: Mapping[str, Setting] = {
    "hidden_size": size("emb_dim"),
    "intermediate_size": size("mlp_dim"),
    "num_hidden_layers": size("num_layers"),
    "num_attention_heads": size("num_heads"),
    "max_position_embeddings": size("max_positions"),
    "rope_parameters": _ROTARIES._replace(read=_read_whole),
}
_ATTENTION_BIAS = choice("attention_bias", {True: "all", False: "none"}, default=False)
_WINDOW = size("sliding_window", 0, least=0)
_GATED: Mapping[str, Setting] = {
    **_COMMON,
    **_SIZES,
    "hidden_act": choice("activation", _ACTIVATIONS, "silu"),
    "rms_norm_eps": positive("norm_eps", 1e-6),
}
_GEMMA: Mapping[str, Setting] = {
    **{name: setting for name, setting in _GATED.items() if name != "hidden_act"},
    "hidden_activation": choice("activation", _ACTIVATIONS, "gelu_pytorch_tanh"),
    "attention_bias": _ATTENTION_BIAS,
    "use_bidirectional_attention": only(False),
}
_GEMMA_2: Mapping[str, Setting] = {
    **_GEMMA,
    # The library takes no 256.0.
    "query_pre_attn_scalar": positive("query_scalar", 256.0)._replace(
        write=lambda value: int(value) if value == int(value) else value
    ),
    "attn_logit_softcapping": _bound("attention_softcap"),
    "final_logit_softcapping": _bound("logit_softcap"),
    "sliding_window": _WINDOW,
}
# The library's layers ignore Gemma 2's bound of the attention logits, whatever a config says.
_GEMMA_3: Mapping[str, Setting] = {
    **_GEMMA_2,
    "attn_logit_softcapping": Setting(
        "attention_softcap",
        lambda _: 0.0,
        lambda value: None if value else value,
        "none is known",
        0.0,
    ),
}
_QUERY_MULTIPLIER = Setting(
    "query_scalar",
    lambda value: value**-2.0 if type(value) in (int, float) and 1e-9 < value < 1e9 else None,
    lambda scalar: float(f"{scalar**-0.5:.15g}"),
    "a positive number is needed",
    1.0,
)
_TURNING = Setting(
    "turning",
    _read_turning,
    lambda turning: [int(turns) for turns in turning],
    "a list is needed, of each layer 1 where its heads turn and 0 where they do not",
)
_ONE_OR_TWO = Setting(
    "shared_norm",
    lambda value: {1: True, 2: False}.get(value) if type(value) is int else None,
    lambda shared: 1 if shared else 2,
    "1 or 2 is needed",
)


class _Names(NamedTuple):
    """Modules of a folder.

    Attributes:
        prefix: of all of them but the head: folders of a model without its head leave it out.
        layers: what comes before a layer's number.
        head: the matrix of the logits.
        top: by the part of the parameter tree, of the network.
        layer: the same, of a layer.
        transposed: whether matrices are `[outputs, inputs]`.
        two_norms: other names in a layer where its blocks read the same stream through a norm each.
    """

    prefix: str
    layers: str
    head: str
    top: Mapping[str, str]
    layer: Mapping[str, str]
    transposed: bool = True
    two_norms: Mapping[str, str] = MappingProxyType({})


_LLAMA_NAMES = _Names(
    prefix="model.",
    layers="layers",
    head="lm_head",
    top={"token_embedder": "embed_tokens", "final_norm": "norm"},
    layer={
        "pre_attention_norm": "input_layernorm",
        "pre_mlp_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    },
)
_GEMMA_2_NAMES = _LLAMA_NAMES._replace(
    layer={
        **_LLAMA_NAMES.layer,
        "post_attention_norm": "post_attention_layernorm",
        "pre_mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    }
)
_PHI_3_NAMES = _LLAMA_NAMES._replace(
    layer={
        **_LLAMA_NAMES.layer,
        "attention.qkv": "self_attn.qkv_proj",
        "mlp.gate_up": "mlp.gate_up_proj",
    }
)
_GPT2_NAMES = _Names(
    prefix="transformer.",
    layers="h",
    head="lm_head",
    top={"token_embedder": "wte", "position_embedder": "wpe", "final_norm": "ln_f"},
    layer={
        "pre_attention_norm": "ln_1",
        "pre_mlp_norm": "ln_2",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
    transposed=False,
)
_NEOX_NAMES = _Names(
    prefix="gpt_neox.",
    layers="layers",
    head="embed_out",
    top={"token_embedder": "embed_in", "final_norm": "final_layer_norm"},
    layer={
        "pre_attention_norm": "input_layernorm",
        "pre_mlp_norm": "post_attention_layernorm",
        "attention.qkv": "attention.query_key_value",
        "attention.out": "attention.dense",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    },
)
_FALCON_NAMES = _Names(
    prefix="transformer.",
    layers="h",
    head="lm_head",
    top={"token_embedder": "word_embeddings", "final_norm": "ln_f"},
    layer={
        "pre_attention_norm": "input_layernorm",
        "pre_mlp_norm": "post_attention_layernorm",
        "attention.qkv": "self_attention.query_key_value",
        "attention.out": "self_attention.dense",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    },
    two_norms={"pre_attention_norm": "ln_attn", "pre_mlp_norm": "ln_mlp"},
)
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def _tensors(names: _Names, config: DecoderConfig) -> dict[str, Tensor]:
    """The table of names for the parameters that a network has."""
    layer = dict(names.layer)
    if config.parallel and not config.shared_norm:
        layer |= names.two_norms
    out = {}
    for path, parameter in parameters(config).items():
        *parts, leaf = path
        if parts == ["head"]:
            module = names.head
        elif parts[0].startswith("layers_"):
            number, rest = parts[0].removeprefix("layers_"), ".".join(parts[1:])
            module = f"{names.prefix}{names.layers}.{number}.{layer[rest]}"
        else:
            module = names.prefix + names.top[parts[0]]
        # The head's matrix lies as the embedding does, in all of them.
        transposed = leaf == "kernel" and (names.transposed or parts == ["head"])
        shape = parameter.shape[::-1] if transposed else parameter.shape
        copies = (f"{names.head}.weight",) if config.tied and parts == ["token_embedder"] else ()
        out[f"{module}.{_LEAVES[leaf]}"] = Tensor(path, shape, transposed, copies)
    return out


def _one_rotary(said: Settings, more: Settings) -> dict[str, Any]:
    """Of all layers, as version 5 or 4 of the library says it."""
    new, old = said.get("rope_parameters") or {}, said.get("rope_scaling") or {}
    if new and old and not _repeats(new, old):
        # Where both are there the library takes the old one, and the base of neither.
        twice = f"{new}, and rope_scaling is {old}: one of the two is needed"
        return {FULL: twice, SLIDING: twice}
    found = new or old
    if isinstance(found, Mapping):
        found = {**more, **{name: value for name, value in found.items() if value is not None}}
    return {FULL: found, SLIDING: found}


def _repeats(new: Any, old: Any) -> bool:
    """Whether `rope_scaling` says nothing that `rope_parameters` does not."""
    if not isinstance(new, Mapping) or not isinstance(old, Mapping):
        return False
    names = {"type": "rope_type"}
    return all(new.get(names.get(name, name)) == value for name, value in old.items())


def _theta(said: Settings) -> dict[str, Any]:
    theta = said.get("rope_theta")
    return {"rope_theta": 10_000.0 if theta is None else theta, "partial_rotary_factor": 1.0}


def _complete(said: Settings, generation: Settings, names: Mapping[str, str]) -> dict[str, Any]:
    """What every family leaves to be understood.

    Args:
        said: by `config.json`, with the defaults of the family.
        generation: said by `generation_config.json`.
        names: what the family calls `hidden_size`, `num_attention_heads`, `num_hidden_layers`.

    Returns:
        The same with `head_dim`, `num_key_value_heads`, `layer_types` (all full, where absent), and
        the ids.
    """
    out = dict(said)
    width, heads, layers = (
        value if type(value := said.get(names.get(name, name))) is int else 0
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    if out.get("head_dim") is None and heads > 0 and width % heads == 0:
        out["head_dim"] = width // heads
    if out.get("num_key_value_heads") is None:
        out["num_key_value_heads"] = heads
    if out.get("layer_types") is None:
        out["layer_types"] = [FULL] * (layers if layers <= _MOST_LAYERS else 0)
    ends = [x for x in (said.get("eos_token_id"), generation.get("eos_token_id")) if x is not None]
    if ends:
        out["eos_token_id"] = [i for x in ends for i in (x if isinstance(x, list) else [x])]
        if out.get("bos_token_id") is None:
            # The first token of all was behind the end of a text in training.
            out["bos_token_id"] = next(iter(out["eos_token_id"]), None)
    return out


def _sliding(out: dict[str, Any], kinds: Callable[[int], bool]) -> None:
    """Says which layers slide, where `layer_types` was absent."""
    if out.get("sliding_window"):
        out["layer_types"] = [
            SLIDING if kinds(i) else FULL for i, _ in enumerate(out["layer_types"])
        ]


def _complete_llama(found: Settings, generation: Settings) -> dict[str, Any]:
    out = _complete({**found, "layer_types": None}, generation, {})
    return out | {"rope_parameters": _one_rotary(found, _theta(found))}


def _complete_mistral(found: Settings, generation: Settings) -> dict[str, Any]:
    out = _complete_llama({"sliding_window": 4096, **found}, generation)
    if found.get("layer_types") is None:
        _sliding(out, lambda _: True)
        return out
    return out | {"layer_types": found["layer_types"]}  # Ministral's


def _complete_qwen(found: Settings, generation: Settings) -> dict[str, Any]:
    found = {"sliding_window": 4096, "max_window_layers": 28, **found}
    if not found.get("use_sliding_window"):
        found |= {"sliding_window": None}
    out = _complete(found, generation, {}) | {"rope_parameters": _one_rotary(found, _theta(found))}
    first = found["max_window_layers"]
    if found.get("layer_types") is None and type(first) is int:
        _sliding(out, lambda i: i >= first)
    return out


def _complete_qwen_3(found: Settings, generation: Settings) -> dict[str, Any]:
    return _complete_qwen({"head_dim": 128, **found}, generation)


def _complete_smollm_3(found: Settings, generation: Settings) -> dict[str, Any]:
    found = {"num_key_value_heads": 4, "rope_theta": 2_000_000.0, **found}
    if not found.get("use_sliding_window"):
        found |= {"sliding_window": None}
    out = _complete(found, generation, {}) | {"rope_parameters": _one_rotary(found, _theta(found))}
    turning, every = found.get("no_rope_layers"), found.get("no_rope_layer_interval", 4)
    if turning is None and type(every) is int and every > 0:
        turning = [int((i + 1) % every > 0) for i, _ in enumerate(out["layer_types"])]
    if isinstance(turning, list):
        turning = turning[: len(out["layer_types"])]  # the library reads no more of it
        if found.get("layer_types") is None:
            _sliding(out, lambda i: turning[i : i + 1] == [0])
    return out | {"no_rope_layers": turning}


def _complete_phi_3(found: Settings, generation: Settings) -> dict[str, Any]:
    found = {"sliding_window": None, **found, "layer_types": None}
    out = _complete_mistral(found, generation)
    share = found.get("partial_rotary_factor")
    more = _theta(found) | ({} if share is None else {"partial_rotary_factor": share})
    return out | {"rope_parameters": _one_rotary(found, more)}


def _complete_gemma(found: Settings, generation: Settings) -> dict[str, Any]:
    found = {"head_dim": 256, **found}
    act = found.get("hidden_activation") or found.get("hidden_act")
    # The first folders say "gelu" and mean, as they were trained, its approximation.
    act = "gelu_pytorch_tanh" if act in (None, "gelu") else act
    return _complete_llama(found, generation) | {"hidden_activation": act}


def _complete_gemma_2(found: Settings, generation: Settings) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    found = {"head_dim": 256, "sliding_window": 4096, **caps, **found}
    out = _complete(found, generation, {})
    out["rope_parameters"] = _one_rotary(found, _theta(found))
    if found.get("layer_types") is None:
        _sliding(out, lambda i: i % 2 == 0)
    return out


def _complete_gemma_3(found: Settings, generation: Settings) -> dict[str, Any]:
    found = {"head_dim": 256, "sliding_window": 4096, **found}
    out = _complete(found, generation, {})
    if found.get("layer_types") is None:
        pattern = found.get("sliding_window_pattern", found.get("_sliding_window_pattern", 6))
        if type(pattern) is int and pattern > 0:
            _sliding(out, lambda i: (i + 1) % pattern > 0)
        else:
            out["layer_types"] = f"by sliding_window_pattern {pattern!r}"
    said: Any = found.get("rope_parameters")
    both = isinstance(said, Mapping) and said.keys() & {FULL, SLIDING}
    bases = {FULL: ("rope_theta", 1_000_000.0), SLIDING: ("rope_local_base_freq", 10_000.0)}
    rotaries = {}
    for kind, (name, base) in bases.items():
        given = base if found.get(name) is None else found[name]
        own: Any = said[kind] if both and kind in said else {}
        if kind == FULL:  # the other one is never scaled
            scaled = found.get("rope_scaling") or (said if not both else None) or {}
            mapped = isinstance(own, Mapping) and isinstance(scaled, Mapping)
            own = {**own, **scaled} if mapped else scaled or own
        if isinstance(own, Mapping):
            own = {"rope_theta": given, "partial_rotary_factor": 1.0, **own}
        rotaries[kind] = own
    return out | {"rope_parameters": rotaries}


_GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def _four_times(out: Settings, width: str, inner: str) -> dict[str, Any]:
    """The width of a feed-forward block, where it is left out."""
    if out.get(inner) is not None or type(out.get(width)) is not int:
        return {}
    return {inner: 4 * out[width]}


def _complete_gpt2(found: Settings, generation: Settings) -> dict[str, Any]:
    found = {**found, "num_key_value_heads": None, "head_dim": None, "layer_types": None}
    return _complete(found, generation, _GPT2_KEYS) | _four_times(found, "n_embd", "n_inner")


def _complete_neox(found: Settings, generation: Settings) -> dict[str, Any]:
    found = {**found, "num_key_value_heads": None, "head_dim": None, "layer_types": None}
    theta = found.get("rotary_emb_base", found.get("rope_theta"))
    share = found.get("rotary_pct", found.get("partial_rotary_factor"))
    more = {
        "rope_theta": 10_000.0 if theta is None else theta,
        "partial_rotary_factor": 0.25 if share is None else share,
    }
    return _complete(found, generation, {}) | {"rope_parameters": _one_rotary(found, more)}


def _complete_falcon(found: Settings, generation: Settings) -> dict[str, Any]:
    found = {"multi_query": True, "parallel_attn": True, "max_position_embeddings": 2048, **found}
    new = bool(found.get("new_decoder_architecture"))
    heads = found.get("num_kv_heads") if new or not found["multi_query"] else 1
    out = _complete(
        {**found, "num_key_value_heads": heads, "head_dim": None, "layer_types": None},
        generation,
        {},
    )
    # The new architecture has no other form than the parallel one.
    out["parallel_attn"] = found["parallel_attn"] or new
    norms = found.get("num_ln_in_parallel_attn")
    if not new:
        norms = 1 if out["parallel_attn"] else 2
    out |= {"num_ln_in_parallel_attn": 2 if norms is None else norms}
    out |= _four_times(found, "hidden_size", "ffn_hidden_size")
    return out | {
        "mlp_bias": found.get("bias"),
        "rope_parameters": _one_rotary(found, _theta(found)),
    }


def _without(settings: Settings, *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _as_version_4(settings: Settings) -> dict[str, Any]:
    """Positions in the keys that both versions read."""
    said = dict(settings["rope_parameters"][FULL])
    out = _without(settings, "rope_parameters") | {"rope_theta": said.pop("rope_theta")}
    del said["partial_rotary_factor"]
    return out | {"rope_scaling": None if said["rope_type"] == "default" else said}


def _written_llama(settings: Settings) -> dict[str, Any]:
    out = _without(_as_version_4(settings), "layer_types")
    if "sliding_window" in out:
        out["sliding_window"] = out["sliding_window"] or None
    return out


def _written_mistral(settings: Settings) -> dict[str, Any]:
    kinds, out = settings["layer_types"], _written_llama(settings)
    of_one_kind = {*kinds} == {SLIDING if settings["sliding_window"] else FULL}
    return out if of_one_kind else out | {"layer_types": kinds}


def _written_qwen(settings: Settings) -> dict[str, Any]:
    kinds, window = settings["layer_types"], settings["sliding_window"]
    sliding = SLIDING in kinds
    first = kinds.index(SLIDING) if sliding else len(kinds)
    return _as_version_4(settings) | {
        "use_sliding_window": sliding,
        "sliding_window": window or None,
        "max_window_layers": first,
    }


# The library's own id may be beyond a vocabulary.
_NO_PADDING: Settings = {"pad_token_id": None}


def _written_smollm_3(settings: Settings) -> dict[str, Any]:
    return _as_version_4(settings) | {
        "use_sliding_window": SLIDING in settings["layer_types"],
        "sliding_window": settings["sliding_window"] or None,
        "no_rope_layers": settings["no_rope_layers"] or [1] * settings["num_hidden_layers"],
        **_NO_PADDING,
    }


def _written_phi_3(settings: Settings) -> dict[str, Any]:
    share = settings["rope_parameters"][FULL]["partial_rotary_factor"]
    return _written_llama(settings) | {"partial_rotary_factor": share, **_NO_PADDING}


def _written_gemma(settings: Settings) -> dict[str, Any]:
    # Its library reads the one or the other, by its version.
    return _written_llama(settings) | {"hidden_act": settings["hidden_activation"]}


def _written_gemma_2(settings: Settings) -> dict[str, Any]:
    out = _as_version_4(settings)
    optional = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
    return out | {name: settings[name] or None for name in optional}


def _written_gemma_3(settings: Settings) -> dict[str, Any]:
    sliding = settings["rope_parameters"][SLIDING]
    if sliding["rope_type"] == "default":
        local = {"rope_local_base_freq": sliding["rope_theta"]}
        return _written_gemma_2(settings) | local
    # Version 4 has no words for this.
    return _written_gemma_2(settings) | {"rope_parameters": settings["rope_parameters"]}


def _written_gpt2(settings: Settings) -> dict[str, Any]:
    return _without(settings, "num_key_value_heads", "head_dim", "layer_types")


def _written_neox(settings: Settings) -> dict[str, Any]:
    out = _written_gpt2(_as_version_4(settings))
    share = settings["rope_parameters"][FULL]["partial_rotary_factor"]
    return out | {"rotary_emb_base": out.pop("rope_theta"), "rotary_pct": share}


def _written_falcon(settings: Settings) -> dict[str, Any]:
    heads, kv = settings["num_attention_heads"], settings["num_key_value_heads"]
    two = settings["parallel_attn"] and settings["num_ln_in_parallel_attn"] == 2
    new = two or kv not in (1, heads)
    out = _without(_written_gpt2(_as_version_4(settings)), "mlp_bias", "num_ln_in_parallel_attn")
    return out | {
        "new_decoder_architecture": new,
        "multi_query": kv == 1,
        "num_kv_heads": kv,
        "num_ln_in_parallel_attn": (2 if two else 1) if new else None,
    }


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A family's tables.

    Attributes:
        architecture: the library's class.
        settings: see `Family`.
        fields: of the config, which all members share.
        complete: see `Family`.
        written: see `Family`.
        names: of the modules.
    """

    architecture: str
    settings: Settings
    fields: Settings
    complete: Callable[[Settings, Settings], Settings]
    written: Callable[[Settings], Settings]
    names: _Names = _LLAMA_NAMES


_UNTIED: Settings = {"tie_word_embeddings": _switch("tied", default=False)}
_LAYER_NORM: Settings = {"norm": "layer", "norm_bias": True, "gated": False}
_GEMMA_FIELDS: Settings = {"norm_offset": 1.0, "scaled_embedding": True}
_NORM_EPS = positive("norm_eps", 1e-5)

KINDS: Mapping[str, _Kind] = {
    "llama": _Kind(
        "LlamaForCausalLM",
        {**_GATED, **_UNTIED, "attention_bias": _ATTENTION_BIAS}
        | {"mlp_bias": _switch("mlp_bias", default=False)},
        {},
        _complete_llama,
        _written_llama,
    ),
    "mistral": _Kind(
        "MistralForCausalLM",
        {**_GATED, **_UNTIED, "sliding_window": _WINDOW},
        {},
        _complete_mistral,
        _written_mistral,
    ),
    "qwen2": _Kind(
        "Qwen2ForCausalLM",
        {**_GATED, **_UNTIED, "sliding_window": _WINDOW},
        {"attention_bias": "qkv"},
        _complete_qwen,
        _written_qwen,
    ),
    "qwen3": _Kind(
        "Qwen3ForCausalLM",
        {**_GATED, **_UNTIED, "sliding_window": _WINDOW, "attention_bias": _ATTENTION_BIAS},
        {"qk_norm": "heads"},
        _complete_qwen_3,
        _written_qwen,
    ),
    "smollm3": _Kind(
        "SmolLM3ForCausalLM",
        {**_GATED, "attention_bias": _ATTENTION_BIAS}
        | {"mlp_bias": _switch("mlp_bias", default=False)}
        | {"sliding_window": _WINDOW, "no_rope_layers": _TURNING},
        {},
        _complete_smollm_3,
        _written_smollm_3,
    ),
    "olmo2": _Kind(
        "Olmo2ForCausalLM",
        {**_GATED, **_UNTIED, "attention_bias": _ATTENTION_BIAS, "rms_norm_eps": _NORM_EPS},
        {"norms": "after", "qk_norm": "whole"},
        _complete_llama,
        _written_llama,
        _GEMMA_2_NAMES,
    ),
    "granite": _Kind(
        "GraniteForCausalLM",
        {**_GATED, **_UNTIED, "attention_bias": _ATTENTION_BIAS}
        | {"mlp_bias": _switch("mlp_bias", default=False)}
        | {"attention_multiplier": _QUERY_MULTIPLIER}
        | {"embedding_multiplier": positive("embedding_multiplier", 1.0)}
        | {"residual_multiplier": positive("residual_multiplier", 1.0)}
        | {"logits_scaling": positive("logit_divisor", 1.0)},
        {},
        _complete_llama,
        _written_llama,
    ),
    "phi3": _Kind(
        "Phi3ForCausalLM",
        {**_GATED, **_UNTIED, "rms_norm_eps": _NORM_EPS, "rope_parameters": _ROTARIES}
        | {"sliding_window": _WINDOW},
        {"qkv": "blocks", "gate_up": "blocks"},
        _complete_phi_3,
        _written_phi_3,
        _PHI_3_NAMES,
    ),
    "gemma": _Kind("GemmaForCausalLM", _GEMMA, _GEMMA_FIELDS, _complete_gemma, _written_gemma),
    "gemma2": _Kind(
        "Gemma2ForCausalLM",
        _GEMMA_2,
        {**_GEMMA_FIELDS, "norms": "both"},
        _complete_gemma_2,
        _written_gemma_2,
        _GEMMA_2_NAMES,
    ),
    "gemma3_text": _Kind(
        "Gemma3ForCausalLM",
        _GEMMA_3,
        {**_GEMMA_FIELDS, "norms": "both", "qk_norm": "heads"},
        _complete_gemma_3,
        _written_gemma_3,
        _GEMMA_2_NAMES,
    ),
    "gpt2": _Kind(
        "GPT2LMHeadModel",
        {
            **_COMMON,
            "n_embd": size("emb_dim"),
            "n_inner": size("mlp_dim"),
            "n_layer": size("num_layers"),
            "n_head": size("num_heads"),
            "n_positions": size("max_positions"),
            "activation_function": choice("activation", _ACTIVATIONS, "gelu_new"),
            "layer_norm_epsilon": _NORM_EPS,
            "scale_attn_weights": only(True),
            "scale_attn_by_inverse_layer_idx": only(False),
            "add_cross_attention": only(False),
        },
        {**_LAYER_NORM, "qkv": "blocks", "attention_bias": "all", "mlp_bias": True}
        | {"rotaries": None},
        _complete_gpt2,
        _written_gpt2,
        _GPT2_NAMES,
    ),
    "gpt_neox": _Kind(
        "GPTNeoXForCausalLM",
        {
            **_COMMON,
            **_SIZES,
            **_UNTIED,
            "rope_parameters": _ROTARIES,
            "hidden_act": choice("activation", _ACTIVATIONS, "gelu"),
            "layer_norm_eps": _NORM_EPS,
            "use_parallel_residual": _switch("parallel", default=True),
            "attention_bias": choice("attention_bias", {True: "all", False: "none"}, default=True),
        },
        {**_LAYER_NORM, "qkv": "groups", "mlp_bias": True},
        _complete_neox,
        _written_neox,
        _NEOX_NAMES,
    ),
    "falcon": _Kind(
        "FalconForCausalLM",
        {
            **_COMMON,
            **{name: setting for name, setting in _SIZES.items() if name != "intermediate_size"},
            "ffn_hidden_size": size("mlp_dim"),
            "activation": choice("activation", _ACTIVATIONS, "gelu"),
            "layer_norm_epsilon": _NORM_EPS,
            "bias": _ATTENTION_BIAS,
            "mlp_bias": _switch("mlp_bias", default=False),
            "parallel_attn": _switch("parallel", default=True),
            "num_ln_in_parallel_attn": _ONE_OR_TWO,
            "alibi": only(False),
            "apply_residual_connection_post_layernorm": only(False),
        },
        {**_LAYER_NORM, "qkv": "groups"},
        _complete_falcon,
        _written_falcon,
        _FALCON_NAMES,
    ),
}


def families(make: Callable[[DecoderConfig], Any]) -> dict[str, Family]:
    """The families by name.

    Args:
        make: a model of a config.

    Returns:
        As `t5patches.model.huggingface` takes them.
    """

    def family(name: str, kind: _Kind) -> Family:
        return Family(
            name=name,
            model_types=(name,),
            settings=kind.settings,
            tensors=functools.partial(_tensors, kind.names),
            model=lambda **fields: make(DecoderConfig(name, **{**kind.fields, **fields})),
            layers=lambda config: config.num_layers,
            constants={"architectures": [kind.architecture], "model_type": name},
            complete=kind.complete,
            written=kind.written,
            unused=_BUFFERS,
            prefix=kind.names.prefix,
        )

    return {name: family(name, kind) for name, kind in KINDS.items()}
