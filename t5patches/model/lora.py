r"""Low-rank adapters (LoRA): what is trained is two thin matrices beside a kernel, nothing else.

.. math:: y = x W + \frac{\alpha}{r}\, (x A) B, \qquad
    W \in R^{m \times n},\; A \in R^{m \times r},\; B \in R^{r \times n}

B starts at zero, so an adapter begins as no change at all, and the model without it stays at hand:
it is the same parameters. A network's linear layers add the product where the parameters hold
`lora_a` and `lora_b` beside a `kernel` (`attached`); nothing else knows of adapters. That is three
lines of a network. Most of this module is PEFT's format and its checks, which qwix, whose adapters
go into Flax's modules as these are called, does not have; nor is the decoder such a module.

On disk an adapter is a folder of the PEFT library: `adapter_config.json` and
`adapter_model.safetensors`, with the names of the modules of the base model's own folder. It says
of which base it is, and is refused beside any other; of one that PEFT wrote, which does not say, a
warning tells.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from t5patches.model.huggingface import WEIGHT_FILES, inspect_checkpoint
from t5patches.model.protocol import LanguageModel, Params
from t5patches.runs.files import PathLike, read_regular, require_own_file, whole_folder, write_file
from t5patches.runs.fingerprints import file_fingerprint, json_fingerprint

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
A, B = "lora_a", "lora_b"
# PEFT's names: before a module's name, and after it.
_PREFIX, _SUFFIXES = "base_model.model.", {"lora_A.weight": A, "lora_B.weight": B}
_BASE = "base"  # in the metadata of the weights: the fingerprint of what they were trained beside
_FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Lora:
    r"""An adapter, before it has numbers.

    Attributes:
        rank: r, the width between the two matrices.
        alpha: the product is multiplied by alpha / r; None is r, which multiplies by 1.
        targets: a regular expression; modules in whose name it is found get an adapter. None is
            every linear layer. A name is that of the folder, such as
            `decoder.block.0.layer.0.SelfAttention.q`.
    """

    rank: int
    alpha: float | None = None
    targets: str | None = None

    def __post_init__(self) -> None:
        """Refuses what is no adapter."""
        if self.rank < 1:
            raise ValueError(f"the rank of an adapter is {self.rank}: at least 1 is needed")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(
                f"alpha of an adapter is {self.alpha}: a number above 0 is needed, as alpha / rank "
                "multiplies it"
            )
        try:
            re.compile(self.targets or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"the targets {self.targets!r:.80} are no regular expression: {error}"
            ) from error

    @property
    def scale(self) -> float:
        """What multiplies the product of the two matrices."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Adapter(NamedTuple):
    """An adapter of a folder.

    Attributes:
        lora: its rank and scale.
        params: its matrices, float32, in the places of the kernels that they belong to.
    """

    lora: Lora
    params: Params


class _Module(NamedTuple):
    """A linear layer: where its parameters are, and the sizes of its kernel."""

    path: tuple[str, ...]
    inputs: int
    features: int


def adapted(model: LanguageModel, lora: Lora) -> dict[str, _Module]:
    """The linear layers that get an adapter, by the names of their modules.

    Args:
        model: the network.
        lora: says which.

    Returns:
        Name to place and sizes.

    Raises:
        ValueError: there are none, or the rank is above what one of them can have.

    Example:
        >>> from t5patches.model.t5.model import small_t5
        >>> model = small_t5(vocab_size=8, width=4, layers=1)
        >>> list(adapted(model, Lora(rank=2, targets=r"encoder.*[.](q|v)$")))
        ['encoder.block.0.layer.0.SelfAttention.q', 'encoder.block.0.layer.0.SelfAttention.v']
    """
    modules = _modules(model)
    wanted = re.compile(lora.targets or "")
    found = {name: module for name, module in modules.items() if wanted.search(name)}
    if not found:
        some = ", ".join(list(modules)[:8])
        raise ValueError(
            f"the targets {lora.targets!r} are found in the name of none of the model's "
            f"{len(modules)} linear layers, such as {some}; embeddings, norms and the matrix of "
            "the logits take no adapter"
        )
    name, least = min(found.items(), key=lambda item: min(item[1].inputs, item[1].features))
    if lora.rank > min(least.inputs, least.features):
        raise ValueError(
            f"the rank of the adapter is {lora.rank} and the kernel of {name} has "
            f"{least.inputs} x {least.features}: a rank of at most "
            f"{min(least.inputs, least.features)} says all that can be said of it"
        )
    return found


def _modules(model: LanguageModel) -> dict[str, _Module]:
    """Every linear layer of a network but the one that makes the logits."""
    shapes = model.param_shapes()
    head = traverse_util.flatten_dict(model.head_params(shapes))
    flat = traverse_util.flatten_dict(dict(shapes))
    return {
        name.removesuffix(".weight"): _Module(tensor.path[:-1], *flat[tensor.path].shape)
        for name, tensor in model.family.tensors(model.config).items()
        if tensor.path[-1] == "kernel" and tensor.path not in head
    }


def adapter_shapes(model: LanguageModel, lora: Lora) -> Params:
    """The adapter's parameters as `jax.ShapeDtypeStruct`; none is made.

    Args:
        model: the network.
        lora: the adapter.

    Returns:
        A tree of `lora_a` `[inputs, rank]` and `lora_b` `[rank, features]`, float32.

    Raises:
        ValueError: see `adapted`.
    """
    flat = {}
    for path, inputs, features in adapted(model, lora).values():
        flat[(*path, A)] = jax.ShapeDtypeStruct((inputs, lora.rank), jnp.float32)
        flat[(*path, B)] = jax.ShapeDtypeStruct((lora.rank, features), jnp.float32)
    return traverse_util.unflatten_dict(flat)


def adapter_axes(model: LanguageModel, lora: Lora) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The logical axes of each matrix: what splits a kernel splits its adapter; the rank is whole.

    Args:
        model: the network.
        lora: the adapter.

    Returns:
        Names by path, as `LanguageModel.param_axes`.
    """
    of_params = model.param_axes()
    out: dict[tuple[str, ...], tuple[str, ...]] = {}
    for path, *_ in adapted(model, lora).values():
        inputs, features = of_params[(*path, "kernel")]
        out |= {(*path, A): (inputs, "rank"), (*path, B): ("rank", features)}
    return out


def init_adapter(model: LanguageModel, lora: Lora, seed: int) -> Params:
    """An adapter that changes nothing yet.

    Args:
        model: the network.
        lora: the adapter.
        seed: of A, which is uniform within the inverse root of its number of inputs; B is 0.

    Returns:
        The tree of `adapter_shapes`, with numbers.
    """
    key = jax.random.key(seed)
    flat = {}
    for i, (path, shape) in enumerate(
        sorted(traverse_util.flatten_dict(dict(adapter_shapes(model, lora))).items())
    ):
        bound = shape.shape[0] ** -0.5
        flat[path] = (
            jax.random.uniform(jax.random.fold_in(key, i), shape.shape, minval=-bound, maxval=bound)
            if path[-1] == A
            else jnp.zeros(shape.shape)
        )
    return traverse_util.unflatten_dict(flat)


def attached(params: Params, adapter: Params, lora: Lora) -> dict[str, Any]:
    """Parameters with an adapter, as a network takes them: nothing is copied.

    Args:
        params: of the model.
        adapter: its adapter.
        lora: its scale, with which `lora_b` is multiplied.

    Returns:
        `params` with `lora_a` and `lora_b` beside the kernels that they belong to.

    Example:
        >>> kernel, a, b = jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4))
        >>> adapter = {"out": {"lora_a": a, "lora_b": b}}
        >>> found = attached({"out": {"kernel": kernel}}, adapter, Lora(2, alpha=8.0))
        >>> sorted(found["out"]), float(found["out"]["lora_b"][0, 0])
        (['kernel', 'lora_a', 'lora_b'], 4.0)
    """
    flat = traverse_util.flatten_dict(dict(params))
    for path, x in traverse_util.flatten_dict(dict(adapter)).items():
        flat[path] = x * lora.scale if path[-1] == B else x
    return traverse_util.unflatten_dict(flat)


def merged(params: Params, adapter: Params, lora: Lora) -> dict[str, Any]:
    """Parameters of a whole model that computes what model and adapter do: ``W + scale A B``.

    Args:
        params: of the model.
        adapter: its adapter.
        lora: its scale.

    Returns:
        A tree like `params`.

    Example:
        >>> kernel, a, b = jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4))
        >>> adapter = {"out": {"lora_a": a, "lora_b": b}}
        >>> found = merged({"out": {"kernel": kernel}}, adapter, Lora(2, alpha=8.0))
        >>> float(found["out"]["kernel"][0, 0])  # 1 + 8 / 2 * 2
        9.0
    """
    flat = traverse_util.flatten_dict(dict(params))
    halves = traverse_util.flatten_dict(dict(adapter))
    for path, a in halves.items():
        if path[-1] == A:
            kernel = (*path[:-1], "kernel")
            flat[kernel] = flat[kernel] + (a @ halves[(*path[:-1], B)]) * lora.scale
    return traverse_util.unflatten_dict(flat)


def trained_shapes(model: LanguageModel, lora: Lora | None) -> Params:
    """What a run trains, as `jax.ShapeDtypeStruct`.

    Args:
        model: the network.
        lora: the adapter; None where all parameters are trained.

    Returns:
        The tree of `adapter_shapes`, or of the model's own.
    """
    return model.param_shapes() if lora is None else adapter_shapes(model, lora)


def with_trained(base: Params | None, trained: Params, lora: Lora | None) -> Params:
    """The parameters of a model in training.

    Args:
        base: of the model beneath an adapter.
        trained: like `trained_shapes`.
        lora: the adapter; None where all parameters are trained.

    Returns:
        What the network takes.
    """
    return trained if lora is None or base is None else attached(base, trained, lora)


# --- Folders --------------------------------------------------------------------------------------


def is_adapter(folder: PathLike) -> bool:
    """Whether a folder is of an adapter and of no whole model.

    Args:
        folder: any.

    Returns:
        Whether it has an `adapter_config.json` and no weights of a whole model. A `config.json`
        says nothing: some programs put the base's beside an adapter.
    """
    folder = Path(folder)
    return (folder / CONFIG).exists() and not any((folder / n).exists() for n in WEIGHT_FILES)


def require_whole(folder: PathLike) -> None:
    """Refuses an adapter where a whole model is needed.

    Args:
        folder: any.

    Raises:
        ValueError: it is an adapter's.
    """
    if is_adapter(folder):
        raise ValueError(
            f"{folder} is an adapter and no whole model: take the model that it lies beside, or "
            "one that it was merged with (--merge where it was made). `annotate --model` and "
            "`evaluate --after` take an adapter, with --base"
        )


def whole_model(folder: PathLike, base: PathLike | None) -> PathLike:
    """The folder that has the sizes and the tokenizer: the model's own, or of an adapter its base.

    Args:
        folder: of a model or an adapter.
        base: the whole model that the adapter lies beside.

    Returns:
        One of the two.

    Raises:
        ValueError: `folder` is of an adapter and `base` is not given, or is an adapter's too.
    """
    if base is not None:
        require_whole(base)
    if not is_adapter(folder):
        return folder
    if base is None:
        raise ValueError(
            f"{folder} is an adapter and no whole model: say which folder it is an adapter of "
            "(--base DIR)"
        )
    return base


def save_adapter(
    output: PathLike,
    model: LanguageModel,
    params: Params,
    lora: Lora,
    *,
    base: PathLike,
    files: Mapping[str, str | bytes] | None = None,
) -> None:
    """Writes a folder of the PEFT library, whole or not at all.

    Args:
        output: the folder to make; it must not exist.
        model: the network.
        params: of the adapter.
        lora: its rank and scale.
        base: the folder of the model that it was trained beside.
        files: more files for the folder.

    Raises:
        ValueError: `output` exists, or `params` are not finite.
    """
    tensors = model.family.tensors(model.config)
    modules, flat = adapted(model, lora), traverse_util.flatten_dict(dict(params))
    values = {
        f"{_PREFIX}{name}.{suffix}": np.ascontiguousarray(
            np.asarray(flat[(*module.path, half)], np.float32).T
        )
        for name, module in modules.items()
        for suffix, half in _SUFFIXES.items()
    }
    wrong = [name for name, value in values.items() if not np.isfinite(value).all()]
    if wrong:
        raise ValueError(
            f"{output} is not written: {wrong[0]} holds numbers that are not finite (nan or "
            f"infinity), as {len(wrong)} of its {len(values)} matrices do. Train it with other "
            "settings, such as a lower learning rate"
        )
    alpha = lora.rank if lora.alpha is None else lora.alpha
    config = {
        "peft_type": "LORA",
        "task_type": model.family.task,
        "base_model_name_or_path": os.fspath(base),
        "r": lora.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        # Of a Conv1D, whose kernel lies the other way round.
        "fan_in_fan_out": not all(tensors[f"{name}.weight"].transposed for name in modules),
        "inference_mode": True,
    }
    metadata = {"format": "pt", _BASE: weights_fingerprint(base)}
    with whole_folder(output) as partial:
        write_file(partial / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_file(partial / WEIGHTS, _in_order(save(values, metadata)))
        for name, content in (files or {}).items():
            write_file(partial / name, content)


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata by name: the library writes that in any order."""
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    said = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return content[:8] + said.ljust(size - 8) + content[size:]


def load_adapter(folder: PathLike, base: PathLike) -> Adapter:
    """Reads a folder of the PEFT library; the base's weights are not read.

    A warning tells where the adapter does not say of which base it is.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        base: the folder of the model that it is an adapter of.

    Returns:
        The adapter.

    Raises:
        ValueError: naming everything that is wrong: a file cannot be read, a setting is none that
            an adapter here has, matrices are missing, of other sizes or not finite; or the adapter
            is of another base.
    """
    folder = Path(folder)
    lora, named, wrong = _read_config(folder / CONFIG)
    model = inspect_checkpoint(base)
    values, metadata = _read_weights(folder / WEIGHTS)
    trained_beside = metadata.get(_BASE)
    if trained_beside is not None and trained_beside != weights_fingerprint(base):
        raise ValueError(
            f"{folder} is no adapter of {base}: it was trained beside other weights. Give the "
            "model that it was made from"
        )
    modules, flat = _modules(model), {}
    for name, value in sorted(values.items()):
        module, half = _named(name)
        if module not in modules or half is None:
            wrong.append(f"{name} belongs to no linear layer of the model in {base}")
            continue
        path, inputs, features = modules[module]
        shape = (lora.rank, inputs) if half == A else (features, lora.rank)
        if value.shape != shape or value.dtype not in _FLOATS:
            wrong.append(f"{name} is {value.dtype} {value.shape} and {shape} of floats is needed")
        elif not np.isfinite(value).all():
            wrong.append(f"{name} holds numbers that are not finite")
        flat[(*path, half)] = np.asarray(value, np.float32).T
    for path in {path[:-1] for path in flat}:
        wrong += [f"{'/'.join(path)} has no {h}" for h in (A, B) if (*path, h) not in flat]
    if not values:
        wrong.append(f"{WEIGHTS} is empty")
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(f"{folder} cannot be read: {'; '.join(wrong[:20])}{more}.")
    if trained_beside is None:
        _warn_of_any_base(folder, base, named)
    return Adapter(lora, traverse_util.unflatten_dict(flat))


def _warn_of_any_base(folder: Path, base: PathLike, named: Any) -> None:
    """An adapter of PEFT's own fits every model of the same sizes, and has but a name of its."""
    alike = isinstance(named, str) and Path(named).name == Path(base).resolve().name
    so = "and its weights may be others" if alike else "make sure that this is the same model"
    # At this place, so that it is told once however often the folder is read.
    warnings.warn(
        f"{folder} has no fingerprint of the model that it was trained beside (PEFT writes none) "
        f"and is taken as an adapter of {base}; its {CONFIG} names {named!r:.200}: {so}",
        stacklevel=1,
    )


def weights_fingerprint(folder: PathLike) -> str:
    """What tells the weights of two model folders apart.

    Args:
        folder: of a model.

    Returns:
        64 hexadecimal digits, of the contents of its safetensors files.

    Raises:
        ValueError: see `weight_fingerprints`.
    """
    return json_fingerprint(sorted(weight_fingerprints(folder).values()))


def weight_fingerprints(folder: PathLike) -> dict[str, str]:
    """The same file by file.

    Args:
        folder: of a model.

    Returns:
        The fingerprint of each of its safetensors files, by name.

    Raises:
        ValueError: one of them is no file of the folder itself.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    for file in files:
        require_own_file(file)
    return {file.name: file_fingerprint(file) for file in files}


# What a setting of PEFT must be, where it is there, for the formula above to be the whole adapter.
_NEEDED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "lora_bias": (False, None),
    # Where it began. All others take from the base what they begin with: it is another base then.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "layer_replication": (None, []),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
}


def _read_config(path: Path) -> tuple[Lora, Any, list[str]]:
    """The rank and scale, how the base is called, and what of the file cannot be done."""
    try:
        require_own_file(path)
        found = json.loads(read_regular(path))
        wrong = [
            f"{name} is {found[name]!r}; only {' or '.join(map(repr, needed))} is known"
            for name, needed in _NEEDED.items()
            if name in found and found[name] not in needed
        ]
        rank, alpha = found["r"], found.get("lora_alpha", 8)  # PEFT's default
        if type(rank) is not int or type(alpha) not in (int, float):
            raise ValueError(f"r is {rank!r} and lora_alpha {alpha!r}: numbers are needed")
        return Lora(rank, float(alpha)), found.get("base_model_name_or_path"), wrong
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def _read_weights(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        require_own_file(path)
        with safe_open(path, "np") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    # For what numpy has no type for, such as numbers of eight bits, its own error comes.
    except (SafetensorError, OSError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. An adapter lies in {WEIGHTS}; where there is "
            "another format, load it with PEFT and call save_pretrained(folder)"
        ) from error


def _named(name: str) -> tuple[str, str | None]:
    """A tensor's module, and which half of its adapter it is; None for neither."""
    module, _, suffix = name.rpartition(".lora_")
    half = _SUFFIXES.get(f"lora_{suffix}") if name.startswith(_PREFIX) else None
    return module.removeprefix(_PREFIX), half
