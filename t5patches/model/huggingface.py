"""Hugging Face model folders in and out: `config.json` beside safetensors, whole or in shards.

What a family of models calls its settings and its tensors, its own tables say (`Family`); reading
and writing both go by them. Neither torch nor transformers is needed. Everything that is wrong with
a folder is told at once, before a tensor is read.
"""

import fnmatch
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from t5patches.model.decoder import model as decoder
from t5patches.model.family import Family, Tensor
from t5patches.model.protocol import LanguageModel, differing
from t5patches.model.t5.model import T5
from t5patches.runs.files import read_object, require_own_file, whole_folder, write_file

FAMILIES: tuple[Family, ...] = (T5.family, *decoder.FAMILIES.values())

_WEIGHTS = "model.safetensors"
_LONGEST_NAME = 255  # bytes, on most file systems
_INDEX = "model.safetensors.index.json"
WEIGHT_FILES = (_WEIGHTS, _INDEX)  # the first that is there is read
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_REFUSED = {
    "quantization_config": "plain weights",
    "vision_config": "models of text alone",
    "audio_config": "models of text alone",
    "num_experts": "models without experts",
    "num_local_experts": "models without experts",
}
_MORE_TEMPLATES = "additional_chat_templates"  # a folder in the folder
# Files that hold weights in some other format: stale beside edited ones, so never copied.
_OTHER_WEIGHTS = {".bin", ".h5", ".msgpack", ".ot", ".pt", ".pth", ".ckpt", ".onnx", ".gguf"}


class _Stored(NamedTuple):
    """Where a tensor lies, and its name there."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def load_checkpoint(folder: str | os.PathLike) -> tuple[LanguageModel, dict[str, Any]]:
    """Reads a Hugging Face model folder.

    Args:
      folder: with `config.json` and `model.safetensors`, or shards and
        `model.safetensors.index.json`.

    Returns:
      The model (computing in float32) and its parameters: nested dicts of float32 numpy arrays,
      whatever type the file holds (bfloat16 and float16 widen without loss).

    Raises:
      ValueError: naming everything that is wrong: a missing or unreadable file, a config value that
        no network here can express, missing, unknown or misshapen tensors, weights that are not
        finite, files that are not of the folder.

    Example:
      >>> import tempfile, pathlib, jax
      >>> from t5patches.model.t5.model import small_t5
      >>> model = small_t5(vocab_size=8, width=4, layers=1)
      >>> params = model.init(jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     folder = pathlib.Path(directory, 'model')
      ...     save_checkpoint(folder, model, params)
      ...     loaded_model, loaded = load_checkpoint(folder)
      >>> loaded_model == model
      True
      >>> jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, params))
      True
    """
    folder = Path(folder)
    model, stored = _inspect(folder)
    flat = {}
    for name, tensor in _tensors(model).items():
        x = _read_tensor(name, tensor, stored)
        flat[tensor.path] = x.T if tensor.transposed else x
    return model, traverse_util.unflatten_dict(flat)


def inspect_checkpoint(folder: str | os.PathLike) -> LanguageModel:
    """Checks a Hugging Face model folder without reading its weights.

    Args:
      folder: as for `load_checkpoint`.

    Returns:
      The model.

    Raises:
      ValueError: as `load_checkpoint`, all but what only the weights' values show.
    """
    return _inspect(Path(folder))[0]


def save_checkpoint(
    output: str | os.PathLike,
    model: LanguageModel,
    params: Mapping[str, Any],
    *,
    like: str | os.PathLike | None = None,
    files: Mapping[str, str | bytes] | None = None,
    without: Collection[str] = (),
) -> None:
    """Writes a Hugging Face model folder, whole or not at all.

    The folder is made under another name beside `output` and renamed once complete.

    Args:
      output: the folder to make; it must not exist.
      model: the model.
      params: its parameters.
      like: the folder the model came from: its config, shards, names and types of the tensors are
        kept, and its other files (tokenizer, generation settings) are copied; weights in other
        formats are not. Without it the folder holds a config and one float32 file.
      files: more files for the folder, instead of those copied.
      without: names of files of `like` that are not copied.

    Raises:
      ValueError: where `output` exists, `params` do not fit `model` or are not finite, `model`
        does not fit the folder `like`, or a value is too large for the type it is stored as.
      OSError: where the disk is full, say; nothing is left of the attempt.

    Example:
      >>> import tempfile, pathlib, jax
      >>> from t5patches.model.t5.model import small_t5
      >>> model = small_t5(vocab_size=8, width=4, layers=1)
      >>> params = model.init(jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     folder = pathlib.Path(directory, 'model')
      ...     save_checkpoint(folder, model, params)
      ...     sorted(path.name for path in folder.iterdir())
      ['config.json', 'model.safetensors']
    """
    tensors = _tensors(model)
    flat = traverse_util.flatten_dict(dict(params))
    _check_params(tensors, flat)
    host = {name: np.asarray(flat[tensor.path]) for name, tensor in tensors.items()}
    values = {name: x.T if tensors[name].transposed else x for name, x in host.items()}
    try:
        with whole_folder(output) as partial:
            if like is None:
                _write_new(partial, model, values)
            else:
                _write_like(partial, model, values, Path(like), {*without, *(files or ())})
            for name, content in (files or {}).items():
                write_file(partial / name, content)
            _read_back(partial, output)
    except SafetensorError as error:
        raise OSError(f"{output} cannot be written: {error}") from error


def _read_back(folder: Path, output: str | os.PathLike) -> None:
    """Makes sure that what was written can be read: all that it should hold, and finite.

    What the network does not have is as it was: a mask in float16 may hold infinities.
    """
    try:
        model, stored = _inspect(folder)
        for name, tensor in _tensors(model).items():
            for copy in stored.keys() & {name, *tensor.copies}:
                _read(copy, stored[copy])
    except ValueError as error:
        raise ValueError(f"{output} is not written, as it could not be read: {error}") from error


def _inspect(folder: Path) -> tuple[LanguageModel, dict[str, _Stored]]:
    """The model, and where each tensor lies by its whole name."""
    model = read_config(folder)
    stored = _read_headers(folder)
    layers = model.family.layers(model.config)
    if layers > len(stored):
        raise ValueError(
            f"{folder / 'config.json'} speaks of {layers} layers, and the weights have no more "
            f"than {len(stored)} tensors: it is of another model."
        )
    model = model.replace(**model.family.shown(model.config, stored))
    stored = _whole_names(model, stored)
    _check_headers(folder, _tensors(model), model.family.unused, stored)
    return model, stored


def _whole_names(model: LanguageModel, stored: dict[str, _Stored]) -> dict[str, _Stored]:
    """A folder that was made without the model's head has no prefix before its names."""
    prefix = model.family.prefix
    if any(name.startswith(prefix) for name in stored):
        return stored
    known = {n for name, tensor in _tensors(model).items() for n in (name, *tensor.copies)}
    return {n if n in known else prefix + n: entry for n, entry in stored.items()}


def _tensors(model: LanguageModel) -> Mapping[str, Tensor]:
    return model.family.tensors(model.config)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no folder: give a Hugging Face model folder.")
    try:
        return read_object(path, "copy the model's own again")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give a Hugging Face model folder.") from None


def read_config(folder: str | os.PathLike) -> LanguageModel:
    """Reads a folder's `config.json`, and what `generation_config.json` says beside it.

    Args:
      folder: it lies in.

    Returns:
      The model; of what the config leaves to the names of the tensors, all that it says itself.

    Raises:
      ValueError: naming everything in it that no network here can express; or a file of the folder
        is a link that leads out of it.
    """
    path = Path(folder) / "config.json"
    _own_files(path.parent)  # here, as every way into a folder begins with its config
    generation = path.with_name("generation_config.json")
    return understand(_read_json(path), _read_json(generation) if generation.exists() else {}, path)


def understand(
    found: Mapping[str, Any], generation: Mapping[str, Any], path: str | os.PathLike
) -> LanguageModel:
    """The model that a `config.json` describes.

    Args:
      found: what it says.
      generation: what `generation_config.json` says.
      path: where that is from, for messages.

    Returns:
      See `read_config`.

    Raises:
      ValueError: naming everything in it that no network here can express.
    """
    kind = found.get("model_type")
    family = next((f for f in FAMILIES if kind in f.model_types), None)
    wrong: list[str] = []
    fields = {}
    if family is None:
        types = ", ".join(json.dumps(name) for f in FAMILIES for name in f.model_types)
        wrong.append(f"model_type is {kind!r}; known are {types}")
    else:
        found = family.complete(found, generation)
        for name, setting in family.settings.items():
            value = setting.default if found.get(name) is None else found[name]
            field = setting.read(value)
            if field is None:
                wrong.append(f"{name} is {value!r}; {setting.needed}")
            elif setting.field is not None:
                fields[setting.field] = field
    for name, these in _REFUSED.items():
        if found.get(name):
            wrong.append(f"{name} is set; only {these} are known")
    if family is not None and not wrong:
        try:
            return family.model(**fields)
        except ValueError as error:  # two settings that do not go together
            wrong.append(str(error))
    raise ValueError(f"{path} describes a model that cannot be read: " + "; ".join(wrong) + ".")


def config_file(model: LanguageModel) -> str:
    """A `config.json` of its own for a model, which says all of its config.

    Args:
      model: the model.

    Returns:
      The file, which `read_config` makes the same model of.

    Raises:
      ValueError: something in the model's config has no name in this format.
    """
    settings = {}
    for name, setting in model.family.settings.items():
        value = None if setting.field is None else getattr(model.config, setting.field)
        settings[name] = setting.write(value)
        if settings[name] is None:
            raise ValueError(
                f"{setting.field} {value} has no name in this format: for {name} {setting.needed}."
            )
    description = {**model.family.constants, **model.family.written(settings)}
    return json.dumps(description, indent=2, sort_keys=True) + "\n"


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
    return name == Path(name).name and name.isprintable() and len(name.encode()) <= _LONGEST_NAME


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
                    shape = tuple(view.get_shape())
                    stored[name] = _Stored(file, name, view.get_dtype(), shape)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    return stored


def _check_headers(
    folder: Path,
    tensors: Mapping[str, Tensor],
    unused: Sequence[str],
    stored: Mapping[str, _Stored],
) -> None:
    shapes = {n: tensor.shape for name, tensor in tensors.items() for n in (name, *tensor.copies)}
    wrong = [
        f"{name} is missing"
        for name, tensor in sorted(tensors.items())
        if not stored.keys() & {name, *tensor.copies}
    ]
    wrong += [
        f"{name} is not part of this model"
        for name in sorted(stored.keys() - shapes.keys())
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in unused)
    ]
    for name, shape in shapes.items():
        if name in stored and stored[name].shape != shape:
            wrong.append(f"{name} has shape {stored[name].shape}, the config says {shape}")
        if name in stored and stored[name].dtype not in _DTYPES:
            wrong.append(f"{name} holds {stored[name].dtype}; known are {', '.join(_DTYPES)}")
    if wrong:
        raise ValueError(
            f"The weights in {folder} do not fit its config.json: {_first(wrong)}. The folder "
            "must be of a whole model, with its language model head."
        )


def _read_tensor(name: str, tensor: Tensor, stored: Mapping[str, _Stored]) -> np.ndarray:
    """A tensor, which must be the same under all its names."""
    first, *copies = [n for n in (name, *tensor.copies) if n in stored]
    value = _read(first, stored[first])
    for copy in copies:
        if not np.array_equal(value, _read(copy, stored[copy])):
            raise ValueError(
                f"{copy} differs from {first} in {stored[first].file.parent}, where the config "
                "says that they are one matrix. If the logits have a matrix of their own, "
                'config.json needs "tie_word_embeddings": false and no "scale_decoder_outputs".'
            )
    return value


def _read(name: str, stored: _Stored) -> np.ndarray:
    with safe_open(stored.file, "np") as tensors:
        x = np.asarray(tensors.get_tensor(stored.name), np.float32)
    bad = int(x.size - np.isfinite(x).sum())
    if bad:
        raise ValueError(
            f"{name} in {stored.file} holds {bad} of {x.size} numbers that are not finite (nan or "
            "infinity): nothing that comes of them means anything. Get the model's own weights."
        )
    return x


def _check_params(tensors: Mapping[str, Tensor], flat: Mapping[tuple[str, ...], Any]) -> None:
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


def _write_new(folder: Path, model: LanguageModel, values: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(config_file(model))
    tensors = {name: _stored_as(name, value, "F32") for name, value in values.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


def _write_like(
    folder: Path,
    model: LanguageModel,
    values: Mapping[str, Any],
    like: Path,
    without: Collection[str],
) -> None:
    original, stored = _inspect(like)
    # What a folder says, but for what concerns training alone.
    said = {s.field for s in original.family.settings.values() if s.field} - {"dropout_rate"}
    if original.family is not model.family or any(
        getattr(original.config, field) != getattr(model.config, field) for field in said
    ):
        raise ValueError(
            f"The model is not of the sizes of the folder {like}: they differ in "
            f"{', '.join(differing(model.config, original.config)) or 'their family'}."
        )
    copies = {n: values[name] for name, tensor in _tensors(model).items() for n in tensor.copies}
    values = copies | dict(values)
    shards = _shards(like)
    for file in shards:
        with safe_open(file, "np") as source:
            tensors = {
                entry.name: _stored_as(name, values[name], entry.dtype)
                if name in values
                else source.get_tensor(entry.name)
                for name, entry in stored.items()
                if entry.file == file
            }
            save_file(tensors, folder / file.name, metadata=source.metadata())
    for file in _own_files(like):
        if file.name not in without:
            there = folder / file.relative_to(like)
            there.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, there)


def _own_files(folder: Path) -> list[Path]:
    """What a folder holds beside weights: config, tokenizer, card and all else that is copied.

    Raises:
      ValueError: one is a link that leads out of the folder.
    """
    if (folder / _MORE_TEMPLATES).is_symlink():
        raise ValueError(f"{folder / _MORE_TEMPLATES} is a link: put that folder itself there")
    files = [
        file
        for file in sorted([*folder.glob("*"), *folder.glob(f"{_MORE_TEMPLATES}/*.jinja")])
        if file.suffix not in {".safetensors", *_OTHER_WEIGHTS}
        and not file.name.endswith(".bin.index.json")
        and file.is_file()
    ]
    for file in files:
        require_own_file(file)
    return files
