r"""Losses on hidden states: the logits are never whole in memory.

The same losses as in `losses`, with ``logits = logit_scale * hidden @ kernel`` (``kernel.T`` with
``transposed=True``: a tied embedding table) made a chunk of tokens at a time. Value and gradients
hold no ``[..., V]`` array. Differentiable in ``hidden`` and ``kernel``; nothing flows to the
reference's. The products run in the dtype of ``hidden``, to which ``kernel`` is cast, and sum in
float32. The model and the reference may have different hidden sizes. An ignored token contributes
exactly 0 to both gradients, whatever its hidden states hold.

With ``softcap=c`` these are z, and the logits of both models are

.. math:: \tilde z = c \tanh(z / c), \qquad
    \partial \tilde z / \partial z = 1 - \tanh^2(z / c)

in float32 (Gemma 2). A bounded logit is never a masked one: a z that has overflowed to -inf counts
with the probability of -c, and one of infinity is a logit of c and no fault. To mask entries of a
model with a softcap, mask its logits and give them to `losses`.

``chunk_bytes`` bounds a chunk: the float32 logits of one model that a device makes at a time
(`tokens_per_chunk`). For a gradient each chunk adds a whole float32 gradient of the kernel to that
of the chunks before it: fewer, larger chunks are faster where each adds to memory, and hold up to
four times ``chunk_bytes`` there. None is 512 MiB on a GPU, 237 MiB on a TPU and 16 MiB, for its
caches, on a CPU, but no less than the logits of 128 tokens. Between sizes, sums over tokens differ
by rounding. ``"reference"`` takes no notice: it makes all logits at once.

The gradient of the kernel is made as the loss is. So give the whole batch at once: under `jax.vmap`
each example has chunks and a gradient of its own, and a `jax.lax.scan` that is differentiated from
outside keeps one for each step, unless its body is under `jax.checkpoint`.

Every argument not described here means what it does in `losses`; with ``vocab_axis`` it is the
kernels' vocabulary dimension that is split.
"""

from __future__ import annotations

import jax

from t5patches_kernels import calls, checks, losses
from t5patches_kernels.backends import chunked_linear
from t5patches_kernels.backends.pallas_gpu.plan import BlockSizes
from t5patches_kernels.calls import Edits, How
from t5patches_kernels.losses import PolicyLoss, TokenLoss, TokenStatistics

Array = jax.Array


def _both(ref_hidden: Array | None, ref_kernel: Array | None) -> tuple[Array, Array] | None:
    """A reference that is given whole or not at all."""
    if (ref_hidden is None) != (ref_kernel is None):
        missing = "ref_hidden" if ref_hidden is None else "ref_kernel"
        raise ValueError(f"{missing} is missing: give both ref_hidden and ref_kernel, or neither.")
    return None if ref_hidden is None or ref_kernel is None else (ref_hidden, ref_kernel)


def linear_targeted_negative_loss(
    hidden: Array,
    kernel: Array,
    ref_hidden: Array,
    ref_kernel: Array,
    targets: Array,
    weights: Array,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    transposed: bool = False,
    chunk_bytes: int | None = None,
    objective: str = "tnff",
    alpha: float = 1.0,
    smoothing: float = 1e-6,
    z_loss: float = 0.0,
    divergence: bool = False,
    edits: Edits | None = None,
    skip_ignored: bool = False,
    vocab_axis: str | None = None,
    implementation: str | BlockSizes | None = None,
) -> TokenLoss:
    """`targeted_negative_loss` of two models' hidden states.

    Args:
      hidden: ``[..., D]`` float32 or bfloat16, of the model being trained.
      kernel: ``[D, V]``, or ``[V, D]`` with `transposed`.
      ref_hidden: ``[..., D']`` of the frozen original model.
      ref_kernel: ``[D', V]``, or ``[V, D']`` with `transposed`.
      targets: ``[...]`` integer ids.
      weights: ``[...]``; the sign says kept, pushed down or ignored.
      logit_scale: multiplies both models' logits (T5's tied head: ``D ** -0.5``).
      softcap: a bound c > 0 of both models' logits, which become ``c * tanh(z / c)`` (Gemma 2: 30);
        None bounds none. See the module.
      transposed: whether the kernels are embedding tables.
      chunk_bytes: a bound of the float32 logits of one model that a device makes at a time, at
        least those of 8 tokens; None for what suits the device. See the module.
      objective: see `targeted_negative_loss`, as for what follows.
      alpha: see there.
      smoothing: see there.
      z_loss: see there.
      divergence: see there.
      edits: see there.
      skip_ignored: see there.
      vocab_axis: see there.
      implementation: see there.

    Returns:
      A `TokenLoss`, differentiable in `hidden` and `kernel`.

    Raises:
      ValueError, TypeError, NotImplementedError: as for `targeted_negative_loss`, and for a
        `chunk_bytes` that is no size.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from t5patches_kernels import linear_targeted_negative_loss, targeted_negative_loss
      >>> h, w = jnp.ones((2, 3)), jnp.arange(12.0).reshape(3, 4) / 8
      >>> targets, weights = jnp.array([3, 3]), jnp.array([1.0, -1.0])
      >>> fused = linear_targeted_negative_loss(h, w, h, w, targets, weights, alpha=1.0)
      >>> whole = targeted_negative_loss(h @ w, h @ w, targets, weights, alpha=1.0)
      >>> print(jnp.allclose(fused.loss, whole.loss))
      True
    """
    ref = (ref_hidden, ref_kernel)
    inputs = calls.linear_inputs(
        hidden, kernel, ref, logit_scale, softcap, transposed, chunk_bytes, implementation
    )
    c = losses.targeted_negative_settings(
        calls.vocab_size(inputs, vocab_axis), objective, alpha, smoothing, z_loss, divergence
    )
    how = How(skip_ignored, vocab_axis, implementation)
    return losses.run_loss(c, inputs, how, targets, weights, edits)


def linear_unlikelihood_loss(
    hidden: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    transposed: bool = False,
    chunk_bytes: int | None = None,
    alpha: float = 1.0,
    z_loss: float = 0.0,
    edits: Edits | None = None,
    skip_ignored: bool = False,
    vocab_axis: str | None = None,
    implementation: str | BlockSizes | None = None,
) -> TokenLoss:
    """`unlikelihood_loss` of hidden states.

    Args: of the head as for `linear_targeted_negative_loss`, the others as for
    `unlikelihood_loss`.

    Returns: a `TokenLoss` ``[...]``, differentiable in `hidden` and `kernel`.

    Raises: as for `unlikelihood_loss`, and for a `chunk_bytes` that is no size.

    Example:
      >>> import jax.numpy as jnp
      >>> from t5patches_kernels import linear_unlikelihood_loss
      >>> out = linear_unlikelihood_loss(
      ...     jnp.zeros((1, 2)), jnp.ones((2, 4)), jnp.array([0]), jnp.array([-1.0]), alpha=1.0)
      >>> print(out.loss.round(4))
      [0.2877]
    """
    inputs = calls.linear_inputs(
        hidden, kernel, None, logit_scale, softcap, transposed, chunk_bytes, implementation
    )
    c = losses.unlikelihood_settings(calls.vocab_size(inputs, vocab_axis), alpha, z_loss)
    how = How(skip_ignored, vocab_axis, implementation)
    return losses.run_loss(c, inputs, how, targets, weights, edits)


def linear_negative_likelihood_loss(
    hidden: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    transposed: bool = False,
    chunk_bytes: int | None = None,
    alpha: float = 1.0,
    threshold: float = -10.3,
    z_loss: float = 0.0,
    skip_ignored: bool = False,
    vocab_axis: str | None = None,
    implementation: str | BlockSizes | None = None,
) -> TokenLoss:
    """`negative_likelihood_loss` of hidden states.

    Args: of the head as for `linear_targeted_negative_loss`, the others as for
    `negative_likelihood_loss`.

    Returns: a `TokenLoss` ``[...]``, differentiable in `hidden` and `kernel`.

    Raises: as for `negative_likelihood_loss`, and for a `chunk_bytes` that is no size.

    Example:
      >>> import jax.numpy as jnp
      >>> from t5patches_kernels import linear_negative_likelihood_loss
      >>> out = linear_negative_likelihood_loss(
      ...     jnp.zeros((1, 2)), jnp.ones((2, 4)), jnp.array([0]), jnp.array([-1.0]), alpha=1.0)
      >>> print(out.loss.round(4))
      [-1.3863]
    """
    inputs = calls.linear_inputs(
        hidden, kernel, None, logit_scale, softcap, transposed, chunk_bytes, implementation
    )
    size = calls.vocab_size(inputs, vocab_axis)
    c = losses.negative_likelihood_settings(size, alpha, threshold, z_loss)
    how = How(skip_ignored, vocab_axis, implementation)
    return losses.run_loss(c, inputs, how, targets, weights)


def linear_cross_entropy_loss(
    hidden: Array,
    kernel: Array,
    targets: Array,
    weights: Array | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    transposed: bool = False,
    chunk_bytes: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    skip_ignored: bool = False,
    vocab_axis: str | None = None,
    implementation: str | BlockSizes | None = None,
) -> TokenLoss:
    """`cross_entropy_loss` of hidden states.

    Args: of the head as for `linear_targeted_negative_loss`, the others as for
    `cross_entropy_loss`.

    Returns: a `TokenLoss` ``[...]``, differentiable in `hidden` and `kernel`.

    Raises: as for `cross_entropy_loss`, and for a `chunk_bytes` that is no size.

    Example:
      >>> import jax.numpy as jnp
      >>> from t5patches_kernels import linear_cross_entropy_loss
      >>> print(linear_cross_entropy_loss(
      ...     jnp.zeros((1, 2)), jnp.ones((2, 4)), jnp.array([0])).loss.round(4))
      [1.3863]
    """
    inputs = calls.linear_inputs(
        hidden, kernel, None, logit_scale, softcap, transposed, chunk_bytes, implementation
    )
    size = calls.vocab_size(inputs, vocab_axis)
    c = losses.cross_entropy_settings(size, label_smoothing, z_loss)
    how = How(skip_ignored, vocab_axis, implementation)
    return losses.run_loss(c, inputs, how, targets, weights)


def linear_policy_gradient_loss(
    hidden: Array,
    kernel: Array,
    ref_hidden: Array | None,
    ref_kernel: Array | None,
    targets: Array,
    weights: Array | None,
    advantages: Array,
    old_log_probs: Array | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    transposed: bool = False,
    chunk_bytes: int | None = None,
    clip: tuple[float, float] = (0.2, 0.2),
    kl: str = "exact",
    kl_coefficient: float = 0.0,
    entropy_coefficient: float = 0.0,
    skip_ignored: bool = False,
    vocab_axis: str | None = None,
    implementation: str | BlockSizes | None = None,
) -> PolicyLoss:
    """`policy_gradient_loss` of hidden states.

    Args: of the head as for `linear_targeted_negative_loss`, the others as for
    `policy_gradient_loss`; of the reference both `ref_hidden` and `ref_kernel`, or None for both.

    Returns: a `PolicyLoss` ``[...]``, differentiable in `hidden` and `kernel`.

    Raises: as for `policy_gradient_loss`; ValueError for half a reference, or a `chunk_bytes` that
    is no size.

    Example:
      >>> import jax.numpy as jnp
      >>> from t5patches_kernels import linear_policy_gradient_loss
      >>> h, w = jnp.zeros((2, 3)), jnp.ones((3, 4))
      >>> out = linear_policy_gradient_loss(
      ...     h, w, h, w, jnp.array([0, 1]), None, jnp.array([0.5, -2.0]), kl_coefficient=0.1)
      >>> print(out.loss, out.kl, out.entropy.round(4))
      [-0.5  2. ] [0. 0.] [1.3863 1.3863]
    """
    inputs = calls.linear_inputs(
        hidden, kernel, _both(ref_hidden, ref_kernel), logit_scale, softcap, transposed,
        chunk_bytes, implementation,
    )  # fmt: skip
    how = How(skip_ignored, vocab_axis, implementation)
    return losses.run_policy_gradient(
        inputs, how, targets, weights, advantages, old_log_probs, clip, kl, kl_coefficient,
        entropy_coefficient,
    )  # fmt: skip


def linear_token_statistics(
    hidden: Array,
    kernel: Array,
    targets: Array,
    ref_hidden: Array | None = None,
    ref_kernel: Array | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    transposed: bool = False,
    chunk_bytes: int | None = None,
    vocab_axis: str | None = None,
    implementation: str | BlockSizes | None = None,
) -> TokenStatistics:
    """`token_statistics` of hidden states.

    Args: of the head as for `linear_targeted_negative_loss`, the others as for
    `token_statistics`; of the reference both `ref_hidden` and `ref_kernel`, or neither.

    Returns: a `TokenStatistics` ``[...]``, differentiable as that of `token_statistics`.

    Raises: as for `token_statistics`; ValueError for half a reference, or a `chunk_bytes` that is
    no size.

    Example:
      >>> import jax.numpy as jnp
      >>> from t5patches_kernels import linear_token_statistics
      >>> out = linear_token_statistics(jnp.zeros((1, 2)), jnp.ones((2, 4)), jnp.array([0]))
      >>> print(out.entropy.round(4))
      [1.3863]
    """
    ref = _both(ref_hidden, ref_kernel)
    inputs = calls.linear_inputs(
        hidden, kernel, ref, logit_scale, softcap, transposed, chunk_bytes, implementation
    )
    how = How(vocab_axis=vocab_axis, implementation=implementation)
    return losses.run_token_statistics(inputs, how, targets)


def tokens_per_chunk(
    tokens: int,
    vocab_size: int,
    *,
    platform: str,
    chunk_bytes: int | None = None,
    skip_ignored: bool = False,
) -> int:
    """How many tokens' logits the losses of this module make at a time.

    At most those whose ``4 * vocab_size`` bytes each `chunk_bytes` holds, and about as many in each
    chunk, in whole tiles of 8 or 128 but for those that only `skip_ignored` makes smaller.

    Args:
      tokens: how many there are on a device.
      vocab_size: entries of the kernel on a device.
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``, as JAX's devices name it.
      chunk_bytes: as given to the loss; None for what suits the platform.
      skip_ignored: as given to the loss; with it there are several chunks, to skip some.

    Returns:
      Tokens a chunk; all there are where one chunk holds them.

    Raises:
      ValueError, TypeError: as for the losses; for another platform, and where there is nothing to
        share out.

    Example:
      >>> from t5patches_kernels.linear_losses import tokens_per_chunk
      >>> tokens_per_chunk(8192, 250112, platform="gpu")
      512
      >>> tokens_per_chunk(8192, 250112, platform="gpu", chunk_bytes=2 << 30)
      2048
    """
    least = chunked_linear.LEAST_ROWS
    for name, x in (("tokens", tokens), ("vocab_size", vocab_size)):
        checks.count(name, x)
    checks.one_of("platform", platform, tuple(chunked_linear.CHUNK_BYTES))
    size = checks.chunk_bytes(chunk_bytes, 4 * vocab_size * least, least)
    size = chunked_linear.own_bytes(platform, vocab_size) if size is None else size
    rows = chunked_linear.chunk_rows(tokens, vocab_size, size, skip_ignored=skip_ignored)
    return min(tokens, rows)
