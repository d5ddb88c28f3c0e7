"""A new objective is one entry: sums of terms made up here are right on every backend.

Each is held to textbook distributions in float64 and their autodiff, one dense function per term,
written here and shared with nothing.
"""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import GPU_FORM, gpu_form_by_name
from hypothesis import example, given, settings
from hypothesis import strategies as st

from t5patches_kernels import BlockSizes, calls
from t5patches_kernels.core import objectives
from t5patches_kernels.core.objectives import Objective, Settings

# --- Terms in float64 -----------------------------------------------------------------------------


class Textbook:
    """The distributions of rows: p, differentiable in z, and constants; ``[T, V]`` each."""

    def __init__(self, z, present, r, y, factors, numbers):
        self.size = size = z.shape[-1]
        self.present = present
        self.log_p = jax.nn.log_softmax(jnp.where(present, z, -1e30), axis=-1)
        self.p = jnp.exp(self.log_p)
        self.t = np.exp(np.asarray(r)) * factors
        self.q = self.t / self.t.sum(-1, keepdims=True)
        self.onehot = np.arange(size) == y[:, None]
        self.left = factors > 0  # what is not in the set N
        self.advantages, self.old_log_probs = numbers.values()

    def smoothed(self, q, eps, where=1.0):
        return (q + eps * where) / (1 + self.size * eps)


def cross_entropy(t, d, divergence=False):
    with np.errstate(divide="ignore", invalid="ignore"):
        own = np.where(t > 0, t * np.log(t), 0.0).sum(-1) if divergence else 0.0
    return own - jnp.where(t > 0, t * d.log_p, 0.0).sum(-1)


def reverse(d, c):
    log_s = np.log(d.smoothed(d.q, c.smoothing))
    return jnp.where(d.present, d.p * (d.log_p - log_s), 0.0).sum(-1)


def label_smoothed(d, c):
    on, off = 1 - c.label_smoothing, c.label_smoothing / (d.size - 1)
    entropy = -(on * math.log(on) + (d.size - 1) * off * math.log(off + 1e-20))
    return cross_entropy(np.where(d.onehot, on, off * d.present), d) - entropy


def policy_gradient(d, c):
    (low, high), a = c.clip, d.advantages
    ratio = jnp.exp(-cross_entropy(1.0 * d.onehot, d) - d.old_log_probs)
    surrogate = jnp.minimum(ratio * a, jnp.clip(ratio, 1 - low, 1 + high) * a)
    return c.entropy_coefficient * jnp.where(d.present, d.p * d.log_p, 0.0).sum(-1) - surrogate


DENSE = {
    objectives.likelihood: lambda d, c: cross_entropy(1.0 * d.onehot, d),
    objectives.forward: lambda d, c: cross_entropy(d.q, d, c.divergence),
    objectives.soft_cross_entropy: lambda d, c: cross_entropy(d.t, d),
    objectives.smoothed_forward: lambda d, c: cross_entropy(
        d.smoothed(d.q, c.smoothing, d.present), d, c.divergence
    ),
    objectives.reverse: reverse,
    objectives.smoothed_likelihood: lambda d, c: cross_entropy(
        d.smoothed(d.onehot, c.smoothing, d.present), d, c.divergence
    ),
    objectives.unlikelihood: lambda d, c: -jnp.log(jnp.where(d.left, d.p, 0.0).sum(-1)),
    objectives.negated_likelihood: lambda d, c: jnp.maximum(
        -cross_entropy(1.0 * d.onehot, d), c.threshold
    ),
    objectives.label_smoothed: label_smoothed,
    objectives.policy_gradient: policy_gradient,
}
OVER_THE_REFERENCE = [
    objectives.forward,
    objectives.soft_cross_entropy,
    objectives.smoothed_forward,
    objectives.reverse,
]
WITHOUT_REFERENCE = [
    objectives.likelihood,
    objectives.smoothed_likelihood,
    objectives.negated_likelihood,
    objectives.label_smoothed,
    objectives.policy_gradient,
]


# --- Made-up objectives ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MadeUp:
    """Terms with their factors, and on what they are tried."""

    kept: tuple
    pushed: tuple
    smoothing: float = 1e-3
    divergence: bool = False
    z_loss: float = 0.0
    edits: int = 0
    dtype: str = "float32"
    wide: bool = True  # of the two sizes of a backend
    seed: int = 0


def sums(terms):
    return st.lists(
        st.tuples(st.sampled_from([1.0, 0.5, 2.0]), st.sampled_from(terms)), min_size=1, max_size=3
    ).map(tuple)


def made_up_of(terms):
    return st.builds(
        MadeUp, sums(terms), sums(terms), st.sampled_from([1e-3, 1e-6]), st.booleans(),
        st.sampled_from([0.0, 1e-2]), st.sampled_from([0, 3]),
        st.sampled_from(["float32", "bfloat16"]), st.booleans(), st.integers(0, 2**31),
    )  # fmt: skip


MADE_UP = made_up_of(WITHOUT_REFERENCE + OVER_THE_REFERENCE) | made_up_of(
    [*WITHOUT_REFERENCE, objectives.unlikelihood]
)
# Rows of kept tokens read the reference too: a sum that they shared with rows of pushed-down ones
# once took it that they do not (loss off by 3.42).
BOTH_READ_THE_REFERENCE = MadeUp(
    ((1.0, objectives.smoothed_likelihood), (1.0, objectives.forward)),
    ((1.0, objectives.reverse),),
)
# Edits of a reference that nothing reads: the TPU kernel once looked for its maximum.
EDITS_OF_NOTHING = MadeUp(((1.0, objectives.likelihood),), ((1.0, objectives.likelihood),), edits=3)
_names = itertools.count()


@contextlib.contextmanager
def registered(kept, pushed):
    """An objective under a name of its own: programs and caches are kept under it."""

    def total(terms):
        return lambda row, c: sum(factor * term(row, c) for factor, term in terms)

    name = f"made-up-{next(_names)}"
    objectives.OBJECTIVES[name] = Objective(total(kept), total(pushed))
    try:
        yield name
    finally:
        del objectives.OBJECTIVES[name]


# --- Rows -----------------------------------------------------------------------------------------

WEIGHTS = np.array([1.0, -1.0, -0.5, 0.0, 1.0, -1.0, 1.0, -1.0], np.float32)
COTANGENTS = np.linspace(0.5, 2.0, len(WEIGHTS), dtype=np.float32)


def rows(m, size):
    """Logits, targets and edits: sure of the target, masked in both rows and in one, ignored."""
    rng = np.random.default_rng(m.seed)
    z, r = 2 * rng.standard_normal((2, len(WEIGHTS), size))
    y = rng.integers(size, size=len(WEIGHTS))
    r -= np.log(np.exp(r).sum(-1, keepdims=True))
    z[[0, 1], y[:2]] += 12
    r[[1, 5], y[[1, 5]]] += 12
    for t in range(4, 8):
        hidden = np.delete(np.arange(size), y[t])[rng.permutation(size - 1)[: size // 4]]
        r[t, hidden] = -np.inf
        if t < 6:
            z[t, hidden] = -np.inf
    z[3], r[3] = np.nan, np.nan
    z, r = (jnp.asarray(x, m.dtype) for x in (z, r))
    ids = np.stack([rng.permutation(size)[: m.edits] for _ in y]).astype(np.int32)
    factors = rng.choice([0.0, 0.25, 3.0], size=ids.shape).astype(np.float32)
    if m.edits:
        ids[::2, 0], ids[1, 1] = y[::2], -1
    return z, r, y, ids, factors


def numbers_of(z, y):
    """Advantages of both signs, and log-probabilities from which ratios of 0.6 to 1.6 follow."""
    z = np.nan_to_num(np.asarray(z, np.float64), nan=0.0, neginf=-1e30)
    own = (z - np.asarray(jax.nn.logsumexp(z, axis=-1, keepdims=True)))[np.arange(len(y)), y]
    log_ratios = np.resize([0.0, 0.5, -0.5, 0.1, 0.5], len(y))
    advantages = np.resize([1.0, -2.0, 0.5], len(y))
    return {
        name: np.asarray(x, np.float32)
        for name, x in (("advantages", advantages), ("old_log_probs", own - log_ratios))
    }


def what_is_left(m, second_row, y, ids, factors, size):
    """What multiplies the mass of every entry ``[T, V]``."""
    if not m.edits:
        left = np.maximum(0.0, 1 + WEIGHTS) * (second_row != "self")
        ids, factors = y[:, None], np.where(WEIGHTS < 0, left, 1.0)[:, None]
    elif second_row == "self":
        factors = 1.0 * (factors != 0)
    out = np.ones((len(y), size))
    for t, k in np.ndindex(*ids.shape):
        if ids[t, k] >= 0:
            out[t, ids[t, k]] *= factors[t, k]
    return out


def dense(m, c, second_row, z, r, y, ids, factors):
    """Losses and gradients in float64."""
    counts, numbers = WEIGHTS != 0, numbers_of(z, y)
    z, r = (np.where(counts[:, None], np.asarray(x, np.float64), 0.0) for x in (z, r))
    left = what_is_left(m, second_row, y, ids, factors, z.shape[-1])
    present = z > -1e30

    def losses(z):
        d = Textbook(z, present, r, y, left, numbers)
        kept, pushed = (
            sum(factor * DENSE[term](d, c) for factor, term in terms)
            for terms in (m.kept, m.pushed)
        )
        log_normaliser = jax.nn.logsumexp(jnp.where(present, z, -1e30), axis=-1)
        term = jnp.where(WEIGHTS < 0, c.alpha * pushed, kept) + c.z_loss * log_normaliser**2
        return jnp.where(counts, term, 0.0)

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        values, pull = jax.vjp(losses, jnp.asarray(z))
        return np.asarray(values), np.asarray(pull(jnp.asarray(COTANGENTS, jnp.float64))[0])


# --- Backends -------------------------------------------------------------------------------------

SIZES = {
    "xla": (130, 257),
    GPU_FORM: (48, 256),
    "pallas_tpu": (130, 257),
    "pallas_gpu": (136, 264),  # rows that its copies can take
    BlockSizes(cluster=2): (256, 264),
    "sharded": (130, 258),
}


def fused(backend, c, second_row, z, r, y, ids, factors, edits):
    """Losses and gradients of the loss that a public function would call."""
    numbers = numbers_of(z, y)

    def losses(z, r):
        axis, implementation = ("model", "xla") if backend == "sharded" else (None, backend)
        reference = r if second_row == "given" else None
        inputs = calls.logits_inputs(z, reference, implementation)
        how = calls.How(vocab_axis=axis, implementation=implementation)
        some = calls.Edits(jnp.asarray(ids), jnp.asarray(factors)) if edits else None
        outputs, _ = calls.call(c, inputs, how, y, WEIGHTS, some, numbers)
        return outputs["loss"]

    if backend == "sharded":
        mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        over = jax.P(None, "model")
        losses = jax.shard_map(losses, mesh=mesh, in_specs=(over, over), out_specs=jax.P())

    def total(z, r):
        values = losses(z, r)
        return (values * COTANGENTS).sum(), values

    (_, values), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(z, r)
    return np.asarray(values, np.float64), np.asarray(gradient, np.float64)


def check(backend, m, *, spoil=lambda m: m):
    """Holds a backend to the dense text on a made-up objective."""
    size = SIZES[backend][m.wide]
    z, r, y, ids, factors = rows(m, size)
    said = spoil(m)
    with registered(said.kept, said.pushed) as name:
        c = Settings(
            name, size, alpha=3.0, smoothing=m.smoothing, z_loss=m.z_loss,
            divergence=m.divergence, label_smoothing=0.1, threshold=-5.0, clip=(0.2, 0.3),
            entropy_coefficient=0.1,
        )  # fmt: skip
        second_row = objectives.reference_of(c)
        data = (z, r, y, ids, factors)
        want, by_logit = dense(m, c, second_row, *data)
        got, gradient = fused(backend, c, second_row, *data, m.edits > 0)
    size_of_terms = sum(factor for factor, _ in m.kept + m.pushed) * c.alpha
    rounding = 1e-5 * size_of_terms
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2 * rounding, err_msg="loss")
    most = np.abs(by_logit).max(-1, keepdims=True)
    allowed = rounding + most * (2**-7 if m.dtype == "bfloat16" else 1e-5)
    wrong = np.abs(gradient - by_logit) / allowed
    assert wrong.max() <= 1, f"gradient: errors of {wrong.max(-1)} times what is allowed"
    np.testing.assert_array_equal(got[WEIGHTS == 0], 0.0)
    np.testing.assert_array_equal(gradient[WEIGHTS == 0], 0.0)


def on(backend, examples):
    """The property for a backend; compiling is what costs."""

    @settings(max_examples=examples * settings.default.max_examples // 25)
    @given(m=MADE_UP)
    @example(m=BOTH_READ_THE_REFERENCE)
    @example(m=EDITS_OF_NOTHING)
    def test(m):
        with pytest.MonkeyPatch.context() as patch:
            gpu_form_by_name(patch)
            check(backend, m)

    return test


test_xla = on("xla", 8)
test_xla_for_gpus = on(GPU_FORM, 4)
test_a_sharded_vocabulary = on("sharded", 4)
test_pallas_tpu = on("pallas_tpu", 3)
test_pallas_gpu = on("pallas_gpu", 2)
test_pallas_gpu_with_clusters = pytest.mark.slow(on(BlockSizes(cluster=2), 4))


def test_control_a_wrong_term_is_seen():
    def spoil(m):
        return dataclasses.replace(m, pushed=((1.001, objectives.reverse),))

    with pytest.raises(AssertionError, match="loss"):
        check("xla", BOTH_READ_THE_REFERENCE, spoil=spoil)


def test_every_term_of_an_objective_is_tried():
    used = {term for o in objectives.OBJECTIVES.values() for term in (o.kept, o.pushed)}
    tried = {*OVER_THE_REFERENCE, *WITHOUT_REFERENCE, objectives.unlikelihood}
    assert used <= tried == DENSE.keys()


def test_terms_that_need_different_second_rows_are_refused():
    m = dataclasses.replace(BOTH_READ_THE_REFERENCE, kept=((1.0, objectives.unlikelihood),))
    with pytest.raises(NotImplementedError, match="leave out `unlikelihood` or the terms over q"):
        check("xla", m)


# --- As a user adds one ---------------------------------------------------------------------------

NEW_LINE = '    "rf": Objective(reverse, forward),\n'
ADDED = """
import jax.numpy as jnp
from t5patches_kernels import targeted_negative_loss, TRAINING_OBJECTIVES

z, r = jnp.array([[2.0, 1, 0], [2, 1, 0]]), jnp.array([[0.0, 1, 2], [2, 0, 1]])
y, w = jnp.array([0, 0]), jnp.array([1.0, -1])
loss = lambda name, **how: targeted_negative_loss(z, r, y, w, objective=name, alpha=2.0, **how).loss
rr, ff, rf = (loss(name) for name in ("tnrr", "tnff", "rf"))
assert "rf" in TRAINING_OBJECTIVES and [*rf] == [rr[0], ff[1]] and rr[1] != ff[1], (rr, ff, rf)
try:
    loss("rf", implementation="reference")
except NotImplementedError as error:
    assert "say it in tn_terms of dense.py" in str(error)
else:
    raise SystemExit("the dense text made one up")
"""


def test_a_new_line_is_all_that_the_losses_need(tmp_path):
    package = pathlib.Path(objectives.__file__).parent.parent
    copy = tmp_path / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    table = copy / "core" / "objectives.py"
    begin = "OBJECTIVES: Mapping[str, Objective] = {\n"
    text = table.read_text()
    assert text.count(begin) == 1
    table.write_text(text.replace(begin, begin + NEW_LINE))
    subprocess.run([sys.executable, "-c", ADDED], cwd=tmp_path, check=True, timeout=300)
