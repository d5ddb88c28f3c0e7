"""Tokens of weight 0 that are skipped: the same numbers for the others, and no work."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_topology import compile_for as compile_for_gpu
from gpu_topology import device as gpu
from gpu_topology import passes
from harness import GPU_FORM, gpu_form_by_name, slow_unless
from test_transforms import LINEAR, LOSSES, H, K, close
from tpu_topology import compile_for as compile_for_tpu
from tpu_topology import needs_compiler

import t5patches_kernels as tk
from t5patches_kernels.backends import chunked_linear
from t5patches_kernels.backends.pallas_tpu import inputs
from t5patches_kernels.backends.pallas_tpu import kernel as pallas_tpu
from t5patches_kernels.backends.pallas_tpu import plan as plans
from t5patches_kernels.backends.xla import driver as xla
from t5patches_kernels.core.objectives import Settings
from t5patches_kernels.core.operation import Operands, Operation, Result, Stage, Tokens

T, V, D = 50, 136, 8
KEYS = jax.random.split(jax.random.key(0), 6)
Z = 2 * jax.random.normal(KEYS[0], (T, V))
R = Z + jax.random.normal(KEYS[1], (T, V))
HIDDEN, KERNEL = jax.random.normal(KEYS[2], (T, D)), jax.random.normal(KEYS[3], (D, V))
Y = jax.random.randint(KEYS[4], (T,), 0, V)
SIGNS = jax.random.choice(KEYS[5], jnp.array([1.0, -1.0, -0.5]), (T,))
ROW = np.arange(T)
COUNTS = {
    "scattered": ROW % 3 == 1,
    "after a prompt": ROW >= 29,
    "before padding": ROW < 17,
    "the last": ROW == T - 1,
    "none": ROW < 0,
    "all": ROW >= 0,
}


def outcome(losses, name, implementation, skip_ignored):
    """Of weights: what a loss returns, and the gradient of all of it that is differentiable."""

    def total(model, reference, y, w):
        out = losses[name](
            *model, *reference, y, w, implementation=implementation, skip_ignored=skip_ignored
        )
        # Of ignored tokens' log-probabilities only one that does not skip has a gradient.
        log_prob = jnp.where(w != 0, out.log_prob, 0.0)
        return (out.loss * jnp.cos(ROW) + out.z_loss + log_prob * jnp.sin(ROW)).sum(), out

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def check(losses, name, implementation, model, reference):
    ours = outcome(losses, name, implementation, skip_ignored=True)
    dense = outcome(losses, name, "reference", skip_ignored=False)
    for counts in COUNTS.values():
        w = jnp.where(counts, SIGNS, 0.0)
        (_, want), d_want = dense(model, reference, Y, w)
        spoilt = model[0]
        if implementation != "reference":  # what an ignored token's row holds does not matter
            spoilt = jnp.where(counts[:, None], model[0], jnp.nan)
        (_, got), d_got = ours((spoilt, *model[1:]), reference, Y, w)
        close((got.loss, got.z_loss), (want.loss, want.z_loss))
        close(got.log_prob, jnp.where(counts, want.log_prob, 0.0))
        np.testing.assert_array_equal(got.correct, want.correct & counts)
        close(d_got, d_want)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks, and a ragged last one."""
    monkeypatch.setattr(xla, "block_rows", lambda columns: 8)
    monkeypatch.setattr(chunked_linear, "_MATRIX_ROWS", 8)
    monkeypatch.setattr(chunked_linear, "_CHUNKS_TO_SKIP", 6)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("tnrf", "xla"), slow_unless(False, "ce", "xla"), slow_unless(False, "tnrf", "reference"),
     ("ul", "pallas_tpu"), ("ul", "pallas_gpu"), ("tnff", GPU_FORM),
     slow_unless(False, "tnff", "xla"), slow_unless(False, "tnrf", "pallas_gpu"),
     slow_unless(False, "ul", "xla"), slow_unless(False, "tnrf", "pallas_tpu")],
)  # fmt: skip
def test_logits(name, implementation, monkeypatch):
    gpu_form_by_name(monkeypatch)
    check(LOSSES, name, implementation, (Z,), (R,))


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("tnff", "xla"),
        ("ul", "xla"),
        ("tnrr", "pallas_tpu"),
        ("ce", "reference"),
        slow_unless(False, "tnrf", "xla"),
    ],
)
def test_hidden_states(name, implementation):
    reference = (HIDDEN + 0.1, KERNEL)
    check(LINEAR, name, implementation, (HIDDEN, KERNEL), reference)


@pytest.mark.parametrize("losses", [LOSSES, LINEAR], ids=["logits", "hidden states"])
def test_each_device_of_a_mesh_has_its_own_number(losses):
    """Under `jax.jit` with a mesh: one device has nothing to do, another has no rest."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = np.arange(64)
    w = jnp.where((rows >= 16) & (rows % 5 > rows // 16), jnp.resize(SIGNS, (64,)), 0.0)
    h, y = jnp.resize(HIDDEN, (64, D)), jnp.resize(Y, (64,))
    model, reference = ((h, KERNEL), (h + 0.1, KERNEL)) if losses is LINEAR else (
        (h @ KERNEL,), ((h + 0.1) @ KERNEL,)
    )  # fmt: skip

    def total(model, skip_ignored):
        out = losses["tnrf"](*model, *reference, y, w, skip_ignored=skip_ignored)
        return (out.loss * jnp.cos(rows)).sum()

    want = jax.value_and_grad(total)(model, False)
    with jax.set_mesh(mesh):
        close(jax.jit(jax.value_and_grad(total), static_argnums=1)(model, True), want)


@pytest.mark.parametrize("counting", [0, 1, 8, 9, 41, T])
def test_blocks_of_ignored_rows_are_not_run(counting):
    """Neither chunks of hidden states, whose number is not known before."""
    ran = []

    def rows_of(op, stage, operands, tokens, stats=None, d_stats=None):
        (z,) = operands.model
        jax.debug.callback(lambda w: ran.append(int((w != 0).sum())), tokens.weights)
        return Result({"m": jnp.max(z, axis=1, keepdims=True)})

    settings, head = Settings("ce", V), chunked_linear.Head(1.0, transposed=False)
    op = Operation(settings, head=head, skip_ignored=True)
    w = jnp.zeros(T).at[jax.random.permutation(KEYS[0], T)[:counting]].set(1.0)
    tokens = Tokens(Y, w, jnp.zeros(T, bool))
    found = chunked_linear.run(
        rows_of, op, Stage.FIRST_PASS, Operands((HIDDEN, KERNEL), ()), tokens
    )
    jax.effects_barrier()
    assert len(ran) == -(-counting // 9)  # T / 6 rows a chunk
    assert sum(ran) >= counting
    want = jnp.where(w != 0, jnp.max(HIDDEN @ KERNEL, axis=1), 0)
    np.testing.assert_allclose(jnp.where(w != 0, found.stats["m"][:, 0], 0), want, rtol=1e-5)


# --- Kernels --------------------------------------------------------------------------------------


def test_a_tpu_fetches_nothing_for_a_block_of_ignored_rows():
    """The window stays where it is: an index that does not change is not fetched again."""
    op = Operation(Settings("tnff", V), skip_ignored=True)
    tokens = Tokens(Y, jnp.zeros(T).at[jnp.array([9, 30, 31])].set(1.0), jnp.zeros(T, bool))
    call = pallas_tpu.call_of(op, Stage.VALUE_AND_GRAD, plans.LEAST, Operands((Z,), (R,)), tokens)
    assert call.plan.rows == 8
    np.testing.assert_array_equal(inputs.sources_of(call, tokens, 7), [1, 1, 1, 3, 3, 3, 3])


def test_the_rows_of_a_tpu_block_are_those_that_users_are_told():
    """Ignored tokens save what fills a block."""
    said = re.search(
        r"a block of (\d+) rows \(bfloat16: (\d+)\) .* from (\d+) tokens \((\d+)\) on one of "
        r"(\d+) \((\d+)\)",
        " ".join(tk.losses.__doc__.split()),
    )
    numbers = [int(n) for n in said.groups()]  # of each pair the second is of bfloat16
    op = Operation(Settings("tnff", V), skip_ignored=True)
    for itemsize, (few, tokens, many) in ((4, numbers[::2]), (2, numbers[1::2])):
        size = (op, Stage.VALUE_AND_GRAD, V, (itemsize,) * 2, False, plans.LEAST.vmem)
        assert [plans.plan(*size, tokens=n).rows for n in (tokens - 1, tokens)] == [few, many]


def _shapes(rows, columns):
    z = jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16)
    return z, z, jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((rows,), "float32")


def _gradient(implementation, skip_ignored=True):
    def total(z, r, y, w):
        out = LOSSES["tnrf"](z, r, y, w, implementation=implementation, skip_ignored=skip_ignored)
        return out.loss.sum()

    return jax.value_and_grad(total)


def made_by(text):
    """The operation that makes a compiled program's last result."""
    entry = text[text.index("\nENTRY") :]
    last = re.search(r"ROOT .*? tuple\(.*?(%[\w.-]+)\)", entry)[1]
    return re.search(rf"\n  {re.escape(last)} = \S+ ([\w-]+)\(", entry)[1]


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*TPU")
@pytest.mark.parametrize(
    ("chip", "columns"),
    [slow_unless(False, "v4", 32128), ("v4", 250112), slow_unless(False, "v6e", 32100)],
)
def test_compiles_for_tpus(chip, columns):
    text = compile_for_tpu(chip, _gradient("pallas_tpu"), *_shapes(2044, columns)).as_text()
    assert "t5patches_tnrf_" in text


@pytest.mark.skipif(isinstance(gpu(), str), reason=str(gpu()))
def test_compiles_for_gpus():
    text = compile_for_gpu(gpu(), _gradient("pallas_gpu"), *_shapes(264, 32128)).as_text()
    assert "mosaic_gpu" in text
    assert made_by(text) == "get-tuple-element"  # of the kernel, see the next


@pytest.mark.skipif(isinstance(gpu(), str), reason=str(gpu()))
@pytest.mark.parametrize(("card", "columns"), [("A100", 32128), ("H200", 50257)])
def test_xlas_form_on_gpus_reads_the_rows_that_count(card, columns):
    """Each by its number, in the loops that need it: it stores no row but those of the gradient."""
    shapes = _shapes(512, columns)
    whole, some = (
        compile_for_gpu(gpu(card), _gradient("xla", skip_ignored), *shapes)
        for skip_ignored in (False, True)
    )
    assert passes(whole, (512, columns)) == 6
    assert passes(some, (512, columns)) == 1  # what is picked by its number is not counted
    assert some.memory_analysis().temp_size_in_bytes < 0.06 * 512 * columns * 2


def test_nothing_goes_over_a_sums_gradient_again():
    """A choice of losses would: it is a factor of 1 or 0 before the whole gradient."""
    text = jax.jit(_gradient("xla")).lower(*_shapes(264, 520)).compile().as_text()
    assert made_by(text) == "get-tuple-element"  # of the loop over blocks


def test_an_ignored_tokens_log_probability_is_reported_by_default():
    w = jnp.zeros(T)
    assert (tk.cross_entropy_loss(Z, Y, w).log_prob < 0).all()
    assert not tk.cross_entropy_loss(Z, Y, w, skip_ignored=True).log_prob.any()
    assert (tk.linear_cross_entropy_loss(H, K, jnp.zeros(H.shape[:-1], int)).log_prob < 0).all()


@pytest.mark.parametrize("losses", [LOSSES, LINEAR], ids=["logits", "hidden states"])
def test_vmap_of_other_numbers(losses):
    """Each batch has its own number of tokens that count."""
    model = (HIDDEN, KERNEL) if losses is LINEAR else (Z,)
    reference = (HIDDEN + 0.1, KERNEL) if losses is LINEAR else (R,)
    weights = jnp.stack([jnp.where(counts, SIGNS, 0.0) for counts in COUNTS.values()])

    def gradient(w, skip_ignored):
        def total(model):
            out = losses["tnff"](*model, *reference, Y, w, skip_ignored=skip_ignored)
            return (out.loss * jnp.cos(ROW)).sum()

        return jax.grad(total)(model)

    dense = jax.jit(lambda w: gradient(w, False))
    each = [dense(w) for w in weights]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
    close(jax.jit(jax.vmap(lambda w: gradient(w, True)))(weights), stacked)
