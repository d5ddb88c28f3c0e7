"""Every TPU kernel through the real TPU compiler, ahead of time: no TPU takes part.

Static figures: what compiles, how often arrays of [T, V] are read and written by the optimised
program, and what it holds.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from gpu_topology import passes
from harness import CASES, MAIN, slow_unless
from tpu_topology import CHIPS, compile_for, device, needs_compiler, topology

import t5patches_kernels as tk
from bench import common, tpu_static
from t5patches_kernels.backends.pallas_tpu import math as tpu_math
from t5patches_kernels.backends.pallas_tpu import plan as plans
from t5patches_kernels.core.objectives import TARGETED_NEGATIVE, Settings
from t5patches_kernels.core.operation import Operation, Stage

pytestmark = [needs_compiler, pytest.mark.filterwarnings("ignore:.*TPU")]

NAME = "pallas_tpu"
DTYPES = (jnp.float32, jnp.bfloat16)
MODES = ("value", "gradient")
COLUMNS = (32128, 32100, 250112)
ROWS = (2048, 2044, 1)
ALONE = ("ul", "nl", "ce")  # objectives without a reference


def shapes(t, v, dtype):
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    logits = jax.ShapeDtypeStruct((t, v), dtype)
    return logits, logits, jax.ShapeDtypeStruct((t,), jnp.int32), f32((t,))


def total(name, mode, edits=None):
    def f(z, r, y, w):
        return CASES[name](z, r, y, w, edits, NAME).loss.sum()

    return jax.value_and_grad(f) if mode == "gradient" else f


def compiled(chip, name, dtype, mode, v, t):
    return compile_for(chip, total(name, mode), *shapes(t, v, dtype))


# Every chip with every objective, type and mode; vocabularies and numbers of rows take turns, so
# that every two of these values meet. On every run each chip has two of the objectives and each
# objective a chip at least, in one type and mode; they take turns too.
GRID = [
    slow_unless(
        (i + j) % 4 == 0 and (k, m) == ((i + j // 2) % 2, (i + j // 4) % 2),
        chip, name, dtype, mode, COLUMNS[(i + j + k) % 3], ROWS[(j + m + 2 * i) % 3],
    )
    for i, chip in enumerate(CHIPS)
    for j, name in enumerate(MAIN)
    for k, dtype in enumerate(DTYPES)
    for m, mode in enumerate(MODES)
]  # fmt: skip


@pytest.mark.parametrize(("chip", "name", "dtype", "mode", "v", "t"), GRID)
def test_compiles(chip, name, dtype, mode, v, t):
    text = compiled(chip, name, dtype, mode, v, t).as_text()
    assert 'custom_call_target="tpu_custom_call"' in text
    assert f"t5patches_{name}_" in text  # by this name profiles know it


@pytest.mark.parametrize(
    ("chip", "what"),
    [slow_unless((i + j) % 8 == 0 or (chip, what) == ("v6e", "statistics"), chip, what)
     for i, chip in enumerate(CHIPS) for j, what in enumerate(("edits", "statistics"))],
)  # fmt: skip
def test_compiles_sets_of_edits_and_statistics(chip, what):
    z, r, y, w = shapes(2048, 32128, jnp.bfloat16)
    ids, factors = (jax.ShapeDtypeStruct((2048, 64), d) for d in (jnp.int32, jnp.float32))

    def edited(z, r, y, w, ids, factors):
        return total("tnrf", "gradient", tk.Edits(ids, factors))(z, r, y, w)

    def statistics(z, r, y):
        out = tk.token_statistics(z, y, r, implementation=NAME)
        return (out.log_prob + out.entropy + out.kl).sum()

    if what == "edits":
        text = compile_for(chip, edited, z, r, y, w, ids, factors).as_text()
        assert "tnrf_value_and_grad" in text
    else:
        text = compile_for(chip, jax.grad(statistics), z, r, y).as_text()
        assert "statistics_gradient" in text


def test_values_are_in_bits():
    """This JAX lets the kernels have the chip's own logarithm."""
    assert tpu_math.FUNCTIONS.per_nat > 1


def test_control_xla_has_no_kernel():
    def f(z, r, y, w):
        return CASES["tnff"](z, r, y, w, None, "xla").loss.sum()

    assert "tpu_custom_call" not in compile_for("v4", f, *shapes(64, 32128, jnp.float32)).as_text()


@pytest.mark.parametrize(
    ("chip", "name", "dtype"),
    [slow_unless(chip == "v4" and (i + j) % 4 == 0, chip, name, dtype)
     for chip in CHIPS for i, name in enumerate(TARGETED_NEGATIVE)
     for j, dtype in enumerate(DTYPES)],
)  # fmt: skip
def test_three_passes(chip, name, dtype):
    """Both logits are read once, the gradient is written once."""
    program = compiled(chip, name, dtype, "gradient", 32128, 2048)
    assert passes(program, (2048, 32128)) == 3
    # Of blocks of twice the rows, and of loops of their own for kept tokens, a v5p spills some.
    most = 2_900_000 if chip == "v5p" else 0.01 * 2048 * 32128 * dtype.dtype.itemsize
    assert program.memory_analysis().temp_size_in_bytes < most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "chip", "dtype", "mode", "v"),
    [("policy_gradient", "v4", jnp.float32, "gradient", 32128),
     ("kl_reverse-unsmoothed", "v4", jnp.float32, "gradient", 32128),
     ("policy_gradient", "v6e", jnp.bfloat16, "gradient", 32128),
     ("policy_gradient", "v4", jnp.float32, "value", 32128),
     ("policy_gradient", "v4", jnp.float32, "gradient", 250112)],
)  # fmt: skip
def test_passes_of_a_policy(name, chip, dtype, mode, v):
    """As many as for its divergence from the reference alone."""
    program = compiled(chip, name, dtype, mode, v, 2048)
    assert passes(program, (2048, v)) == {"gradient": 3, "value": 2}[mode]
    assert program.memory_analysis().temp_size_in_bytes < 0.01 * 2048 * v * dtype.dtype.itemsize


@pytest.mark.parametrize("name", [slow_unless(i % 4 == 0, name) for i, name in enumerate(MAIN)])
def test_value_reads_every_array_once(name):
    program = compiled("v4", name, jnp.float32, "value", 32128, 2048)
    assert passes(program, (2048, 32128)) == (1 if name in ALONE else 2)


@pytest.mark.parametrize(
    ("chip", "name"),
    [slow_unless(False, "v4", name) for name in TARGETED_NEGATIVE]
    + [slow_unless((i + j) % 4 == 0, chip, name)
       for i, chip in enumerate(CHIPS) if chip != "v4" for j, name in enumerate(("tnff", "tnrf"))],
)  # fmt: skip
def test_passes_of_a_large_vocabulary(chip, name):
    """Rows of 250112 entries fit whole but on v4, where a third of the model's comes in again."""
    program = compiled(chip, name, jnp.float32, "gradient", 250112, 2048)
    assert passes(program, (2048, 250112)) == 3  # the kernel's operands and result, each once
    c = Settings(name, 250112, smoothing=1e-6)
    memory = plans.chip(device(chip).device_kind).vmem
    size = (Operation(c), Stage.VALUE_AND_GRAD, 250112, (4, 4), True, memory)
    assert (plans.plan(*size) is None) == (chip == "v4")
    streamed = plans.streamed(*size)
    assert streamed.held / streamed.windows > 2 / 3  # 3.33 passes at most


@pytest.mark.parametrize("name", [slow_unless(name == "tnrf", name) for name in TARGETED_NEGATIVE])
def test_gradient_takes_the_place_of_logits(name):
    """From hidden states to loss and gradients, the two logit arrays are all that is held."""
    t, d, v = 2048, 768, 32128
    hidden, kernel = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((t, d), (d, v)))

    def step(h, k, rh, rk, y, w):
        z, r = (jnp.dot(*x, preferred_element_type=jnp.float32) for x in ((h, k), (rh, rk)))
        return total(name, "value")(z, r, y, w)

    tokens = shapes(t, v, jnp.float32)[2:]
    program = compile_for(
        "v4", jax.value_and_grad(step, (0, 1)), hidden, kernel, hidden, kernel, *tokens
    )
    assert program.memory_analysis().temp_size_in_bytes <= 2.1 * 4 * t * v
    assert passes(program, (t, v)) == 7  # two products in, the kernel's three, two products out


@pytest.mark.parametrize("name", [slow_unless(False, "tnff"), "tnrf"])
def test_linear_holds_no_logits(name):
    """Beyond the kernel's gradient in float32, 5% of what XLA holds on dense logits (10.24 GB)."""
    t, d, v = 4096, 1024, 250112
    hidden, kernel = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((t, d), (d, v)))

    step = jax.value_and_grad(functools.partial(common.head_total, NAME, name), (0, 1))
    tokens = shapes(t, v, jnp.float32)[2:]
    program = compile_for("v4", step, hidden, kernel, hidden, kernel, *tokens)
    held = program.memory_analysis().temp_size_in_bytes
    assert "tpu_custom_call" in program.as_text()
    assert held - 4 * d * v <= 0.05 * 10.24e9


def test_a_split_vocabulary_compiles():
    """Four chips, each with a quarter of every row; nothing of size V moves."""
    mesh = jax.sharding.Mesh(topology("v4").devices, ("model",))
    logits, rows = jax.P(None, "model"), jax.P()
    t, v = 2048, 32128 * 4

    def per_shard(z, r, y, w):
        loss = tk.targeted_negative_loss(
            z, r, y, w, objective="tnrf", vocab_axis="model", implementation=NAME
        )
        return loss.loss

    call = jax.shard_map(
        per_shard, mesh=mesh, in_specs=(logits, logits, rows, rows), out_specs=rows
    )
    places = [jax.sharding.NamedSharding(mesh, p) for p in (logits, logits, rows, rows)]
    arguments = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        for x, place in zip(shapes(t, v, jnp.float32), places, strict=True)
    ]
    f = jax.jit(jax.value_and_grad(lambda z, r, y, w: call(z, r, y, w).sum()))
    text = f.lower(*arguments).compile().as_text()
    assert "tnrf_first" in text
    assert "tnrf_gradient" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "of",
    [("v4", "tnrf", "bfloat16", 32128), ("v4", "tnff", "float32", 250112),
     ("v6e", "tnrr", "bfloat16", 32128)],
)  # fmt: skip
def test_schedules_have_not_grown(of):
    """A kernel's schedule is that of the table, or shorter: no time is taken."""
    (row,) = (
        row
        for row in common.stored("tpu_static")
        if (row["chip"], row["objective"], row["dtype"], row["V"]) == of
    )
    if row["compiler"] != tpu_static.compiler():
        pytest.skip(f"the row is of {row['compiler']}, here is {tpu_static.compiler()}")
    now = tpu_static.measure(*of)
    assert now["cycles"] <= 1.01 * row["cycles"], "make bench-tpu-static"
    assert now["passes"] <= row["passes"]
