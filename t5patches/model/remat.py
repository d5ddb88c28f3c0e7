"""Parts of a network that the backward pass runs again instead of holding what is inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import lift
from flax.linen import transforms
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero


def remat(part: Callable[..., Any]) -> Callable[..., Any]:
    """The same part of a network, of which only the arguments are held for the backward pass.

    `jax.checkpoint` means the same, and keeps the second run back by an optimization barrier. Up to
    jax 0.11 XLA removes those where it compiles for CPUs, and then runs all parts again at the
    beginning, or finds that it has their results already and holds them. There the second run is of
    the arguments plus 0 times the cotangents, which cannot be had before those.

    Args:
      part: a function of parameters and then of arrays, or trees of them, by position.

    Returns:
      A function of the same arguments, without a forward-mode derivative. Where a cotangent is not
      finite, no gradient is.

    Example:
      >>> part = remat(lambda w, x, kept: x + jnp.tanh(w * x) * kept)
      >>> w, x, kept = jnp.float32(2), jnp.ones(3), jnp.array([1.0, 1.0, 0.0])
      >>> print(f"{jax.grad(lambda w: part(w, x, kept).sum())(w):.5f}")
      0.14130
    """

    @jax.custom_vjp
    def call(*args: Any) -> Any:
        return part(*args)

    def forward(*args: Any) -> tuple[Any, Any]:
        # Of what is frozen, beneath an adapter say, no gradient is made.
        learned, frozen = _values(args, perturbed=True), _values(args, perturbed=False)
        return part(*_either(learned, frozen)), (learned, frozen)

    def backward(held: Any, cotangents: Any) -> Any:
        cotangents = jax.tree.map(
            lambda c: jnp.zeros(c.shape, c.dtype) if isinstance(c, SymbolicZero) else c, cotangents
        )
        (params, *arrays), (frozen_params, *frozen_arrays) = held
        arrays, frozen_arrays = lax.platform_dependent(
            (arrays, frozen_arrays), cotangents, cpu=_plus_nothing, default=_behind_a_barrier
        )
        frozen = (frozen_params, *frozen_arrays)
        _, pull = jax.vjp(lambda learned: part(*_either(learned, frozen)), (params, *arrays))
        return pull(cotangents)[0]

    call.defvjp(forward, backward, symbolic_zeros=True)
    return call


def _behind_a_barrier(arrays: Any, cotangents: Any) -> Any:
    return lax.optimization_barrier((arrays, cotangents))[0]


def _plus_nothing(arrays: Any, cotangents: Any) -> Any:
    # No compiler may take 0 times a number for 0: it is NaN for some.
    nothing = 0 * sum(jnp.sum(c, dtype=jnp.float32) for c in jax.tree.leaves(cotangents))

    def plus_nothing(x: jax.Array) -> jax.Array:
        floats = jnp.issubdtype(x.dtype, jnp.floating)
        return x + jnp.asarray(nothing, x.dtype) if floats else x

    return jax.tree.map(plus_nothing, arrays)


def _values(tree: Any, *, perturbed: bool) -> Any:
    """The values of the leaves that are perturbed, or of those that are not; None for others."""
    return jax.tree.map(
        lambda leaf: leaf.value if leaf.perturbed == perturbed else None,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, CustomVJPPrimal),
    )


def _either(one: Any, other: Any) -> Any:
    """Two trees as one: where the first has None, the second's leaf."""
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=lambda x: x is None)


def remat_module(module: Any) -> Any:
    """`remat` of a Flax module class: what it is called with by name is static.

    Args:
      module: the class.

    Returns:
      A class with the same parameters.
    """

    def lifted(fn: Callable[..., Any]) -> Any:
        def inner(
            scope_of: Any, variables_of: Any, variables: Any, rngs: Any, *args: Any, **static: Any
        ) -> Any:
            def layer(variables_and_rngs: Any, *args: Any) -> Any:
                scope = scope_of(*variables_and_rngs)
                for part in jax.tree.leaves(scope):
                    # Flax counts what is drawn: each run of the layer must draw the same.
                    part.rng_counters = dict(part.rng_counters)
                return fn(scope, *args, **static), variables_of(scope)

            return remat(layer)((variables, rngs), *args)

        return lift.pack(inner, (True,), (True,), (True,), name="remat", enable_kwargs=True)

    return transforms.lift_transform(lifted, module)
