"""Gradients: the only place with a custom derivative.

Two rules. `_value_and_grad` is for losses whose rows a driver has whole: the forward pass computes
the loss and, with the row at hand, its gradient for a cotangent of 1; the backward pass multiplies
each row by its own cotangent, which XLA fuses into what follows. `_from_stats` is for everything
else (the other outputs, a split vocabulary): the row statistics are saved, and the backward pass
computes the gradient from them, the operands and the cotangents.

A second derivative raises with the remedy. So does one in forward mode where JAX refuses it as the
loss is called; where a function is compiled, scanned or rematerialised, JAX refuses later, with
a TypeError in its own words.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from t5patches_kernels import sharding
from t5patches_kernels.backends import tiling
from t5patches_kernels.core import objectives
from t5patches_kernels.core.operation import Driver, Operands, Operation, Result, Stage, Tokens
from t5patches_kernels.core.statistics import Stats

SECOND_ORDER = (
    "second derivatives of the fused losses are not implemented: the gradient is computed by a "
    'kernel that has no derivative. Pass implementation="reference" for a loss that can be '
    "differentiated any number of times."
)
FORWARD_MODE = (
    "forward-mode differentiation (jax.jvp, jax.jacfwd, jax.linearize) of the fused losses is not "
    'implemented. Use reverse mode (jax.grad, jax.vjp), or pass implementation="reference".'
)


@contextlib.contextmanager
def _reverse_mode_only() -> Iterator[None]:
    """Names the remedy where JAX refuses to differentiate a custom derivative forwards."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" in str(error):  # JAX's own words, without the remedy
            raise NotImplementedError(FORWARD_MODE) from error
        raise


def _first_order_only(fn):
    """`fn`, raising with the remedy where JAX would differentiate through it."""
    guarded = jax.custom_jvp(fn)

    @guarded.defjvp
    def rule(primals, tangents):
        raise NotImplementedError(SECOND_ORDER)

    return guarded


def _statistics(driver: Driver, op: Operation, operands: Operands, tokens: Tokens) -> Stats:
    """The finished statistics of every row, merged over the shards of a split vocabulary."""
    if op.vocab_axis is None:
        return driver(op, Stage.STATISTICS, operands, tokens).stats
    stats = sharding.merge(driver(op, Stage.FIRST_PASS, operands, tokens).stats, op.vocab_axis)
    stats = objectives.finish(stats, tokens.of_rows())
    if not objectives.needs_second_pass(op.settings):
        return stats
    more = driver(op, Stage.SECOND_PASS, operands, tokens, stats).stats
    return stats | sharding.add(more, op.vocab_axis)


# --- Value and gradient ---------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _value_and_grad(
    driver: Driver, op: Operation, model: tuple, reference: tuple, tokens: Tokens
) -> tuple[jax.Array, Stats]:
    stats = _statistics(driver, op, Operands(model, reference), tokens)
    return objectives.evaluate(stats, op.settings, "loss"), stats


def _value_and_grad_forward(driver, op, model, reference, tokens):
    def value_and_grad(model, reference, tokens) -> Result:
        return driver(op, Stage.VALUE_AND_GRAD, Operands(model, reference), tokens)

    stats, gradient = _first_order_only(value_and_grad)(model, reference, tokens)
    again = None if op.head is None else (model, reference, tokens, stats)
    loss = objectives.evaluate(stats, op.settings, "loss")
    return (loss, stats), (gradient, tokens.weights, again)


def _value_and_grad_backward(driver, op, residuals, cotangents):
    (by_row, *by_kernel), weights, again = residuals
    ct, _ = cotangents  # the numbers leave through stop_gradient
    # An ignored token's may be no number: the mean over a sequence that has no tokens divides by 0.
    # (Of a sum, whose cotangents are 1, XLA sees that this does nothing, and makes no pass for it.)
    ct = jnp.where((weights[:, None] == 0) & ~jnp.isfinite(ct), 0.0, ct)
    if again is None:
        return (_scaled(by_row, ct),), None, None
    of_kernel = _kernel_gradient(driver, op, by_kernel[0], again, ct)
    return (_scaled(by_row, ct), of_kernel.astype(again[0][1].dtype)), None, None


def _scaled(x: jax.Array, d_stats: jax.Array) -> jax.Array:
    return (x.astype(d_stats.dtype) * d_stats).astype(x.dtype)


def _kernel_gradient(driver, op, for_ones, again, ct):
    """The gradient to a head's kernel, from that for cotangents of 1 where one factor is enough.

    It is summed over tokens, so it can be scaled only where all tokens that count have the same
    cotangent, as in a sum or a mean; else the logits are made again.
    """
    *_, tokens, _ = again
    counts = tokens.weights[:, None] != 0
    common = jnp.max(jnp.where(counts, ct, -jnp.inf))
    same = jnp.all((ct == common) | ~counts)
    common = jnp.where(jnp.any(counts), common, 0.0)

    def anew(model, reference, tokens, stats, ct) -> jax.Array:
        d_stats = objectives.derivatives(stats, op.settings, {"loss": ct})
        operands = Operands(model, reference)
        return driver(op, Stage.GRADIENT, operands, tokens, stats, d_stats).gradient[1]

    def recompute(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        made = jnp.ones_like(carry[0]), _first_order_only(anew)(*again, ct)
        return tiling.vary_like(made, carry)

    # A loop of one step or none, and no `lax.cond`: a loop writes its result over its carry, where
    # a conditional holds both.
    _, gradient = jax.lax.while_loop(
        lambda carry: jnp.logical_not(carry[0]), recompute, (same, for_ones)
    )
    return _scaled(gradient, jnp.where(same, common, 1.0))


_value_and_grad.defvjp(_value_and_grad_forward, _value_and_grad_backward)


# --- From saved statistics ------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _from_stats(
    driver: Driver,
    op: Operation,
    outputs: tuple[str, ...],
    model: tuple,
    reference: tuple,
    tokens: Tokens,
    stats: Stats,
) -> dict[str, jax.Array]:
    return {name: objectives.evaluate(stats, op.settings, name) for name in outputs}


def _from_stats_forward(driver, op, outputs, *operands):
    values = jax.tree.map(lambda x: x.value, operands)  # what symbolic_zeros wraps
    return _from_stats(driver, op, outputs, *values), values


def _from_stats_backward(driver, op, outputs, residuals, cotangents):
    def pull(model, reference, tokens, stats, cts):
        cts = {k: sharding.cotangent(ct, model[-1], op.vocab_axis) for k, ct in cts.items()}
        d_stats = objectives.derivatives(stats, op.settings, cts)
        operands = Operands(model, reference)
        gradient = driver(op, Stage.GRADIENT, operands, tokens, stats, d_stats).gradient
        return tuple(g.astype(x.dtype) for g, x in zip(gradient, model, strict=True))

    # One gradient for all outputs that were used; none is computed for the others.
    unused = jax.custom_derivatives.SymbolicZero
    cts = {name: ct for name, ct in cotangents.items() if not isinstance(ct, unused)}
    return _first_order_only(pull)(*residuals, cts), None, None, None


_from_stats.defvjp(_from_stats_forward, _from_stats_backward, symbolic_zeros=True)


def apply(
    driver: Driver, op: Operation, operands: Operands, tokens: Tokens
) -> tuple[dict[str, jax.Array], Stats]:
    """Runs an operation on rows.

    Args:
      driver: what brings the rows.
      op: the operation.
      operands: differentiable in `operands.model`.
      tokens: what belongs to each row.

    Returns:
      Every output of the operation ``[T]``, differentiable, and the row statistics ``[T, 1]``, not.
    """
    axes = tiling.all_axes((operands, tokens))
    operands = tiling.vary_over(operands, axes)
    tokens = tiling.vary_over(tokens, axes - {op.vocab_axis})
    reference, tokens = jax.lax.stop_gradient((operands.reference, tokens))
    outputs: dict[str, jax.Array] = {}
    names = objectives.lines_of(op.settings)
    with _reverse_mode_only():
        if "loss" in names and op.vocab_axis is None:
            outputs["loss"], stats = _value_and_grad(driver, op, operands.model, reference, tokens)
        else:
            fixed = jax.lax.stop_gradient(operands.model)
            stats = _statistics(driver, op, Operands(fixed, reference), tokens)
        stats = jax.lax.stop_gradient(stats)
        rest = tuple(name for name in names if name not in outputs)
        outputs |= _from_stats(driver, op, rest, operands.model, reference, tokens, stats)
    return {name: jnp.squeeze(x, -1) for name, x in outputs.items()}, stats


@jax.custom_vjp
def _with_gradient_to_targets(loss: jax.Array, logits: jax.Array, targets: jax.Array) -> jax.Array:
    return loss


def _to_targets_backward(residuals, ct):
    logits, targets = residuals
    log_p = jax.nn.log_softmax(logits.astype(ct.dtype), axis=-1)
    to_targets = (-ct[..., None] * log_p).astype(targets.dtype)
    return ct, None, sharding.placed_as(to_targets, targets)


_with_gradient_to_targets.defvjp(
    lambda loss, logits, targets: (loss, (logits, targets)), _to_targets_backward
)


def with_gradient_to_targets(loss: jax.Array, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """A cross-entropy's value, with its gradient ``-log_softmax(logits)`` to its soft targets.

    Dense, as the targets are; nothing is computed where nobody differentiates by them.
    """
    targets = tiling.vary_over(targets, tiling.all_axes(loss))
    with _reverse_mode_only():
        return _with_gradient_to_targets(loss, logits, targets)
