"""Which implementation runs: decided when a program is lowered, by what it is lowered for.

One JAX primitive stands for one stage of an operation on rows of logits, in whatever program it is
traced. Its lowering rules choose the kernel or the XLA form for the platform and the device that
the program is compiled for, be it this machine's default, another one of its devices, a topology
of devices that are elsewhere, or several platforms at once (`jax.export`).
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from t5patches_kernels import checks
from t5patches_kernels.backends import chunked_linear as linear_backend
from t5patches_kernels.backends import tiling
from t5patches_kernels.backends.pallas_gpu.plan import ONE_BLOCK, BlockSizes
from t5patches_kernels.backends.xla import streaming
from t5patches_kernels.core.operation import (
    WHOLE_ROWS,
    Driver,
    Operands,
    Operation,
    Result,
    Stage,
    Tokens,
    returned,
)
from t5patches_kernels.core.statistics import Array, Stats

IMPLEMENTATIONS = ("pallas_tpu", "pallas_gpu", "xla", "reference")
Implementation = str | BlockSizes | None  # the second is "pallas_gpu" with a cluster a row
# The best by platform, where it runs; elsewhere "xla".
_BEST = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}
_KERNELS = tuple(_BEST.values())
# What JAX's clients and devices call the platforms.
_DEVICES_OF = {"tpu": ("tpu",), "cuda": ("cuda", "gpu"), "rocm": ("rocm", "gpu"), "cpu": ("cpu",)}


def check(implementation: Implementation, op: Operation) -> None:
    """Raises what can be said of an implementation before anything is traced.

    Raises:
      ValueError: there is none of that name.
      NotImplementedError: it cannot run the operation on any device.
    """
    if implementation is None or isinstance(implementation, BlockSizes):
        return
    checks.one_of("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "reference" and op.vocab_axis is not None:
        raise NotImplementedError(
            'implementation="reference": the reference is dense and takes whole rows: leave '
            'vocab_axis out and gather the logits first, or use implementation="xla".'
        )


@functools.cache  # one object a choice: programs are cached under their driver
def driver(implementation: Implementation, *, linear: bool) -> Driver:
    """The driver of an implementation, or of the best for what a program is lowered for.

    Args:
      implementation: None, or any but ``"reference"``.
      linear: whether the operands are hidden states and a head.
    """
    rows = partial(_run, implementation)
    return partial(linear_backend.run, rows) if linear else rows


def _named(implementation: Implementation) -> tuple[str | None, BlockSizes]:
    """The name of an implementation, and how the GPU kernel cuts a row up."""
    if isinstance(implementation, BlockSizes):
        return "pallas_gpu", implementation
    return implementation, ONE_BLOCK


# --- The primitive --------------------------------------------------------------------------------

_stage = Primitive("t5patches_stage")
_stage.multiple_results = True


def _run(
    implementation: Implementation,
    op: Operation,
    stage: Stage,
    operands: Operands,
    tokens: Tokens,
    stats: Stats | None = None,
    d_stats: Stats | None = None,
) -> Result:
    """The driver (`operation.Driver`) of logits."""
    interpret = None
    name, sizes = _named(implementation)
    if name in _KERNELS:
        reason = _why_not_rows(name, stage, operands, sizes)
        if reason:
            raise _cannot(implementation, reason)
        interpret = _kernel(name).INTERPRET
    leaves, tree = jax.tree.flatten((operands, tokens, stats, d_stats))
    found = _stage.bind(
        *leaves,
        implementation=implementation,
        op=op,
        stage=stage,
        tree=tree,
        interpret=interpret,
    )
    names = returned(op, stage)
    return Result(dict(zip(names, found, strict=False)), tuple(found[len(names) :]) or None)


@_stage.def_abstract_eval
def _shapes(*inputs: Any, op: Operation, stage: Stage, tree: Any, **_: Any) -> list[Any]:
    (z,) = jax.tree.unflatten(tree, inputs)[0].model
    varying = jax.sharding.ManualAxisType(varying=tiling.all_axes(inputs))
    like = partial(z.update, weak_type=False, manual_axis_type=varying)
    out = [
        like(shape=(z.shape[0], 1), dtype=jnp.dtype(bool if name == "bad" else jnp.float32))
        for name in returned(op, stage)
    ]
    gradient = like(dtype=jnp.dtype(op.gradient_dtype or z.dtype))
    return out + [gradient] * (stage in (Stage.VALUE_AND_GRAD, Stage.GRADIENT))


def _fold(inputs: Sequence[Array], axes: Sequence[int | None], **params: Any) -> tuple[Any, Any]:
    """`jax.vmap`: the batch is more rows."""
    mapped = ((x, axis) for x, axis in zip(inputs, axes, strict=True) if axis is not None)
    size, split = next((x.shape[axis], jax.typeof(x).sharding.spec[axis]) for x, axis in mapped)

    def batched(x: Array, axis: int | None) -> Array:
        if axis is not None:
            return jnp.moveaxis(x, axis, 0)
        # Where JAX tells how the mapped dimension is split, all arrays are to say the same.
        spec = None if split is None else jax.P(split, *jax.typeof(x).sharding.spec)
        return jnp.broadcast_to(x, (size, *x.shape), out_sharding=spec)

    stacked = list(map(batched, inputs, axes))
    rows = stacked[0].shape[1]  # sizes are written out: a batch of none says nothing of them
    run = partial(_stage.bind, **params)
    if split is not None:  # each device goes through its own rows
        # (What interprets a kernel cannot do so under `check_vma`.)
        check = params["implementation"] in (None, "xla")
        rows_of = jax.P(split)
        run = jax.shard_map(run, in_specs=rows_of, out_specs=rows_of, check_vma=check)
    out = run(*(x.reshape(size * rows, *x.shape[2:]) for x in stacked))
    return [x.reshape(size, rows, *x.shape[1:]) for x in out], [0] * len(out)


batching.primitive_batchers[_stage] = _fold


@partial(jax.jit, static_argnames=("implementation", "op", "stage", "tree", "interpret"))
def programs(*inputs: Array, **params: Any) -> list[Array]:
    """Runs a stage that is outside of `jax.jit`, by a program that is kept for the next time."""
    return _stage.bind(*inputs, **params)


@_stage.def_impl
def _outside_of_jit(*inputs: Array, **params: Any) -> list[Array]:
    with jax.disable_jit(False):  # a stage is a program and nothing else
        return programs(*inputs, **params)


# --- Lowering -------------------------------------------------------------------------------------


class Target(NamedTuple):
    """What a program is lowered for."""

    platform: str
    # One of its devices, or an abstract one; None where they are not known, or not all alike.
    device: Any = None


def _target(platform: str, context: mlir.LoweringRuleContext) -> Target:
    module = context.module_context
    client = module.backend
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    devices: list[Any] = []
    # An exported program runs on other machines, whose devices this one's say nothing about.
    if client is not None and client.platform in _DEVICES_OF[platform]:
        if not module.lowering_parameters.for_export:
            devices = client.devices()
    elif abstract is not None and abstract.platform in _DEVICES_OF[platform]:
        devices = [abstract]
    alike = len({device.device_kind for device in devices}) == 1
    return Target(platform, devices[0] if alike else None)


def _lower(platform: str, context: mlir.LoweringRuleContext, *inputs: Any, **params: Any) -> Any:
    implementation, op, stage = (params[name] for name in ("implementation", "op", "stage"))
    operands = jax.tree.unflatten(params["tree"], context.avals_in)[0]
    target = _target(platform, context)
    form = choose(implementation, target, stage, operands, params["interpret"])

    def run(*inputs: Array) -> list[Array]:
        with jax.enable_x64(False):  # all numbers have 32 bits, those that index too
            out = form(op, stage, *jax.tree.unflatten(params["tree"], inputs))
        gradient = [x.astype(op.gradient_dtype or x.dtype) for x in out.gradient or ()]
        return [out.stats[name] for name in returned(op, stage)] + gradient

    if platform == "cpu" and _named(implementation)[0] in _KERNELS:
        # An interpreter's callbacks are ordered among themselves. The order begins and ends with
        # the kernel: programs must not depend on whether it will be interpreted.
        effects = jax.make_jaxpr(run)(*map(_shaped, context.avals_in)).effects
        context = context.replace(tokens_in=mlir.TokenSet.create(list(effects)))
    return mlir.lower_fun(run, multiple_results=True)(context, *inputs)


def _shaped(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=x.sharding, manual_axis_type=x.manual_axis_type
    )


for _platform in ("tpu", "cuda", "rocm"):
    mlir.register_lowering(_stage, partial(_lower, _platform), platform=_platform)
mlir.register_lowering(_stage, partial(_lower, "cpu"))


# --- The choice -----------------------------------------------------------------------------------


def choose(
    implementation: Implementation, target: Target, stage: Stage, operands: Operands, interpret: Any
) -> Driver:
    """The driver of logits for what a program is lowered for.

    Args:
      implementation: the one asked for, or None for the best.
      target: what the program is lowered for.
      stage: the stage.
      operands: the logits, of which shapes and dtypes matter.
      interpret: how a kernel that was asked for is interpreted on a CPU.

    Raises:
      NotImplementedError: `implementation` was asked for and cannot run there.
    """
    asked, sizes = _named(implementation)
    name = asked or _BEST.get(target.platform, "xla")
    reason = _why_not(name, target) or _why_not_rows(name, stage, operands, sizes)
    if not reason and not implementation and name == "pallas_gpu" and not _capability(target):
        reason = "which GPU the program will run on is not known"
    if reason and implementation:
        raise _cannot(implementation, reason)
    if reason:
        if stage is not Stage.GRADIENT:  # which is the XLA form's on a GPU anyway
            _warn(name, reason)
        name = "xla"
    if operands.model[0].shape[0] == 0:  # under `jax.vmap`: nothing for a kernel to go through
        name = "xla"
    interpret = interpret if target.platform == "cpu" else None
    if name == "pallas_tpu":
        kind = getattr(target.device, "device_kind", None)
        return partial(_kernel(name).run, _kernel(name).plans.chip(kind), interpret)
    if name == "pallas_gpu":
        return partial(_kernel(name).run, interpret, sizes)
    return streaming.form(target.platform)


def _why_not(name: str, target: Target) -> str | None:
    """The reason for which an implementation cannot run on a target, or None where it can."""
    if name not in _KERNELS or target.platform == "cpu":
        return None
    if _BEST.get(target.platform) != name:
        needs = "a TPU" if name == "pallas_tpu" else "a Hopper or Blackwell GPU"
        return (
            f"it needs {needs} (or a CPU, to be interpreted), and the program is lowered for "
            f"{target.platform}"
        )
    capability = _capability(target)
    if name == "pallas_gpu" and capability and capability.split(".")[0] not in ("9", "10"):
        return (
            "it needs 228 KB of shared memory, as GPUs of compute capability 9 and 10 have it "
            f"(H100, B200), and this one is of {capability}"
        )
    return None


def _capability(target: Target) -> str | None:
    """The compute capability of a GPU, where it is known."""
    return getattr(target.device, "compute_capability", None)


def _why_not_rows(name: str, stage: Stage, operands: Operands, sizes: BlockSizes) -> str | None:
    """The reason for which an implementation cannot take these rows on any device."""
    if name != "pallas_gpu":
        return None
    try:
        kernel = _kernel(name)
    except ImportError as error:
        return f"Mosaic GPU cannot be imported ({error}): install what is missing"
    if stage is Stage.GRADIENT:
        return None
    if stage not in WHOLE_ROWS:
        return "it reads whole rows, and this vocabulary is split between devices"
    logits = (*operands.model, *operands.reference)
    return kernel.plans.why_not(logits[0].shape[1], tuple(x.dtype.itemsize for x in logits), sizes)


def _kernel(name: str) -> ModuleType:
    # Imported when it is used: Pallas takes longer to import than all of the rest.
    return importlib.import_module(f"t5patches_kernels.backends.{name}.kernel")


def _cannot(name: Implementation, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f'implementation={name!r}: {reason}. Or use implementation="xla", which runs anywhere.'
    )


@functools.cache  # once a reason: a program has many stages
def _warn(name: str, reason: str) -> None:
    warnings.warn(
        f'the XLA form runs in place of implementation="{name}", which is faster: {reason}. '
        'implementation="xla" asks for that form without this warning.',
        stacklevel=2,
    )
