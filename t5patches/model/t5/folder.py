"""T5 in Hugging Face's folders: T5 1.0, T5 1.1 and Flan-T5 (`"t5"`), and mT5 (`"mt5"`).

Two generations of config files say the same thing differently, and one of them contradicts the
weights beside it:

* `tie_word_embeddings` false means for T5 that the logits have their own matrix and no scale. The
  library's version 5 writes it as true for every model and puts `scale_decoder_outputs` beside it,
  which says whether there is a scale. Without one, the logits have their own matrix if the folder
  has it, as all that were published do; a model that the library made from a config has none, and
  its embedding makes the logits.
* mT5 has no scale, whatever the config says.

`feed_forward_proj` is the name of an activation, after `gated-` or alone. `gelu` alone is the exact
one; `gated-gelu`, the one of T5 1.1, stands for the approximation that is else called `gelu_new`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from t5patches.model.family import Setting, Tensor, choice, only, positive, rate, size
from t5patches.model.t5.network import T5Config

MODEL_TYPES = ("t5", "mt5")
_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
SETTINGS: Mapping[str, Setting] = {
    "vocab_size": size("vocab_size"),
    "d_model": size("emb_dim"),
    "num_heads": size("num_heads"),
    "num_layers": size("num_encoder_layers"),
    "num_decoder_layers": size("num_decoder_layers"),
    "d_kv": size("head_dim"),
    "d_ff": size("mlp_dim"),
    "feed_forward_proj": choice(
        "mlp_activations",
        {
            "relu": ("relu",),
            "silu": ("silu",),
            "gelu": ("gelu_exact",),
            "gelu_new": ("gelu",),
            "gated-gelu": ("gelu", "linear"),
            "gated-silu": ("silu", "linear"),
            "gated-relu": ("relu", "linear"),
        },
    ),
    "dropout_rate": rate("dropout_rate", 0.1),
    "tie_word_embeddings": choice("logits_via_embedding", {True: True, False: False}),
    "scale_decoder_outputs": choice("scale_embedding_logits", {True: True, False: False}),
    "layer_norm_epsilon": positive("layer_norm_epsilon", 1e-6),
    # Half of them for each direction, and half of those for exact distances.
    "relative_attention_num_buckets": size("relative_attention_num_buckets", 32, least=4),
    "relative_attention_max_distance": size("relative_attention_max_distance", 128),
    # What `t5patches.network` computes and no field of T5Config changes.
    "is_encoder_decoder": only(True),
    **{
        name: only(i)._replace(needed=f"only {i} is known, here and in generation_config.json")
        for name, i in _TOKENS.items()
    },
}
CONSTANTS = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
}
# In the files of the first T5s, and used by no version of the original library.
UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def complete(found: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` with what it leaves to be understood.

    Args:
        found: what it says.
        generation: what `generation_config.json` says.

    Returns:
        The same with the decoder's depth, the activation, whether the logits use the embedding and
        whether that is then scaled; and with the special tokens of either file, of which an id that
        is not known here comes first.
    """
    multilingual = found["model_type"] == "mt5"
    out = {"feed_forward_proj": "gated-gelu" if multilingual else "relu", **found}
    if out.get("num_decoder_layers") is None:
        out["num_decoder_layers"] = out.get("num_layers")
    for name, known in _TOKENS.items():
        said = (i for source in (found, generation) for i in _listed(source.get(name)))
        out[name] = next((i for i in said if i != known), known)
    activation, used = out["feed_forward_proj"], out.get("dense_act_fn")
    if isinstance(activation, str) and used is not None:
        # The library derives it, unless the file says it: then that is what it computes with.
        derived = "gelu_new" if activation == "gated-gelu" else activation.removeprefix("gated-")
        if used != derived:
            out["feed_forward_proj"] = f"{activation} with dense_act_fn {used}"
    tied = True if out.get("tie_word_embeddings") is None else bool(out["tie_word_embeddings"])
    scaled = out.get("scale_decoder_outputs")
    scaled = (tied if scaled is None else bool(scaled)) and not multilingual
    # A matrix of its own is never scaled: it leaves the setting at its default.
    out |= {"tie_word_embeddings": tied or scaled, "scale_decoder_outputs": scaled or not tied}
    return out


def _listed(ids: Any) -> list[Any]:
    """Ids as a file has them: none, one or several."""
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def shown(config: T5Config, names: Collection[str]) -> dict[str, Any]:
    """What the names of the tensors tell of the config.

    Args:
        config: as `config.json` says it.
        names: of the folder's tensors.

    Returns:
        That the logits have their own matrix, where the config leaves it open and there is one.
    """
    unscaled = config.logits_via_embedding and not config.scale_embedding_logits
    if unscaled and "lm_head.weight" in names:
        return {"logits_via_embedding": False, "scale_embedding_logits": True}
    return {}


def written(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the library reads as these settings: the inverse of `complete`.

    Args:
        settings: a value for each key of `SETTINGS`.

    Returns:
        The same, but that only an embedding is scaled.
    """
    scaled = settings["tie_word_embeddings"] and settings["scale_decoder_outputs"]
    return {**settings, "scale_decoder_outputs": scaled}


def tensors(config: T5Config) -> dict[str, Tensor]:
    """Every tensor of a folder by name: which parameter it is, its shape in the folder.

    Args:
        config: of the model.

    Returns:
        The table.
    """
    joined, width = config.num_heads * config.head_dim, config.emb_dim
    embedding, head = ("token_embedder", "embedding"), ("decoder", "logits_dense", "kernel")
    copies: tuple[str, ...] = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    out = {}
    if config.logits_via_embedding:
        copies += ("lm_head.weight",)
    else:
        out["lm_head.weight"] = Tensor(head, (config.vocab_size, width), transposed=True)
    out["shared.weight"] = Tensor(embedding, (config.vocab_size, width), copies=copies)

    def norm(name: str, *path: str) -> None:
        out[f"{name}.weight"] = Tensor((*path, "scale"), (width,))

    def linear(name: str, features: int, inputs: int, *path: str) -> None:
        out[f"{name}.weight"] = Tensor((*path, "kernel"), (features, inputs), transposed=True)

    def attention(name: str, *path: str) -> None:
        for letter, part in (("q", "query"), ("k", "key"), ("v", "value")):
            linear(f"{name}.{letter}", joined, width, *path, part)
        linear(f"{name}.o", width, joined, *path, "out")

    def mlp(name: str, *path: str) -> None:
        gated = len(config.mlp_activations) > 1
        for wi in ("wi_0", "wi_1") if gated else ("wi",):
            linear(f"{name}.{wi}", config.mlp_dim, width, *path, wi)
        linear(f"{name}.wo", width, config.mlp_dim, *path, "wo")

    for side, blocks, parts in _stacks(config):
        for i in range(blocks):
            for j, (kind, module, pre_norm) in enumerate(parts):
                name, path = f"{side}.block.{i}.layer.{j}", (side, f"layers_{i}")
                norm(f"{name}.layer_norm", *path, pre_norm)
                write = mlp if kind == "DenseReluDense" else attention
                write(f"{name}.{kind}", *path, module)
        norm(f"{side}.final_layer_norm", side, f"{side}_norm")
        positions = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        biases = (side, "relpos_bias", "rel_embedding")
        out[positions] = Tensor(
            biases, (config.relative_attention_num_buckets, config.num_heads), transposed=True
        )
    return out


def _stacks(config: T5Config) -> Iterator[tuple[str, int, list[tuple[str, str, str]]]]:
    """Each side's name, depth and the parts of a block: their name there, here, and their norm."""
    mlp = ("DenseReluDense", "mlp", "pre_mlp_layer_norm")
    attention = ("SelfAttention", "attention", "pre_attention_layer_norm")
    yield "encoder", config.num_encoder_layers, [attention, mlp]
    own = ("SelfAttention", "self_attention", "pre_self_attention_layer_norm")
    cross = ("EncDecAttention", "encoder_decoder_attention", "pre_cross_attention_layer_norm")
    yield "decoder", config.num_decoder_layers, [own, cross, mlp]
