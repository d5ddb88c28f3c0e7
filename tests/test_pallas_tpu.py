"""The TPU kernels, interpreted: the oracle, the simulated memories, and every transform."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from harness import (
    CASES,
    MAIN,
    TAKES_EDITS,
    Batch,
    _compiled,
    assert_as_good_as_dense,
    batch,
    one_of_each,
    policy,
    slow_unless,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax._src.state.types import WriteEffect
from jax.experimental.pallas import tpu as pltpu
from test_transforms import CT, LINEAR, LOSSES, POLICY, H, K, R, W, Y, Z, close, weighed

import t5patches_kernels as tk
from t5patches_kernels.backends.pallas_tpu import kernel as pallas_tpu
from t5patches_kernels.backends.pallas_tpu import plan as plans
from t5patches_kernels.core.objectives import KLS, Settings
from t5patches_kernels.core.operation import Operation, Stage

NAME = "pallas_tpu"
SEEDS = st.integers(0, 2**32 - 1)
# On every run a third of them; test_sets_of_edits and test_bfloat16 have others.
SWEEP = [slow_unless(i % 3 == 0, name, 257) for i, name in enumerate(CASES)]
SWEEP += [slow_unless(i % 4 == 1, name, 7) for i, name in enumerate(MAIN)]


@pytest.fixture
def _fresh_programs():
    """What a test changes about the kernels must be traced, and must not be left behind."""

    def clear():
        _compiled.cache_clear()
        jax.clear_caches()

    clear()
    yield
    clear()


@pytest.mark.parametrize(("name", "size"), SWEEP)
@settings(max_examples=2)
@given(seed=SEEDS)
def test_float32(name, size, seed):
    assert_as_good_as_dense(name, NAME, batch(seed, size))


@pytest.mark.parametrize("name", [slow_unless(i % 3 == 0, x) for i, x in enumerate(MAIN)])
@settings(max_examples=2)
@given(seed=SEEDS)
def test_bfloat16(name, seed):
    assert_as_good_as_dense(name, NAME, batch(seed, 257, dtype=jnp.bfloat16), jnp.bfloat16)


@pytest.mark.parametrize("name", [slow_unless(i % 4 == 1, x) for i, x in enumerate(TAKES_EDITS)])
@settings(max_examples=2)
@given(seed=SEEDS)
def test_sets_of_edits(name, seed):
    assert_as_good_as_dense(name, NAME, batch(seed, 257, edits=5))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [slow_unless((name == "tnrf") == (dtype == jnp.float32), name, dtype)
     for name in ("tnrf", "tnrf-divergence", "tnrll") for dtype in (jnp.float32, jnp.bfloat16)],
)  # fmt: skip
def test_blocks_of_kept_tokens(name, dtype):
    """They take a branch of their own, beside blocks that do not."""
    b = batch(6, 257, dtype=dtype)
    kept = np.arange(len(b.weights)) >= 16
    b = b._replace(weights=np.where(kept, np.abs(b.weights), b.weights))
    assert_as_good_as_dense(name, NAME, b, dtype)


@pytest.mark.parametrize("name", [slow_unless(False, "tnrf"), "tnrf-divergence"])
def test_rows_of_several_steps(name):
    """Loops of several steps, in blocks with pushed-down tokens and without."""
    assert_as_good_as_dense(name, NAME, one_of_each(batch(0, 2049)))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("tnrf", np.float32),
        slow_unless(False, "tnrr", jnp.bfloat16),
        slow_unless(False, "ul", jnp.bfloat16),
        slow_unless(False, "ce-smoothed", np.float32),
    ],
)
def test_many_rows_go_in_taller_blocks(name, dtype):
    """The last one ragged, some of kept tokens alone, some without edits."""
    edits, copies = 5 if name in TAKES_EDITS else 0, 12 if dtype == jnp.bfloat16 else 6
    parts = [batch(seed, 257, edits=edits, dtype=dtype) for seed in range(copies)]
    b = Batch(*(np.concatenate(x) for x in zip(*parts, strict=True)))
    rows, some = np.arange(len(b.ids)), len(b.ids) // 2
    kept = np.where(rows < some, b.weights, np.abs(b.weights))
    b = b._replace(weights=kept, ids=np.where(rows[:, None] < some, b.ids, -1))
    size = (Stage.VALUE_AND_GRAD, 257, (dtype(0).itemsize,) * 2, plans.LEAST.vmem)
    assert _plan("tnrf", *size, tokens=len(rows)).rows == 2 * _plan("tnrf", *size).rows
    assert len(rows) % _plan("tnrf", *size, tokens=len(rows)).rows
    assert_as_good_as_dense(name, NAME, b, dtype)


def test_few_rows_have_edits():
    """Lists of edits are passed over where they are empty, and blocks without any."""
    b = batch(5, 257, edits=5)
    rows = np.arange(len(b.ids))
    some = (rows % 5 == 3) & (rows > 20)
    assert_as_good_as_dense("tnff", NAME, b._replace(ids=np.where(some[:, None], b.ids, -1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [(name, size, (np.float32, jnp.bfloat16)[(i + j) % 2])
     for i, name in enumerate(CASES) for j, size in enumerate((1, 130, 1000, 2049, 32100))
     if (name, size) != ("ce-smoothed", 1)],  # which is refused
)  # fmt: skip
def test_sizes(name, size, dtype):
    edits = 64 if name in TAKES_EDITS else 0
    assert_as_good_as_dense(name, NAME, batch(0, size, edits=edits, dtype=dtype), dtype)


@pytest.mark.usefixtures("_fresh_programs")
@pytest.mark.parametrize(
    ("name", "other"),
    [
        slow_unless(False, "tnff", -1.0),
        slow_unless(False, "tnrll", -1.0),
        ("tnrll", 1.0),
        slow_unless(False, "tnrf", 1.0),
    ],
)
def test_a_padded_vocabulary_is_not_done_twice(name, other, monkeypatch):
    """Masks in the last 128 columns are no reason to do a block again; elsewhere they are."""
    honest = pallas_tpu._Block.store_gradient

    def spoilt(self, *arguments, masked, **options):
        honest(self, *arguments, masked=masked, **options)
        if masked:
            self.refs["dz"][...] = jnp.full_like(self.refs["dz"][...], jnp.nan)

    def gradient(masked):
        z, r = (x.at[:, masked].set(-jnp.inf) for x in logits)
        y, w = jnp.arange(8), jnp.array([1.0, other] * 4)
        return jax.grad(lambda z: LOSSES[name](z, r, y, w, implementation=NAME).loss.sum())(z)

    monkeypatch.setattr(pallas_tpu._Block, "store_gradient", spoilt)
    logits = jax.random.normal(jax.random.key(0), (2, 8, 300))
    assert np.isfinite(gradient(slice(291, 300))).all()
    assert np.isnan(gradient(slice(100, 109))).all()


# --- Rows that do not fit -------------------------------------------------------------------------


@pytest.fixture
def _little_vmem(monkeypatch, _fresh_programs):
    least = plans.Chip("little", plans._RESERVED + 80 * 1024)
    monkeypatch.setattr(plans, "LEAST", least)


def _plan(objective, stage, columns, itemsizes, vmem, private=True, of=plans.plan, **options):
    op = Operation(Settings(objective, columns, smoothing=1e-6))
    return of(op, stage, columns, itemsizes, private, vmem, **options)


@pytest.mark.usefixtures("_little_vmem")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [slow_unless(dtype == often, name, dtype)
     for name, often in (("tnff", None), ("tnrf", np.float32), ("ul", jnp.bfloat16),
                           ("ce-smoothed", None))
     for dtype in (np.float32, jnp.bfloat16)],
)  # fmt: skip
def test_in_tiles(name, dtype):
    assert _plan("tnrf", Stage.VALUE_AND_GRAD, 1000, (4, 4), plans.LEAST.vmem) is None
    assert _plan("tnrf", Stage.GRADIENT, 1000, (2, 2), plans.LEAST.vmem).columns < 1000
    edits = 5 if name in TAKES_EDITS else 0
    assert_as_good_as_dense(name, NAME, batch(2, 1000, edits=edits, dtype=dtype), dtype)


@pytest.fixture
def _some_vmem(monkeypatch, _fresh_programs):
    """Room for a reference of 1000 entries and some of its model's logits."""
    some = plans.Chip("some", plans._RESERVED + 190 * 1024)
    monkeypatch.setattr(plans, "LEAST", some)
    size = (Stage.VALUE_AND_GRAD, 1000, (4, 4), some.vmem)
    assert _plan("tnrf", *size) is None
    streamed = _plan("tnrf", *size, of=plans.streamed)
    assert 0 < streamed.held < streamed.windows


@pytest.mark.usefixtures("_some_vmem")
@pytest.mark.parametrize("name", ["tnrf", "tnff-divergence"])
def test_in_windows(name):
    edits = 5 if name in TAKES_EDITS else 0
    assert_as_good_as_dense(name, NAME, batch(2, 1000, edits=edits))


@pytest.mark.slow
@pytest.mark.usefixtures("_some_vmem")
@pytest.mark.parametrize("kl", KLS)
def test_a_policy_in_windows(kl):
    """Also the reference's own logits of the targets, which are in one window each."""
    c = Settings("policy_gradient", 1000, clip=(0.2, 0.3), kl=kl, kl_coefficient=0.1)
    size = (Operation(c), Stage.VALUE_AND_GRAD, 1000, (4, 4), False, plans.LEAST.vmem)
    assert plans.plan(*size) is None
    assert plans.streamed(*size).windows > 2
    rng = np.random.default_rng(4)
    z, r = (jnp.asarray(rng.standard_normal((20, 1000)), jnp.float32) for _ in range(2))
    y = jnp.asarray(rng.integers(1000, size=20))
    loss = policy(tk.policy_gradient_loss, **POLICY, kl=kl)

    def grad(implementation):
        def total(z):
            out = loss(z, r, y, jnp.cos(y.astype(jnp.float32)), implementation=implementation)
            return out.loss.sum(), out

        return jax.jit(jax.value_and_grad(total, has_aux=True))(z)

    close(grad(NAME), grad("reference"), rtol=1e-4)


def test_plans_stay_within_every_chip():
    for chip in plans._CHIPS:
        for columns in (1, 32100, 32128, 250112, 1_000_003):
            for sizes in ((4, 4), (2, 2), (4, 2), (4,)):
                for objective in ("tnff", "tnrf", "ce"):
                    for stage in Stage:
                        size = (objective, stage, columns, sizes, chip.vmem, len(sizes) == 2)
                        plan, tall = _plan(*size), _plan(*size, tokens=2048)
                        for found in (plan, tall, _plan(*size, of=plans.streamed)):
                            assert found is None or found.limit <= chip.vmem
                        whole = plan is not None and plan.columns >= columns
                        assert whole or columns > 100_000
                        if tall != plan:  # twice the rows, and none of what is held given up
                            assert (tall.rows, tall.parts) == (2 * plan.rows, plan.parts)


def test_taller_blocks_where_they_fit_and_are_many():
    size = ("tnrr", Stage.VALUE_AND_GRAD, 32128, (2, 2))
    for chip in plans._CHIPS:
        rows = [_plan(*size, chip.vmem, tokens=tokens).rows for tokens in (511, 512, 2048)]
        assert rows == ([16, 16, 16] if chip.kind == "TPU v4" else [16, 32, 32])


# --- The simulated machine ------------------------------------------------------------------------


@pytest.fixture
def _simulated(monkeypatch, _fresh_programs):
    """TPU memories and copies, NaN where nothing was written, and a watch for races."""
    parameters = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait"
    )
    monkeypatch.setattr(pallas_tpu, "INTERPRET", parameters)
    yield
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.usefixtures("_simulated")
@pytest.mark.parametrize(
    "name", [slow_unless(x == "tnrf", x) for x in ("tnff", "tnrf", "tnfll", "ul", "ce")]
)
def test_no_race_and_nothing_uninitialised(name):
    edits = 3 if name in TAKES_EDITS else 0
    assert_as_good_as_dense(name, NAME, one_of_each(batch(3, 200, edits=edits)))
    assert not interpreter.races.races_found


@pytest.mark.usefixtures("_simulated", "_some_vmem")
def test_no_race_in_windows():
    assert_as_good_as_dense("tnrf", NAME, one_of_each(batch(3, 1000, edits=3)))
    assert not interpreter.races.races_found


@pytest.mark.parametrize("name", LOSSES)
def test_no_kernel_writes_to_an_operand(name):
    """A window may be all there is of an operand, or be used again without being fetched again."""
    loss = functools.partial(LOSSES[name], implementation=NAME)
    program = jax.make_jaxpr(jax.grad(lambda z: loss(z, R, Y, W).loss.sum()))(Z)
    kernels = list(_kernels(program.jaxpr))
    assert kernels
    for kernel in kernels:
        body, operands = kernel.params["jaxpr"], kernel.params["grid_mapping"].num_inputs
        written = {e.input for e in body.effects if isinstance(e, WriteEffect)}
        assert written  # what would be seen
        assert not written & set(body.invars[:operands])


def _kernels(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        elif equation.primitive.name == "t5patches_stage":  # what its lowering would trace
            stage = equation.params

            def run(*x, of=stage):
                inputs = jax.tree.unflatten(of["tree"], x)
                return pallas_tpu.run(plans.LEAST, True, of["op"], of["stage"], *inputs)

            yield from _kernels(jax.make_jaxpr(run)(*(v.aval for v in equation.invars)).jaxpr)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _kernels(inner)


@pytest.mark.usefixtures("_simulated")
@pytest.mark.parametrize("name", [slow_unless(x == "tnrf", x) for x in ("tnff", "tnrf", "ul")])
def test_a_grid_of_one_step_leaves_its_inputs_alone(name):
    """An edit patches a copy, so the caller's arrays stay what they were."""
    z, r, y = Z[0, :5], R[0, :5], Y[0, :5]
    before = np.asarray(z), np.asarray(r)
    w = -jnp.ones(5)
    out = jax.grad(lambda z: LOSSES[name](z, r, y, w, implementation=NAME).loss.sum())(z)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(z, before[0])
    np.testing.assert_array_equal(r, before[1])


# --- Transforms -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [slow_unless(x in ("tnrll", "nl"), x) for x in ("tnff", "tnrll", "ul", "nl")]
)
def test_any_cotangent(name):
    def grad(implementation):
        loss = functools.partial(LOSSES[name], implementation=implementation)
        return jax.jit(jax.grad(lambda z: weighed(loss(z, R, Y, W))))(Z)

    close(grad(NAME), grad("reference"))


@pytest.mark.parametrize("name", ["tnrf", slow_unless(False, "ce")])
def test_vmap_folds_into_rows_and_remat(name):
    def total(z, r, y, w, ct, implementation=NAME):
        return weighed(LOSSES[name](z, r, y, w, implementation=implementation), ct)

    arguments = (Z, R, Y, W, CT)
    of_each = jax.vmap(jax.grad(functools.partial(total, implementation="reference")))
    want = jax.jit(of_each)(*arguments)
    close(jax.vmap(jax.grad(total))(*arguments), want)
    close(jax.grad(lambda z: jax.vmap(total)(z, *arguments[1:]).sum())(Z), want)
    shared = jax.vmap(jax.grad(total), (0, None, None, None, None))
    close(shared(Z, *(x[0] for x in arguments[1:]))[0], want[0])
    close(jax.grad(jax.checkpoint(total))(*(x[0] for x in arguments)), want[0])
    text = str(jax.make_jaxpr(jax.vmap(jax.grad(total)))(*arguments))
    assert f"f32[{Z.size // Z.shape[-1]},{Z.shape[-1]}]" in text  # one kernel of all rows


def _over_the_vocabulary(name, check_vma):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    logits, rows = jax.P("data", None, "model"), jax.P("data", None)
    loss = functools.partial(LOSSES[name], vocab_axis="model", implementation=NAME)
    return jax.shard_map(
        lambda z, r, y, w: loss(z, r, y, w).loss, mesh=mesh,
        in_specs=(logits, logits, rows, rows), out_specs=rows, check_vma=check_vma,
    )  # fmt: skip


def test_the_interpreter_says_what_it_cannot():
    with pytest.raises(NotImplementedError, match="check_vma=False"):
        _over_the_vocabulary("tnff", True)(Z, R, Y, W)


@pytest.mark.parametrize("name", ["tnff", "tnrr"])
def test_split_vocabulary(name):
    call = _over_the_vocabulary(name, False)
    f = jax.jit(jax.value_and_grad(lambda z: (call(z, R, Y, W) * CT).sum()))
    want = jax.value_and_grad(
        lambda z: (LOSSES[name](z, R, Y, W, implementation="reference").loss * CT).sum()
    )
    close(f(Z), want(Z))


@pytest.mark.parametrize(
    ("name", "softcap"),
    [slow_unless(False, "tnff", None), ("tnrf", 2.0), slow_unless(False, "ul", None)],
)
def test_linear(name, softcap):
    def grads(implementation):
        loss = functools.partial(LINEAR[name], softcap=softcap, implementation=implementation)
        f = jax.value_and_grad(lambda h, k: weighed(loss(h, k, H, K, Y, W)), (0, 1))
        return jax.jit(f)(H, K)

    close(grads(NAME), grads("reference"), rtol=1e-4)


def test_statistics():
    got, want = (tk.token_statistics(Z, Y, R, implementation=i) for i in (NAME, "reference"))
    close(got._replace(correct=0), want._replace(correct=0))
    np.testing.assert_array_equal(got.correct, want.correct)


# --- Controls -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_fresh_programs")
def test_control_an_unmasked_edge_is_seen(monkeypatch):
    honest = pallas_tpu._Block.read

    def careless(self, name, start, groups, edge, *rows):
        return honest(self, name, start, groups, 0, *rows)

    monkeypatch.setattr(pallas_tpu._Block, "read", careless)
    with pytest.raises(AssertionError, match=r"not equal|against the dense formula's"):
        assert_as_good_as_dense("tnff", NAME, batch(0, 257))
