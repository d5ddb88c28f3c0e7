"""Every error a user can make, caught at trace time: what was got, what is needed, what to do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DIRECTIONS = ("forward", "reverse")


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(np.shape(x))


def concrete(x: Any) -> np.ndarray | None:
    """The values of `x` where they are known at trace time."""
    return None if isinstance(x, jax.core.Tracer) else np.asarray(x)


def _dtype(name: str, x: Any) -> jnp.dtype:
    """Of an array, or of a Python number where a scalar is due."""
    if not (hasattr(x, "dtype") or isinstance(x, int | float | complex)):
        remedy = f": pass jnp.asarray({name})" if isinstance(x, list | tuple) else ""
        raise TypeError(f"{name} must be an array, got {type(x).__name__}{remedy}.")
    return jnp.dtype(jnp.result_type(x))


def floats(name: str, x: Any, *, float64: bool = False) -> None:
    """Logits, hidden states and kernels: float32 or bfloat16 (float64 in the reference)."""
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}.")
    dtype = jnp.result_type(x)
    allowed = [jnp.float32, jnp.bfloat16] + ([jnp.float64] if float64 else [])
    if dtype in allowed:
        return
    remedy = {
        "float16": "float16 is not tested yet; cast to float32 or bfloat16",
        "float64": 'cast to float32, or pass implementation="reference", which computes in float64',
    }.get(str(dtype), f"cast it: {name}.astype(jnp.float32)")
    raise TypeError(f"{name} must be float32 or bfloat16, got {dtype}: {remedy}.")


def rows(name: str, x: Any, *, last: str) -> None:
    """An array whose last dimension has a meaning."""
    if len(_shape(x)) < 1:
        raise ValueError(f"{name} must have shape [..., {last}], got the scalar shape ().")
    if _shape(x)[-1] == 0:
        raise ValueError(f"{name} has an empty last dimension: shape {_shape(x)}.")


def sizes_known(name: str, x: Any) -> None:
    """No symbolic sizes, as of `jax.export`: tokens and columns are cut into blocks."""
    if not all(isinstance(size, int) for size in _shape(x)):
        raise NotImplementedError(
            f"{name} has symbolic sizes, {_shape(x)}, and is cut into blocks, as many as its sizes "
            'need: export a program for each size, or pass implementation="reference".'
        )


def same_shape(name: str, x: Any, like_name: str, like: Any) -> None:
    """Two arrays that must agree."""
    if _shape(x) != _shape(like):
        raise ValueError(
            f"{name} and {like_name} must have the same shape, got {_shape(x)} and {_shape(like)}."
        )


def per_token(name: str, x: Any, like_name: str, like: Any) -> None:
    """One entry per token of `like`."""
    need = _shape(like)[:-1]
    if _shape(x) == need:
        return
    remedy = ""
    if _shape(x) == _shape(like):
        remedy = f" {name} takes one entry a token, not one a vocabulary entry (no one-hot)."
    elif _shape(x) == ():
        remedy = f" One for all tokens is jnp.full({need}, {name})."
    elif _shape(x) == need[:-1]:
        remedy = f" One for all of a sequence is jnp.broadcast_to({name}[..., None], {need})."
    raise ValueError(
        f"{name} must have shape {need}, that of {like_name} {_shape(like)} without its last "
        f"dimension, got {_shape(x)}.{remedy}"
    )


def integers(name: str, x: Any) -> None:
    """Token ids."""
    dtype = _dtype(name, x)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"{name} must be integer token ids, got {dtype}: cast them with "
            f"{name}.astype(jnp.int32)."
        )


def weights(x: Any) -> None:
    """Token weights: any real number."""
    dtype = _dtype("weights", x)
    if dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"weights must be real numbers (> 0 kept, < 0 pushed down, 0 ignored), got {dtype}: "
            "cast them with weights.astype(jnp.float32)."
        )


def real_numbers(name: str, x: Any) -> None:
    """What a token brings besides its weight, in floating point."""
    dtype = _dtype(name, x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating point, got {dtype}: cast them with "
            f"{name}.astype(jnp.float32)."
        )


def clip(x: Any) -> tuple[float, float]:
    """How far a ratio may leave 1, below and above."""
    if not isinstance(x, tuple | list) or len(x) != 2:
        raise TypeError(
            "clip must be a pair (below, above), as in clip=(0.2, 0.2) for a ratio of 0.8 to 1.2, "
            f"got {x!r}."
        )
    low, high = (number(f"clip[{k}]", side, least=0.0) for k, side in enumerate(x))
    if low > 1.0:
        raise ValueError(
            f"clip[0] must be in [0, 1], got {low}: the ratio is kept above 1 - clip[0], and no "
            "ratio is negative."
        )
    return low, high


def edits(x: Any, like_name: str, like: Any) -> None:
    """A set of edited ids a token."""
    ids, factors = getattr(x, "ids", None), getattr(x, "factors", None)
    if ids is None or factors is None:
        raise ValueError(
            "edits needs both ids and factors, each [..., K]: Edits(ids=..., factors=...). Got "
            f"ids={'None' if ids is None else _shape(ids)}, "
            f"factors={'None' if factors is None else _shape(factors)}. "
            "A factor of 0 removes an id."
        )
    integers("edits.ids", ids)
    same_shape("edits.factors", factors, "edits.ids", ids)
    lead = _shape(like)[:-1]
    if len(_shape(ids)) != len(lead) + 1 or _shape(ids)[:-1] != lead:
        raise ValueError(
            f"edits.ids must have shape {(*lead, 'K')}: that of {like_name} {_shape(like)} with K "
            f"ids in place of its last dimension, got {_shape(ids)}. Use -1 for no id."
        )
    real_numbers("edits.factors", factors)
    known_ids, known = concrete(ids), concrete(factors)
    if known is None or known_ids is None:
        return
    of_ids = known.astype(np.float32)[known_ids >= 0]  # -1 lists none, whatever its factor
    if (of_ids < 0).any():
        raise ValueError(
            f"edits.factors must be >= 0, got {of_ids.min()}: a factor multiplies an id's "
            "probability (0 removes it, 0.5 halves it, 3 triples it)."
        )


def number(name: str, x: Any, *, least: float | None = None) -> float:
    """A static option."""
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"{name} must be a Python number, got a traced value: it is part of the compiled "
            "program. Multiply the loss instead, or mark the argument static under jit."
        )
    try:
        if isinstance(x, str | bytes | bool | np.bool_):  # which float() takes
            raise TypeError
        value = float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {x!r}.") from None
    if not np.isfinite(value) or (least is not None and value < least):
        bound = "" if least is None else f" and >= {least}"
        raise ValueError(f"{name} must be finite{bound}, got {value}.")
    least_normal, most = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
    if value and not least_normal <= abs(value) <= most:
        raise ValueError(
            f"{name}={value} is beyond float32, in which losses are computed: pass 0, or a number "
            f"of {least_normal:.2g} to {most:.2g} in size."
        )
    return value


def flag(name: str, x: Any) -> bool:
    """A static option that is on or off."""
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"{name} must be True or False, got a traced value: it is part of the compiled "
            "program. Mark the argument static under jit."
        )
    if not isinstance(x, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {x!r}.")
    return bool(x)


def softcap(x: Any) -> float | None:
    """A bound of the logits, or None for none."""
    if x is None:
        return None
    value = number("softcap", x)
    if value <= 0:
        raise ValueError(
            f"softcap must be > 0, got {value}: it is the bound c in c * tanh(z / c). Pass None "
            "for no bound."
        )
    return value


def count(name: str, x: Any) -> int:
    """A number of things, at least 1."""
    if isinstance(x, bool | np.bool_) or not isinstance(x, int | np.integer):
        raise TypeError(f"{name} must be a Python int, got {x!r}.")
    if x < 1:
        raise ValueError(f"{name} must be at least 1, got {x}.")
    return int(x)


def axis(x: Any) -> str | None:
    """The mesh axis that splits the vocabulary, or None for none."""
    if x is None or isinstance(x, str):
        return x
    raise TypeError(
        f"vocab_axis must be the name of one mesh axis, got {x!r}: one axis of the mesh splits "
        "the vocabulary."
    )


def chunk_bytes(x: Any, least: int, least_tokens: int) -> int | None:
    """A bound of the logits that are made at a time, or None for the device's own."""
    if x is None:
        return None
    if isinstance(x, bool | np.bool_) or not isinstance(x, int | np.integer):
        raise TypeError(
            "chunk_bytes must be a Python int, as in chunk_bytes=1 << 30 for 1 GiB, or None for "
            f"what suits the device, got {x!r}."
        )
    if x < least:
        raise ValueError(
            f"chunk_bytes must hold the float32 logits of {least_tokens} tokens, here {least} "
            f"bytes, got {x}: it counts bytes (1 << 30 is 1 GiB). Pass None for what suits the "
            "device."
        )
    return int(x)


def one_of(name: str, x: Any, valid: tuple[str, ...]) -> None:
    """A choice by name."""
    if x not in valid:
        raise ValueError(f"{name} must be one of {', '.join(valid)}, got {x!r}.")


def smoothing_for_reverse(smoothing: float, why: str) -> None:
    """The reverse divergence to a distribution with a zero in it is infinite."""
    if smoothing == 0.0:
        raise ValueError(
            f"smoothing must be > 0 for {why}: the reverse KL to a distribution from which an id "
            "has been removed is infinite. Use the default, smoothing=1e-6."
        )


def label_smoothing(x: Any, vocab_size: int) -> float:
    """A probability that is spread over the other entries."""
    value = number("label_smoothing", x, least=0.0)
    if value >= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {value}.")
    if value and vocab_size < 2:
        raise ValueError("label_smoothing needs a vocabulary of at least 2 entries, got 1.")
    return value


def head(hidden_name: str, hidden: Any, kernel_name: str, kernel: Any, transposed: bool) -> None:
    """Hidden states and the matrix that makes logits of them."""
    rows(hidden_name, hidden, last="D")
    if len(_shape(kernel)) != 2:
        raise ValueError(
            f"{kernel_name} must be a matrix [D, V] ([V, D] with transposed=True), got shape "
            f"{_shape(kernel)}."
        )
    if _shape(kernel)[1 if transposed else 0] != _shape(hidden)[-1]:
        flipped = _shape(kernel)[0 if transposed else 1] == _shape(hidden)[-1]
        remedy = f" Pass transposed={not transposed}." if flipped else ""
        layout = "[V, D] with transposed=True" if transposed else "[D, V]"
        raise ValueError(
            f"{kernel_name} must be {layout} with D = {_shape(hidden)[-1]}, the last dimension of "
            f"{hidden_name} {_shape(hidden)}, got {_shape(kernel)}.{remedy}"
        )
    if 0 in _shape(kernel):
        raise ValueError(f"{kernel_name} has an empty vocabulary: shape {_shape(kernel)}.")


def reference(given: Any, what: str, objective: str) -> None:
    """An objective that reads a second model needs one."""
    if not given:
        raise ValueError(
            f"{objective} needs a reference, got {what}=None: pass the frozen model's."
        )


def reference_for_kl(reference: Any, what: str, kl_coefficient: float) -> None:
    """A divergence needs something to diverge from."""
    if not reference and kl_coefficient:
        raise ValueError(
            f"kl_coefficient={kl_coefficient} needs a reference, got {what}=None: pass the frozen "
            "model's, or kl_coefficient=0."
        )


def same_vocabulary(kernel: Any, ref_kernel: Any, transposed: bool) -> None:
    """The two heads must speak of the same entries; their hidden sizes may differ."""
    axis = 0 if transposed else 1
    got, ref = _shape(kernel)[axis], _shape(ref_kernel)[axis]
    if got != ref:
        raise ValueError(
            f"kernel and ref_kernel must have the same vocabulary, got {got} and {ref} (shapes "
            f"{_shape(kernel)} and {_shape(ref_kernel)})."
        )
