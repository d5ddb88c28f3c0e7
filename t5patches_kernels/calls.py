"""From a user's arrays to rows and back: what all public functions share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5patches_kernels import autodiff, checks, dense, dispatch, sharding
from t5patches_kernels.backends import chunked_linear
from t5patches_kernels.core import objectives
from t5patches_kernels.core.objectives import Settings
from t5patches_kernels.core.operation import Head, Operands, Operation, Tokens, columns_of
from t5patches_kernels.core.statistics import REMOVED
from t5patches_kernels.dispatch import Implementation

Array = jax.Array


class Edits(NamedTuple):
    """Which ids' mass the target distribution changes, per token.

    Attributes:
      ids: ``[..., K]`` integers in ``[0, V)``, or -1 for none. An id listed twice has both
        factors.
      factors: ``[..., K]`` floats ``>= 0``: what multiplies the id's probability under the
        reference before it is renormalised. 0 removes the id, 0.5 halves it, 3 triples it.

    A loss that is given others raises: ValueError for shapes that do not fit the tokens', TypeError
    for dtypes. An id out of range, or an id's factor that is negative, infinite or NaN, makes a
    token that counts NaN; a negative one whose value is known when the program is traced raises
    ValueError.

    Example:
      >>> import jax.numpy as jnp
      >>> from t5patches_kernels import Edits, targeted_negative_loss
      >>> z, y, w = jnp.zeros((1, 4)), jnp.array([3]), jnp.array([-1.0])
      >>> without = Edits(jnp.array([[0, 3, -1]]), jnp.zeros((1, 3)))  # 1 and 2 are left
      >>> out = targeted_negative_loss(z, z, y, w, edits=without, alpha=1.0, divergence=True)
      >>> print(out.loss.round(4))  # log 2
      [0.6931]
    """

    ids: Array
    factors: Array


class Inputs(NamedTuple):
    """What rows are made of, as the user gave it, checked; leading dimensions still free."""

    name: str  # of the operand whose leading dimensions are the tokens'
    model: tuple[Array, ...]
    reference: tuple[Array, ...]
    head: Head | None


def logits_inputs(
    logits: Array, ref_logits: Array | None, implementation: Implementation
) -> Inputs:
    """Checks logits given whole."""
    float64 = implementation == "reference"
    checks.floats("logits", logits, float64=float64)
    checks.rows("logits", logits, last="V")
    if ref_logits is None:
        return Inputs("logits", (logits,), (), None)
    checks.floats("ref_logits", ref_logits, float64=float64)
    checks.same_shape("ref_logits", ref_logits, "logits", logits)
    return Inputs("logits", (logits,), (ref_logits,), None)


def linear_inputs(
    hidden: Array,
    kernel: Array,
    ref: tuple[Array, Array] | None,
    logit_scale: float,
    softcap: float | None,
    transposed: bool,
    chunk_bytes: int | None,
    implementation: Implementation,
) -> Inputs:
    """Checks hidden states and the head that makes logits of them."""
    transposed = checks.flag("transposed", transposed)
    pairs = [("hidden", hidden, "kernel", kernel)]
    if ref is not None:
        pairs.append(("ref_hidden", ref[0], "ref_kernel", ref[1]))
    for hidden_name, h, kernel_name, k in pairs:
        checks.floats(hidden_name, h, float64=implementation == "reference")
        checks.floats(kernel_name, k, float64=implementation == "reference")
        checks.head(hidden_name, h, kernel_name, k, transposed)
    scale = checks.number("logit_scale", logit_scale)
    columns, least = jnp.shape(kernel)[0 if transposed else 1], chunked_linear.LEAST_ROWS
    chunk_bytes = checks.chunk_bytes(chunk_bytes, 4 * columns * least, least)
    head = Head(scale, transposed, checks.softcap(softcap), chunk_bytes)
    if ref is None:
        return Inputs("hidden", (hidden, kernel), (), head)
    checks.same_vocabulary(kernel, ref[1], transposed)
    if jnp.shape(ref[0])[:-1] != jnp.shape(hidden)[:-1]:
        raise ValueError(
            "ref_hidden and hidden must have the same leading dimensions, got shapes "
            f"{jnp.shape(ref[0])} and {jnp.shape(hidden)}."
        )
    return Inputs("hidden", (hidden, kernel), ref, head)


def no_targets(inputs: Inputs) -> Array:
    """In the place of targets, for an objective that reads none."""
    return jnp.zeros(jnp.shape(inputs.model[0])[:-1], jnp.int32)


def vocab_size(inputs: Inputs, vocab_axis: str | None) -> int:
    """The entries of a whole row, over all shards."""
    try:
        return columns_of(inputs.head, inputs.model) * sharding.axis_size(checks.axis(vocab_axis))
    except NameError:
        raise ValueError(
            f"vocab_axis={vocab_axis!r} is not an axis of an enclosing jax.shard_map: call the "
            "loss inside jax.shard_map over a mesh with that axis, or leave vocab_axis out."
        ) from None


class _PerToken(NamedTuple):
    """What the user said of each token, checked; leading dimensions still free."""

    targets: Array
    weights: Array
    edits: Edits | None
    numbers: dict[str, Array]


class _Tokens(NamedTuple):
    """What belongs to the tokens, flat, ids still global."""

    targets: Array
    weights: Array
    bad: Array
    edits: Edits | None
    numbers: dict[str, Array]


def _per_token(
    c: Settings,
    inputs: Inputs,
    targets: Array,
    weights: Array | None,
    edits: Edits | None,
    numbers: Mapping[str, Array],
) -> _PerToken:
    like = inputs.model[0]
    lead = jnp.shape(like)[:-1]
    dtype = dense.precision_of(like, *inputs.reference[:1])
    weighted = weights is not None
    if weights is None:
        weights = jnp.ones(lead, dtype)
    checks.integers("targets", targets)
    checks.per_token("targets", targets, inputs.name, like)
    checks.weights(weights)
    checks.per_token("weights", weights, inputs.name, like)
    targets, weights = _int32_ids(targets), jnp.asarray(weights).astype(dtype)
    for name, x in numbers.items():
        checks.real_numbers(name, x)
        checks.per_token(name, x, inputs.name, like)
    second_row = objectives.reference_of(c)
    if edits is not None:
        checks.edits(edits, inputs.name, like)
        edits = Edits(_int32_ids(edits.ids), jnp.asarray(edits.factors).astype(dtype))
    elif weighted and second_row is not None and objectives.OBJECTIVES[c.objective].weigh is None:
        # What a weight says where no edits are given: the target of a pushed-down token.
        left = jnp.zeros_like(weights) if second_row == "self" else jnp.maximum(0.0, 1.0 + weights)
        edits = Edits(targets[..., None], jnp.where(weights < 0, left, 1.0)[..., None])
    own = {name: jnp.asarray(x).astype(dtype) for name, x in numbers.items()}
    return _PerToken(targets, weights, edits, own)


def _int32_ids(ids: Array | np.ndarray) -> Array:
    """Ids in the one dtype in which they are compared with -1 and V.

    A narrower dtype may hold neither of the two. What a wider one holds beyond int32 is clipped and
    so stays out of range: a cast would wrap it around to an id that looks right.
    """
    xp = jnp if isinstance(ids, jax.Array) else np  # jnp.asarray would wrap numpy's int64
    own, int32 = jnp.iinfo(jnp.result_type(ids)), jnp.iinfo(jnp.int32)
    least, most = max(int(own.min), int(int32.min)), min(int(own.max), int(int32.max))
    return jnp.asarray(xp.clip(ids, least, most).astype(jnp.int32))


def _flat_tokens(c: Settings, given: _PerToken) -> _Tokens:
    y, w = given.targets.reshape(-1), given.weights.reshape(-1)
    faulty = ~jnp.isfinite(w)
    numbers = {name: x.reshape(-1) for name, x in given.numbers.items()}
    for name, x in numbers.items():
        faulty |= ~jnp.isfinite(x)
        numbers[name] = jnp.where(jnp.isfinite(x), x, 0.0)
    edits = None
    if given.edits is not None and given.edits.ids.shape[-1]:
        ids, factors = (x.reshape(len(y), x.shape[-1]) for x in given.edits)
        edited = (ids >= 0) & (ids < c.vocab_size) & (factors >= 0) & (factors < jnp.inf)
        faulty |= jnp.any(~edited & (ids != -1), axis=-1)
        factors = jnp.where(edited, factors, 1.0)
        if objectives.reference_of(c) == "self":  # the set N: what is not removed is not in it
            factors = (factors != 0).astype(factors.dtype)
        edits = Edits(ids, factors)
    # Without a target an ignored token has no log-probability either; with one it has.
    bad = (y < 0) | (y >= c.vocab_size) | (faulty & (w != 0))
    return _Tokens(y, w, bad, edits, numbers)


def _run_reference(
    op: Operation, operands: Operands, tokens: _Tokens
) -> tuple[dict[str, Array], Array]:
    c, e = op.settings, tokens.edits
    counts = tokens.weights != 0
    arrays = [operands.model] + ([operands.reference] if operands.reference else [])
    # 0 times NaN is NaN: what an ignored token's rows hold must not come near a gradient.
    if op.head is not None:
        scale, transposed, softcap = op.head.scale, op.head.transposed, op.head.softcap
        logits = []
        for h, k in arrays:
            usable = (counts | jnp.isfinite(h).all(axis=-1))[:, None]
            of_head = dense.linear_logits(
                jnp.where(usable, h, jnp.zeros_like(h)), k, scale, transposed, softcap
            )
            logits.append(jnp.where(usable, of_head, jnp.nan))
    else:
        logits = [x for (x,) in arrays]
    logits = [x.astype(dense.precision_of(*logits)) for x in logits]
    peaks = [jnp.max(x, axis=-1) for x in logits]
    # On a CPU the maximum of a long row with a NaN in it may be another number.
    no_model, *no_reference = [
        ~((peak > dense.MASKED) & (peak < jnp.inf)) | jnp.isnan(x).any(axis=-1)
        for peak, x in zip(peaks, logits, strict=True)
    ]
    clean = [jnp.where(counts[:, None] | jnp.isfinite(x), x, dense.MASKED) for x in logits]
    z, r = clean[0], clean[1] if operands.reference else None
    statistics = dense.token_statistics(z, r, tokens.targets)
    policy = c.objective == "policy_gradient"
    if c.objective in ("statistics", "pair_statistics"):
        outputs = statistics
    elif policy:
        outputs = dense.policy_gradient(
            statistics, tokens.weights, **tokens.numbers, clip=c.clip, kl=c.kl,
            kl_coefficient=c.kl_coefficient, entropy_coefficient=c.entropy_coefficient,
        )  # fmt: skip
    else:
        factor = None if e is None else dense.edit_factors(z.shape[-1], e.ids, e.factors)
        total, z_part = dense.loss(
            c.objective, z, r, tokens.targets, tokens.weights, factor, alpha=c.alpha,
            smoothing=c.smoothing, z_loss=c.z_loss, divergence=c.divergence,
            label_smoothing=c.label_smoothing, threshold=c.threshold,
        )  # fmt: skip
        outputs = {"loss": total, "z_loss": z_part, "log_prob": statistics["log_prob"]}
    of_reference = {"ref_log_prob", "kl"} | ({"loss"} if c.kl_coefficient or not policy else set())
    for name, x in outputs.items():
        unanswered = no_model
        if no_reference and name in of_reference:
            unanswered |= no_reference[0]
        if policy or name not in ("entropy", "kl"):
            unanswered |= tokens.bad
        # A product, so that the gradient is NaN too.
        marked = x * jnp.where(unanswered & counts, math.nan, 1.0)
        outputs[name] = jnp.where(counts | ~unanswered, marked, 0.0)
    own = jnp.take_along_axis(z, jnp.clip(tokens.targets, 0, z.shape[-1] - 1)[:, None], -1)[:, 0]
    return outputs, (own >= peaks[0]) & ~(tokens.bad | no_model)


def _run_driver(
    implementation: Implementation, op: Operation, operands: Operands, tokens: _Tokens
) -> tuple[dict[str, Array], Array]:
    columns = columns_of(op.head, operands.model)

    def local(ids: Array) -> Array:
        return sharding.local_ids(ids, columns, op.vocab_axis)

    e = tokens.edits
    flat = Tokens(
        local(tokens.targets),
        tokens.weights,
        tokens.bad,
        None if e is None else local(e.ids),
        None if e is None else jnp.maximum(jnp.log(e.factors), REMOVED),
        tokens.numbers,
    )
    driver = dispatch.driver(implementation, linear=op.head is not None)
    outputs, stats = autodiff.apply(driver, op, operands, flat)
    return outputs, (stats["zy"] >= 0)[:, 0] & ~stats["bad"][:, 0]


def _without_ignored(
    op: Operation, tokens: _Tokens, outputs: dict[str, Array], correct: Array
) -> tuple[dict[str, Array], Array]:
    """What is returned of tokens that were skipped: what a driver made of them is not said."""
    if not op.skip_ignored:
        return outputs, correct
    counts = tokens.weights != 0
    # A loss is 0 as it is: a choice would scale its whole gradient by 1 and 0, a pass over it.
    outputs = {
        name: x if name == "loss" else jnp.where(counts, x, 0.0) for name, x in outputs.items()
    }
    return outputs, correct & counts


def _innermost(x: Array) -> Array:
    """What tracers of grad, vmap and shard_map stand around: an array, or a program's own tracer.

    Only as far as JAX tells.
    """
    while isinstance(x, jax.core.Tracer):
        under = getattr(x, "primal", getattr(x, "val", None))
        if not isinstance(under, jax.Array):
            break
        x = under
    return x


class How(NamedTuple):
    """How a call is to be run: what the public functions share."""

    skip_ignored: bool = False
    vocab_axis: str | None = None
    implementation: Implementation = None


def call(
    c: Settings,
    inputs: Inputs,
    how: How,
    targets: Array,
    weights: Array | None = None,
    edits: Edits | None = None,
    numbers: Mapping[str, Array] | None = None,
) -> tuple[dict[str, Array], Array]:
    """Runs an operation on checked inputs.

    Returns:
      Its outputs by name and whether the target holds the largest logit, with the tokens' leading
      dimensions.
    """
    innermost, implementation = _innermost(inputs.model[0]), how.implementation
    donate = getattr(innermost, "parent", None) is not None  # computed in the function being traced
    skip_ignored = checks.flag("skip_ignored", how.skip_ignored)
    op = Operation(c, how.vocab_axis, inputs.head, donate=donate, skip_ignored=skip_ignored)
    if objectives.reference_of(c) == "given":
        checks.reference(inputs.reference, f"ref_{inputs.name}", c.objective)
    operands = Operands(
        tuple(map(jnp.asarray, inputs.model)),
        jax.lax.stop_gradient(tuple(map(jnp.asarray, inputs.reference))),
    )
    dispatch.check(implementation, op)
    if implementation != "reference":
        checks.sizes_known(inputs.name, inputs.model[0])
    lead: Sequence[int] = jnp.shape(inputs.model[0])[:-1]
    # No rows: nothing to stream.
    implementation = implementation if math.prod(lead) else "reference"
    tokens = jax.lax.stop_gradient(_per_token(c, inputs, targets, weights, edits, numbers or {}))
    run = partial(_on_rows, implementation)
    if implementation == "reference":  # dense: XLA partitions it where it may
        return run(op, *jax.tree.map(sharding.gathered, (operands, tokens)))
    if not isinstance(innermost, jax.core.Tracer) and not jax.sharding.get_abstract_mesh().empty:
        run = partial(_program, implementation)
    # A kernel may be interpreted where it is asked for, which cannot be done under check_vma.
    check_vma = implementation in (None, "xla")
    return sharding.over_mesh(run, op, operands, tokens, check_vma=check_vma)


@partial(jax.jit, static_argnums=(0, 1))
def _program(
    implementation: Implementation, op: Operation, operands: Operands, tokens: _PerToken
) -> tuple[dict[str, Array], Array]:
    """`_on_rows` as one step of a `jax.shard_map` (the caller's, or `over_mesh`'s) outside of jit.

    JAX runs that step by step, and refuses a custom derivative with symbolic zeros there.
    """
    return _on_rows(implementation, op, operands, tokens)


def _on_rows(
    implementation: Implementation, op: Operation, operands: Operands, tokens: _PerToken
) -> tuple[dict[str, Array], Array]:
    """Flattens the tokens' leading dimensions, runs the operation, and puts them back."""
    if op.vocab_axis is not None and sharding.axis_size(op.vocab_axis) == 1:
        # It splits nothing, and whole rows take fewer passes. (The sum says so where JAX checks.)
        operands = jax.lax.psum(operands, op.vocab_axis)
        op = dataclasses.replace(op, vocab_axis=None)
    lead = operands.model[0].shape[:-1]

    def flat(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        if not arrays:
            return ()
        first, *kernel = arrays
        return (first.reshape(math.prod(lead), first.shape[-1]), *kernel)

    run = _run_reference if implementation == "reference" else partial(_run_driver, implementation)
    rows = Operands(flat(operands.model), flat(operands.reference))
    by_row = _flat_tokens(op.settings, tokens)
    outputs, correct = _without_ignored(op, by_row, *run(op, rows, by_row))
    return {k: x.reshape(lead) for k, x in outputs.items()}, correct.reshape(lead)
