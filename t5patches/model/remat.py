"""Layers that the backward pass runs again instead of holding what is inside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import lift
from flax.linen import transforms
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero


def remat(layer: Callable[..., Any]) -> Callable[..., Any]:
    """The same layer, of which nothing but the arguments is held for the backward pass.

    `jax.checkpoint` means the same, and keeps the second run back by an optimization barrier. XLA
    removes those where it compiles for CPUs, and then runs all layers again at the beginning, so
    that nothing is saved. Here the second run is a branch, taken where a cotangent is not 0: what
    is in a branch is not run before that is known.

    Args:
      layer: a function of arrays, or trees of them, by position.

    Returns:
      A function of the same arguments, without a forward-mode derivative.

    Example:
      >>> layer = remat(lambda w, x, kept: x + jnp.tanh(w * x) * kept)
      >>> w, x, kept = jnp.float32(2), jnp.ones(3), jnp.array([1.0, 1.0, 0.0])
      >>> print(f"{jax.grad(lambda w: layer(w, x, kept).sum())(w):.5f}")
      0.14130
    """

    @jax.custom_vjp
    def call(*args: Any) -> Any:
        return layer(*args)

    def forward(*args: Any) -> tuple[Any, Any]:
        # Of what is frozen, beneath an adapter say, no gradient is made.
        learned, frozen = _values(args, perturbed=True), _values(args, perturbed=False)
        return layer(*_either(learned, frozen)), (learned, frozen)

    def backward(held: Any, cotangents: Any) -> Any:
        learned, frozen = held
        asked = jnp.array(False)
        for cotangent in jax.tree.leaves(cotangents):
            if not isinstance(cotangent, SymbolicZero):
                asked |= jnp.any(cotangent != 0)
        cotangents = jax.tree.map(
            lambda c: jnp.zeros(c.shape, c.dtype) if isinstance(c, SymbolicZero) else c, cotangents
        )
        return lax.cond(
            asked,
            lambda: jax.vjp(lambda x: layer(*_either(x, frozen)), learned)[1](cotangents)[0],
            lambda: jax.tree.map(jnp.zeros_like, learned),
        )

    call.defvjp(forward, backward, symbolic_zeros=True)
    return call


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
            def layer(variables: Any, rngs: Any, *args: Any) -> Any:
                scope = scope_of(variables, rngs)
                for part in jax.tree.leaves(scope):
                    # Flax counts what is drawn: each run of the layer must draw the same.
                    part.rng_counters = dict(part.rng_counters)
                return fn(scope, *args, **static), variables_of(scope)

            return remat(layer)(variables, rngs, *args)

        return lift.pack(inner, (True,), (True,), (True,), name="remat", enable_kwargs=True)

    return transforms.lift_transform(lifted, module)
