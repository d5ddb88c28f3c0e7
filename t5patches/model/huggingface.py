"""Hugging Face T5 folders in and out: `config.json` beside safetensors, whole or in shards.

T5 1.0, T5 1.1 and Flan-T5 (`"model_type": "t5"`) and mT5 (`"mt5"`). Neither torch nor transformers
is needed. Everything that is wrong with a folder is told at once, before a tensor is read.

One table (`_tensors`) says which tensor is which parameter; reading and writing both go by it.

Two generations of config files say the same thing differently, and one of them contradicts the
weights beside it:

* `tie_word_embeddings` false means for T5 that the logits have their own matrix and no scale. The
  library's version 5 writes it as true for every model and puts `scale_decoder_outputs` beside it,
  which is what counts where it is present.
* mT5 always has its own matrix, whatever the config says.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from t5patches.model.t5.network import T5Config
from t5patches.runs.files import read_regular, require_own_file, whole_folder, write_file

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_ACTIVATIONS = {
    "relu": ("relu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-silu": ("silu", "linear"),
    "gated-relu": ("relu", "linear"),
}
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "emb_dim",
    "num_heads": "num_heads",
    "num_layers": "num_encoder_layers",
    "num_decoder_layers": "num_decoder_layers",
    "d_kv": "head_dim",
    "d_ff": "mlp_dim",
}
# What `t5patches.network` computes and no field of T5Config changes.
_FIXED = {
    "is_encoder_decoder": True,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
_SHARED = "shared.weight"
_HEAD = "lm_head.weight"
_SHARED_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# In the files of the first T5s, and used by no version of the original library.
_UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
# Files that hold weights in some other format: stale beside edited ones, so never copied.
_OTHER_WEIGHTS = {".bin", ".h5", ".msgpack", ".ot", ".pt", ".pth", ".ckpt", ".onnx", ".gguf"}


class _Tensor(NamedTuple):
    """A tensor of a folder and the parameter it is."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False


class _Stored(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def load_checkpoint(folder: str | os.PathLike) -> tuple[T5Config, dict[str, Any]]:
    """Reads a Hugging Face T5 folder.

    Args:
      folder: with `config.json` and `model.safetensors`, or shards and
        `model.safetensors.index.json`.

    Returns:
      The `T5Config` (computing in float32) and the parameters for `t5patches.network.Transformer`:
      nested dicts of float32 numpy arrays, whatever type the file holds (bfloat16 and float16 widen
      without loss).

    Raises:
      ValueError: naming everything that is wrong: a missing or unreadable file, a config value that
        this network cannot express, missing, unknown or misshapen tensors, weights that are not
        finite, files that are not of the folder.

    Example:
      >>> import tempfile, pathlib, jax, jax.numpy as jnp
      >>> from t5patches.model.t5.network import T5Config, Transformer
      >>> config = T5Config(vocab_size=8, emb_dim=4, num_heads=1, head_dim=4, mlp_dim=4,
      ...                   num_encoder_layers=1, num_decoder_layers=1)
      >>> ids = jnp.ones((1, 3), jnp.int32)
      >>> params = Transformer(config).init(jax.random.key(0), ids, ids, ids,
      ...                                   enable_dropout=False)['params']
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     folder = pathlib.Path(directory, 'model')
      ...     save_checkpoint(folder, config, params)
      ...     loaded_config, loaded = load_checkpoint(folder)
      >>> loaded_config == config
      True
      >>> jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, params))
      True
    """
    folder = Path(folder)
    config, stored = _inspect(folder)
    flat = {}
    for name, tensor in _tensors(config).items():
        x = _read_shared(config, stored) if name == _SHARED else _read_tensor(name, stored[name])
        flat[tensor.path] = x.T if tensor.transposed else x
    return config, traverse_util.unflatten_dict(flat)


def inspect_checkpoint(folder: str | os.PathLike) -> T5Config:
    """Checks a Hugging Face T5 folder without reading its weights.

    Args:
      folder: as for `load_checkpoint`.

    Returns:
      The `T5Config`.

    Raises:
      ValueError: as `load_checkpoint`, all but what only the weights' values show.
    """
    return _inspect(Path(folder))[0]


def save_checkpoint(
    output: str | os.PathLike,
    config: T5Config,
    params: Mapping[str, Any],
    *,
    like: str | os.PathLike | None = None,
    files: Mapping[str, str | bytes] | None = None,
    without: Collection[str] = (),
) -> None:
    """Writes a Hugging Face T5 folder, whole or not at all.

    The folder is made under another name beside `output` and renamed once complete.

    Args:
      output: the folder to make; it must not exist.
      config: of the model.
      params: its parameters, the tree under `'params'`.
      like: the folder the model came from: its config, shards, names and types of the tensors are
        kept, and its other files (tokenizer, generation settings) are copied; weights in other
        formats are not. Without it the folder holds a config and one float32 file.
      files: more files for the folder, in the place of those copied.
      without: names of files of `like` that are not copied.

    Raises:
      ValueError: where `output` exists, `params` do not fit `config` or are not finite, `config`
        does not fit the folder `like`, or a value is too large for the type it is stored as.
      OSError: where the disk is full, say; nothing is left of the attempt.

    Example:
      >>> import tempfile, pathlib, jax, jax.numpy as jnp
      >>> from t5patches.model.t5.network import T5Config, Transformer
      >>> config = T5Config(vocab_size=8, emb_dim=4, num_heads=1, head_dim=4, mlp_dim=4,
      ...                   num_encoder_layers=1, num_decoder_layers=1)
      >>> ids = jnp.ones((1, 3), jnp.int32)
      >>> params = Transformer(config).init(jax.random.key(0), ids, ids, ids,
      ...                                   enable_dropout=False)['params']
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     folder = pathlib.Path(directory, 'model')
      ...     save_checkpoint(folder, config, params)
      ...     sorted(path.name for path in folder.iterdir())
      ['config.json', 'model.safetensors']
    """
    tensors = _tensors(config)
    flat = traverse_util.flatten_dict(dict(params))
    _check_params(tensors, flat)
    host = {name: np.asarray(flat[tensor.path]) for name, tensor in tensors.items()}
    values = {name: x.T if tensors[name].transposed else x for name, x in host.items()}
    try:
        with whole_folder(output) as partial:
            if like is None:
                _write_new(partial, config, values)
            else:
                _write_like(partial, config, values, Path(like), {*without, *(files or ())})
            for name, content in (files or {}).items():
                write_file(partial / name, content)
            _read_back(partial, output)
    except SafetensorError as error:
        raise OSError(f"{output} cannot be written: {error}") from error


def _read_back(folder: Path, output: str | os.PathLike) -> None:
    """Makes sure that what was written can be read: all that it should hold, and finite."""
    try:
        for name, stored in _inspect(folder)[1].items():
            _read_tensor(name, stored)
    except ValueError as error:
        raise ValueError(f"{output} is not written, as it could not be read: {error}") from error


def _inspect(folder: Path) -> tuple[T5Config, dict[str, _Stored]]:
    config = read_config(folder)
    stored = _read_headers(folder)
    layers = config.num_encoder_layers + config.num_decoder_layers
    if layers > len(stored):
        raise ValueError(
            f"{folder / 'config.json'} speaks of {layers} layers, and the weights have no more "
            f"than {len(stored)} tensors: it is of another model."
        )
    _check_headers(folder, config, stored)
    return config, stored


def _tensors(config: T5Config) -> dict[str, _Tensor]:
    """Every tensor of a folder by name: which parameter it is, its shape in the folder."""
    joined, width = config.num_heads * config.head_dim, config.emb_dim
    out = {_SHARED: _Tensor(("token_embedder", "embedding"), (config.vocab_size, width))}
    if not config.logits_via_embedding:
        head = ("decoder", "logits_dense", "kernel")
        out[_HEAD] = _Tensor(head, (config.vocab_size, width), transposed=True)

    def norm(name: str, *path: str) -> None:
        out[f"{name}.weight"] = _Tensor((*path, "scale"), (width,))

    def linear(name: str, features: int, inputs: int, *path: str) -> None:
        out[f"{name}.weight"] = _Tensor((*path, "kernel"), (features, inputs), transposed=True)

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
        out[positions] = _Tensor(biases, (32, config.num_heads), transposed=True)
    return out


def _stacks(config: T5Config) -> Iterator[tuple[str, int, list[tuple[str, str, str]]]]:
    """Each side's name, depth and the parts of a block: their name there, here, and their norm."""
    mlp = ("DenseReluDense", "mlp", "pre_mlp_layer_norm")
    attention = ("SelfAttention", "attention", "pre_attention_layer_norm")
    yield "encoder", config.num_encoder_layers, [attention, mlp]
    own = ("SelfAttention", "self_attention", "pre_self_attention_layer_norm")
    cross = ("EncDecAttention", "encoder_decoder_attention", "pre_cross_attention_layer_norm")
    yield "decoder", config.num_decoder_layers, [own, cross, mlp]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no folder: give a Hugging Face T5 folder.")
    try:
        found = json.loads(read_regular(path))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give a Hugging Face T5 folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object; got {type(found).__name__}.")
    return found


def read_config(folder: str | os.PathLike) -> T5Config:
    """Reads a folder's `config.json` alone.

    Args:
      folder: it lies in.

    Returns:
      The `T5Config`.

    Raises:
      ValueError: naming everything in it that this network cannot express.
    """
    path = Path(folder) / "config.json"
    found = _read_json(path)
    wrong = []
    if found.get("model_type") not in ("t5", "mt5"):
        wrong.append(f'model_type is {found.get("model_type")!r}; known are "t5" and "mt5"')
    if found.get("num_decoder_layers") is None:
        found["num_decoder_layers"] = found.get("num_layers")
    wrong += [
        f"{name} is {found.get(name)!r}; a positive whole number is needed"
        for name in _SIZES
        if type(found.get(name)) is not int or found[name] < 1
    ]
    wrong += [
        f"{name} is {found[name]!r}; only {value!r} is known"
        for name, value in _FIXED.items()
        if found.get(name) is not None and found[name] != value
    ]
    if found.get("quantization_config"):
        wrong.append("quantization_config is set; only plain weights are known")
    default = "gated-gelu" if found.get("model_type") == "mt5" else "relu"
    activation = found.get("feed_forward_proj", default)
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        wrong.append(f"feed_forward_proj is {activation!r}; known are {sorted(_ACTIVATIONS)}")
    rate = found.get("dropout_rate", 0.1)
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
        wrong.append(f"dropout_rate is {rate!r}; a number from 0 to below 1 is needed")
    if wrong:
        raise ValueError(f"{path} describes a model that cannot be read: " + "; ".join(wrong) + ".")
    scaled = found.get("scale_decoder_outputs", found.get("tie_word_embeddings", True))
    return T5Config(
        **{field: found[name] for name, field in _SIZES.items()},
        mlp_activations=_ACTIVATIONS[activation],
        dropout_rate=float(rate),
        logits_via_embedding=found["model_type"] == "t5" and bool(scaled),
    )


def _shards(folder: Path) -> list[Path]:
    """The files of the weights, which are all of the folder itself."""
    if (folder / _WEIGHTS).exists():
        names = [_WEIGHTS]
    elif (folder / _INDEX).exists():
        names = _names_in_index(folder / _INDEX)
    else:
        found = sorted(path.name for path in folder.iterdir())
        raise ValueError(
            f"{folder} holds neither {_WEIGHTS} nor {_INDEX}; it holds {found}. Weights in another "
            "format: load them with the library that wrote them and call save_pretrained(folder), "
            "which writes safetensors."
        )
    files = [folder / name for name in names]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise ValueError(f"{folder} lacks shards that its {_INDEX} names: {', '.join(absent)}.")
    for file in files:
        require_own_file(file)
    return files


def _names_in_index(index: Path) -> list[str]:
    mapping = _read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ValueError(f"{index} has no weight_map: it lists each tensor's file.")
    # Anything else than a name would be read, and the edited weights written, somewhere else.
    wrong = [f"{name!r} (of {tensor})" for tensor, name in mapping.items() if not _is_plain(name)]
    if wrong:
        raise ValueError(
            f"{index} names files that are not in its folder: {_first(wrong, 5)}. A shard goes by "
            "its name alone, such as 'model-00001-of-00002.safetensors'."
        )
    return sorted(set(mapping.values()))


def _is_plain(name: Any) -> bool:
    """Whether this is the name of a file, with no way to it."""
    if not isinstance(name, str) or name in ("", ".."):
        return False
    return name == Path(name).name and name.isprintable()


def _read_headers(folder: Path) -> dict[str, _Stored]:
    stored: dict[str, _Stored] = {}
    for file in _shards(folder):
        try:
            with safe_open(file, "np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    view = tensors.get_slice(name)
                    if name in stored:
                        raise ValueError(
                            f"{name} is in {stored[name].file.name} and in {file.name}: which of "
                            "the two is meant?"
                        )
                    stored[name] = _Stored(file, view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    return stored


def _copies(config: T5Config) -> tuple[str, ...]:
    """Names under which a folder may repeat the embedding."""
    return (*_SHARED_COPIES, _HEAD) if config.logits_via_embedding else _SHARED_COPIES


def _check_headers(folder: Path, config: T5Config, stored: Mapping[str, _Stored]) -> None:
    needed = _tensors(config)
    shapes = {name: tensor.shape for name, tensor in needed.items()}
    shapes |= dict.fromkeys(_copies(config), needed[_SHARED].shape)
    missing = needed.keys() - stored.keys()
    if any(name in stored for name in _SHARED_COPIES):
        missing -= {_SHARED}
    wrong = [f"{name} is missing" for name in sorted(missing)]
    wrong += [
        f"{name} is not part of this model"
        for name in sorted(stored.keys() - shapes.keys() - set(_UNUSED))
    ]
    for name, shape in shapes.items():
        if name in stored and stored[name].shape != shape:
            wrong.append(f"{name} has shape {stored[name].shape}, the config says {shape}")
        if name in stored and stored[name].dtype not in _DTYPES:
            wrong.append(f"{name} holds {stored[name].dtype}; known are {', '.join(_DTYPES)}")
    if wrong:
        raise ValueError(
            f"The weights in {folder} do not fit its config.json: {_first(wrong)}. The folder "
            "must be of a T5, Flan-T5 or mT5 with its language model head."
        )


def _read_tensor(name: str, stored: _Stored) -> np.ndarray:
    with safe_open(stored.file, "np") as tensors:
        x = np.asarray(tensors.get_tensor(name), np.float32)
    bad = int(x.size - np.isfinite(x).sum())
    if bad:
        raise ValueError(
            f"{name} in {stored.file} holds {bad} of {x.size} numbers that are not finite (nan or "
            "infinity): nothing that comes of them means anything. Get the model's own weights."
        )
    return x


def _read_shared(config: T5Config, stored: Mapping[str, _Stored]) -> np.ndarray:
    """The embedding, which must be the same under all its names."""
    name, *copies = [n for n in (_SHARED, *_copies(config)) if n in stored]
    shared = _read_tensor(name, stored[name])
    for copy in copies:
        if not np.array_equal(shared, _read_tensor(copy, stored[copy])):
            raise ValueError(
                f"{copy} differs from {name} in {stored[name].file.parent}, where the config says "
                "that they are one matrix. If the logits have a matrix of their own, config.json "
                'needs "tie_word_embeddings": false and no "scale_decoder_outputs".'
            )
    return shared


def _check_params(tensors: Mapping[str, _Tensor], flat: Mapping[tuple[str, ...], Any]) -> None:
    shapes = {t.path: t.shape[::-1] if t.transposed else t.shape for t in tensors.values()}
    wrong = [f"{'/'.join(path)} is missing" for path in shapes if path not in flat]
    wrong += [f"{'/'.join(path)} is not in this model" for path in flat if path not in shapes]
    wrong += [
        f"{'/'.join(path)} has shape {np.shape(flat[path])}, the config says {shape}"
        for path, shape in shapes.items()
        if path in flat and np.shape(flat[path]) != shape
    ]
    if wrong:
        raise ValueError(f"params do not fit the config: {_first(wrong)}.")


def _first(wrong: Sequence[str], most: int = 20) -> str:
    more = [f"and {len(wrong) - most} more"] if len(wrong) > most else []
    return "; ".join([*wrong[:most], *more])


def _stored_as(name: str, value: Any, dtype: str) -> np.ndarray:
    value = np.asarray(value, np.float32)
    with np.errstate(over="ignore"):
        # safetensors writes the buffer as it lies in memory, so it must lie in order.
        narrow = np.ascontiguousarray(value.astype(_DTYPES[dtype]))
    if np.isinf(narrow).any() and np.isfinite(value).all():
        raise ValueError(
            f"{name} holds {np.abs(value).max():.3g}, more than {dtype} can: save without `like` "
            "for float32, or convert the original folder to float32 or bfloat16 first."
        )
    return narrow


def _write_new(folder: Path, config: T5Config, values: Mapping[str, Any]) -> None:
    activations = {v: k for k, v in _ACTIVATIONS.items()}
    chosen = tuple(config.mlp_activations)
    if chosen not in activations:
        raise ValueError(f"mlp_activations {chosen} has no name in this format: {activations}.")
    description = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "feed_forward_proj": activations[chosen],
        "dropout_rate": config.dropout_rate,
        "tie_word_embeddings": config.logits_via_embedding,
        "eos_token_id": 1,
        **_FIXED,
        **{name: getattr(config, field) for name, field in _SIZES.items()},
    }
    (folder / "config.json").write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")
    tensors = {name: _stored_as(name, value, "F32") for name, value in values.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


def _write_like(
    folder: Path,
    config: T5Config,
    values: Mapping[str, Any],
    like: Path,
    without: Collection[str],
) -> None:
    original, stored = _inspect(like)
    same = ("dtype", "dropout_rate", "float32_attention_logits")
    if original != dataclasses.replace(config, **{f: getattr(original, f) for f in same}):
        raise ValueError(f"The model is {config}; the folder {like} is of {original}.")
    values = dict.fromkeys(_copies(config), values[_SHARED]) | dict(values)
    shards = _shards(like)
    for file in shards:
        with safe_open(file, "np") as source:
            tensors = {
                name: _stored_as(name, values[name], entry.dtype)
                if name in values
                else source.get_tensor(name)
                for name, entry in stored.items()
                if entry.file == file
            }
            save_file(tensors, folder / file.name, metadata=source.metadata())
    for file in like.iterdir():
        weights = file.suffix == ".safetensors" or file.suffix in _OTHER_WEIGHTS
        left_out = weights or file.name.endswith(".bin.index.json") or file.name in without
        if file.is_file() and not left_out:
            require_own_file(file)
            shutil.copyfile(file, folder / file.name)
