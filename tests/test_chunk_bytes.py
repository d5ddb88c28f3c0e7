"""How much of a head's logits is made at a time: the same numbers, and as many chunks as asked."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from editing_samples import tiny_model
from harness import slow_unless
from jax.sharding import AxisType
from test_transforms import close

import t5patches_kernels as tk
from t5patches.editing import plan as plans
from t5patches.editing.train import Step, TrainSettings
from t5patches_kernels.backends import chunked_linear
from t5patches_kernels.linear_losses import tokens_per_chunk

KEYS = jax.random.split(jax.random.key(3), 5)
B, L, D, V = 2, 32, 20, 264
T = B * L
EIGHT = 8 * 4 * V  # bytes of the fewest tokens that a chunk may have
H, K = jax.random.normal(KEYS[0], (B, L, D)), jax.random.normal(KEYS[1], (D, V))
RH = H + 0.1 * jax.random.normal(KEYS[2], H.shape)
Y = jax.random.randint(KEYS[3], (B, L), 0, V)
W = jax.random.choice(KEYS[4], jnp.array([1.0, -1.0, 0.0]), (B, L))


def total(h, k, **options):
    """Of unequal cotangents, so that the kernel's gradient is made again."""
    original = K.T if options.get("transposed") else K
    out = tk.linear_targeted_negative_loss(h, k, RH, original, Y, W, objective="tnrf", **options)
    return (out.loss * jnp.arange(1.0, 1 + T).reshape(B, L)).sum()


def gradient(**options):
    return jax.value_and_grad(functools.partial(total, **options), (0, 1))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def chunks(columns=V, **options):
    """The chunks that the program runs in each loop over them, and the tokens of one."""
    every = [*equations(jax.make_jaxpr(gradient(**options))(H, K).jaxpr)]
    counts = {x.params["length"] for x in every if x.primitive.name == "scan"}
    made = (x.outvars[0].aval.shape for x in every if x.primitive.name == "dot_general")
    return counts, {rows for rows, last in made if last == columns and rows != D}


@functools.cache
def dense():
    return jax.jit(gradient(implementation="reference"))(H, K)


@pytest.mark.parametrize(
    ("implementation", "tokens"),
    [("xla", 24), ("pallas_tpu", 24),
     *(slow_unless(False, name, tokens) for name in ("xla", "reference", "pallas_tpu", "pallas_gpu")
       for tokens in (8, 40, T))],
)  # fmt: skip
def test_value_and_gradient_are_the_same(implementation, tokens):
    options = {"implementation": implementation, "chunk_bytes": tokens * EIGHT // 8}
    close(jax.jit(gradient(**options))(H, K), dense())


# 40 tokens in whole eights, evenly: two chunks of 32.
@pytest.mark.parametrize(("tokens", "count", "each"), [(8, 8, 8), (24, 3, 24), (40, 2, 32)])
def test_as_many_chunks_as_asked(tokens, count, each):
    chunk_bytes = tokens * EIGHT // 8 + 4 * V - 1  # not quite enough for one more
    # On every platform: the program has a branch for each.
    assert chunks(chunk_bytes=chunk_bytes) == ({count}, {each})
    options = {"platform": "gpu", "chunk_bytes": chunk_bytes}
    assert tokens_per_chunk(T, V, **options) == each


def test_by_itself_each_platform_has_its_own(monkeypatch):
    sizes = {"cpu": EIGHT, "gpu": 4 * EIGHT, "tpu": 2 * EIGHT}
    monkeypatch.setattr(chunked_linear, "CHUNK_BYTES", sizes)
    monkeypatch.setattr(chunked_linear, "_MATRIX_ROWS", 8)
    chunked_linear.run.clear_cache()
    assert chunks() == ({8, 4, 2}, {8, 16, 32})
    assert [tokens_per_chunk(T, V, platform=x) for x in ("cpu", "gpu", "tpu")] == [8, 32, 16]
    chunked_linear.run.clear_cache()


def test_by_itself_a_chunk_has_as_many_tokens_as_products_are_quick_with():
    assert [tokens_per_chunk(512, x, platform="cpu") for x in (8192, 262144)] == [512, 128]


@pytest.fixture
def some_columns(monkeypatch):
    """The kernel's gradient is added 50 columns at a time; the last are moved back."""
    monkeypatch.setattr(chunked_linear, "_COLUMNS_ADDED", 50)
    chunked_linear.run.clear_cache()
    yield
    chunked_linear.run.clear_cache()


@pytest.mark.parametrize(
    ("implementation", "skip_ignored"),
    [("xla", True), slow_unless(False, "xla", False), slow_unless(False, "pallas_tpu", True)],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_kernel_s_gradient_by_columns_is_the_same(
    transposed, implementation, skip_ignored, some_columns
):
    def turned(k):
        return k.T if transposed else k

    def of(h, k):
        options = {"chunk_bytes": 3 * EIGHT, "skip_ignored": skip_ignored}
        return total(h, k, transposed=transposed, implementation=implementation, **options)

    value, (d_hidden, d_kernel) = jax.jit(jax.value_and_grad(of, (0, 1)))(H, turned(K))
    close((value, (d_hidden, turned(d_kernel))), dense())


@pytest.mark.parametrize("transposed", [False, True])
def test_no_second_array_as_large_as_a_kernel_is_held(transposed, monkeypatch):
    """Beside its gradient, where chunks add to it on a CPU."""
    rows, width, columns = 64, 256, 8192
    h = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    k = jax.ShapeDtypeStruct((columns, width) if transposed else (width, columns), jnp.float32)

    def of(h, k):
        out = tk.linear_cross_entropy_loss(
            h, k, jnp.zeros(rows, int), chunk_bytes=32 * columns, transposed=transposed
        )
        return out.loss.sum()

    held = {}
    for added in (1024, columns):
        monkeypatch.setattr(chunked_linear, "_COLUMNS_ADDED", added)
        chunked_linear.run.clear_cache()
        program = jax.jit(jax.grad(of, (0, 1))).lower(h, k).compile()
        held[added] = program.memory_analysis().temp_size_in_bytes
    chunked_linear.run.clear_cache()
    assert held[columns] - held[1024] > 0.8 * 4 * width * columns


def test_several_chunks_to_skip(monkeypatch):
    monkeypatch.setattr(chunked_linear, "_MATRIX_ROWS", 8)
    chunked_linear.run.clear_cache()
    options = {"chunk_bytes": 100 * EIGHT, "skip_ignored": True}
    assert chunks(**options)[1] == {tokens_per_chunk(T, V, platform="cpu", **options)} == {T // 4}
    chunked_linear.run.clear_cache()


@pytest.mark.parametrize("shape", [(2, 2), slow_unless(False, (1, 4))])
def test_on_a_mesh_it_bounds_what_each_device_makes(shape, some_columns):
    rows, parts = shape
    devices = jax.devices()[: rows * parts]
    mesh = jax.make_mesh(shape, ("data", "model"), (AxisType.Auto,) * 2, devices=devices)
    options = {"chunk_bytes": EIGHT, "implementation": "xla"}
    each = tokens_per_chunk(T // rows, V // parts, platform="cpu", chunk_bytes=EIGHT)
    assert each == 8 * parts
    with jax.set_mesh(mesh):
        counts, tokens = chunks(V // parts, **options)
        got = jax.jit(gradient(**options))(H, K)
    assert tokens == {each}
    of_columns = -(-V // parts // 50)
    assert counts == {T // rows // each, of_columns} != {1, of_columns}
    close(got, dense())


# The choice of `t5patches edit`. A tiny model's chunks, on a CPU that takes itself for a card.

MODEL = tiny_model(vocab_size=4096)
SETTINGS = TrainSettings(objective="ul", batch_size=4)
ROW = 4 * MODEL.config.vocab_size
MOST = plans._ARRAYS_OF_A_CHUNK * 4  # of a chunk's bytes, what must be left for it


@pytest.fixture
def a_card(monkeypatch):
    """Sets what it has left beside what an update of `Step` holds in any case."""
    monkeypatch.setitem(chunked_linear.CHUNK_BYTES, "cpu", 8 * ROW)
    monkeypatch.setattr(chunked_linear, "_MATRIX_ROWS", 8)
    monkeypatch.setitem(plans._LARGER_CHUNKS, "cpu", (16 * ROW, 64 * ROW))
    chunked_linear.run.clear_cache()

    def with_left(step, left):
        held = plans.memory.held((step.state, step.state.params, step.frozen))
        has = None if left is None else held + left
        monkeypatch.setattr(plans, "_available", lambda *_: has)

    yield with_left
    chunked_linear.run.clear_cache()


def step_of(length=32):
    ids = np.ones((4, length), np.int32)
    arrays = {"inputs": ids[:, :4], "outputs": ids, "weights": -np.ones(ids.shape, np.float32)}
    return Step(MODEL, SETTINGS, arrays)


@pytest.fixture
def planned(monkeypatch):
    """The size of every update that would be compiled to see whether it fits: it does."""
    found = []

    def plan(step, settings, mesh=None):
        found.append(settings.chunk_bytes)
        return plans.MemoryPlan("card", 1, 0, 0, 0, 0, plans._available(None, 1))

    monkeypatch.setattr(plans, "plan_memory", plan)
    return found


@pytest.mark.parametrize(
    ("left", "rows"),
    [(None, None), (MOST * 16 * ROW - 1, None), (MOST * 16 * ROW, 16),
     (MOST * 32 * ROW - 1, 16), (MOST * 32 * ROW, 64)],
)  # fmt: skip
def test_the_largest_that_there_is_room_for(left, rows, a_card, planned):
    """Of 64 tokens no more than a quarter of the batch's 128 are made at a time."""
    step = step_of()
    a_card(step, left)
    settings = plans.with_larger_chunks(step, SETTINGS)
    chunk_bytes = None if rows is None else rows * ROW
    assert settings == dataclasses.replace(SETTINGS, chunk_bytes=chunk_bytes)
    assert planned == ([] if rows is None else [chunk_bytes])  # compiled once
    made = {None: 8, 16: 16, 64: 32}[rows]
    assert step.logits_at_a_time(settings.chunk_bytes) == (made, made * ROW)


def test_the_plan_is_of_what_was_chosen_and_names_it(a_card):
    step = step_of()
    a_card(step, MOST * 32 * ROW)
    settings = plans.with_larger_chunks(step, SETTINGS)
    plan = plans.plan_memory(step.with_settings(settings), settings)
    assert plan.total <= plan.available
    assert "; logits of 32 tokens at a time, 512.0 KiB" in plan.text()
    program = step.with_settings(settings).compiled.as_text()
    assert "f32[32,4096]" in program
    assert "f32[8,4096]" not in program


@pytest.mark.parametrize("failure", ["too large", "refused"])
def test_what_does_not_fit_after_all_is_not_taken(failure, a_card, monkeypatch):
    step = step_of()
    a_card(step, MOST * 32 * ROW)

    def plan(*_):
        if failure == "refused":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        room = plans._available(None, 1)
        return plans.MemoryPlan("card", 1, 0, 0, 0, room + 1, room)

    monkeypatch.setattr(plans, "plan_memory", plan)
    assert plans.with_larger_chunks(step, SETTINGS) is SETTINGS


def test_nothing_is_compiled_where_there_is_no_choice(a_card, planned, monkeypatch):
    few, step = step_of(length=2), step_of()
    a_card(step, 1 << 40)
    assert plans.with_larger_chunks(few, SETTINGS) is SETTINGS
    named = dataclasses.replace(SETTINGS, chunk_bytes=16 * ROW)
    assert plans.with_larger_chunks(step, named) is named
    monkeypatch.delitem(plans._LARGER_CHUNKS, "cpu")
    assert plans.with_larger_chunks(step, SETTINGS) is SETTINGS
    assert not planned
