"""A mesh in the context: functions find it, split tokens and vocabulary, and move little."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import slow_unless
from jax.sharding import AxisType
from test_transforms import CT, LINEAR, LOSSES, B, D, H, K, R, V, W, Y, Z, close, weighed
from tpu_topology import needs_compiler, topology

import t5patches_kernels as tk
from bench.collectives import moved
from t5patches_kernels import t5x_losses
from t5patches_kernels.backends import chunked_linear

P = jax.P
AXES = {
    (1, 8): ("data", "model"),
    (2, 4): ("data", "model"),
    (8, 1): ("data", "model"),
    (2, 2, 2): ("replica", "data", "model"),
}
ODD = 41  # a vocabulary that nothing divides


def mesh_of(shape, axis_type=AxisType.Auto, names=None):
    return jax.make_mesh(shape, names or AXES[shape], axis_types=(axis_type,) * len(shape))


def value_and_gradient(loss, **options):
    return jax.value_and_grad(lambda z, r, y, w: weighed(loss(z, r, y, w, **options)))


def whole(f, *args):
    """`f` without a mesh."""
    return jax.jit(f)(*args)


EVERY_LOSS = [slow_unless(i % 2 == 0, name, (2, 2, 2)) for i, name in enumerate(LOSSES)]
EVERY_MESH = [("tnrf", shape) for shape in AXES if shape != (2, 2, 2)]


@pytest.mark.parametrize(("name", "shape"), EVERY_LOSS + EVERY_MESH)
def test_same_value_and_gradient(name, shape):
    f = value_and_gradient(LOSSES[name])
    with jax.set_mesh(mesh_of(shape)):
        got = jax.jit(f)(Z, R, Y, W)
    close(got, whole(f, Z, R, Y, W))


@pytest.mark.parametrize(
    ("name", "shape"), [("tnff", (2, 4)), ("tnrf", (2, 2, 2)), ("ul", (1, 8)), ("ce", (8, 1))]
)
def test_a_vocabulary_and_a_batch_that_do_not_divide(name, shape):
    args = (Z[:3, :5, :ODD], R[:3, :5, :ODD], Y[:3, :5] % ODD, W[:3, :5])

    def f(z, r, y, w):
        return (LOSSES[name](z, r, y, w).loss * CT[:3, :5]).sum()

    f = jax.value_and_grad(f)
    with jax.set_mesh(mesh_of(shape)):
        got = jax.jit(f)(*args)
    close(got, whole(f, *args))


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu", "reference"])
def test_any_implementation(implementation):
    f = value_and_gradient(LOSSES["tnrf"], implementation=implementation)
    z, r = (jnp.concatenate([x, x - 3, x + 1] * 4, axis=-1)[..., :512] for x in (Z, R))
    # The GPU's kernel is of whole rows, and its interpreter dies where several devices run it.
    alone = implementation == "pallas_gpu"
    shape, of_type = ((1, 1), AxisType.Explicit) if alone else ((2, 4), AxisType.Auto)
    with jax.set_mesh(mesh_of(shape, of_type, names=("data", "model"))):
        got = jax.jit(f)(z, r, Y, W)
    close(got, whole(value_and_gradient(LOSSES["tnrf"]), z, r, Y, W), rtol=1e-4)


@pytest.mark.parametrize(
    ("transposed", "softcap", "spec"),
    [slow_unless((i + j) % 2 == 0, transposed, softcap, spec)
     for i, (transposed, softcap) in enumerate(((False, None), (True, 2.0)))
     for j, spec in enumerate((P(None, "model"), P("data", None), P("data", "model")))],
)  # fmt: skip
def test_linear(transposed, softcap, spec):
    """The head's kernel split over its vocabulary, over embed, or over both."""

    def f(h, k, y, w):
        loss = LINEAR["tnrf"](h, k, H, k, y, w, transposed=transposed, softcap=softcap).loss
        return (loss * CT).sum(), loss

    f = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)
    kernel, spec = (K.T, P(*spec[::-1])) if transposed else (K, spec)
    mesh = mesh_of((2, 4))
    put = jax.device_put(kernel, jax.NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        got = jax.jit(f)(H, put, Y, W)
    close(got, whole(f, H, kernel, Y, W))


def test_linear_with_an_odd_vocabulary():
    def f(h, k, y, w):
        return (LINEAR["tnrr"](h, k, H, k, y, w).loss * CT).sum()

    f, args = jax.value_and_grad(f, argnums=(0, 1)), (H, K[:, :ODD], Y % ODD, W)
    with jax.set_mesh(mesh_of((2, 4))):
        got = jax.jit(f)(*args)
    close(got, whole(f, *args))


@pytest.mark.parametrize(
    ("spec", "implementation"),
    [(P("data", None, "model"), None), (P(None, "data"), None), (P("model"), None), (P(), None),
     (P("data", None, "model"), "reference")],
)  # fmt: skip
def test_explicit_axes_stay_where_they_are(spec, implementation):
    """JAX tells how such logits are split: no name is needed."""
    mesh = mesh_of((2, 4), AxisType.Explicit)
    f = value_and_gradient(LOSSES["tnrf"], implementation=implementation)
    with jax.set_mesh(mesh):
        z = jax.device_put(Z, jax.NamedSharding(mesh, spec))
        got, gradient = jax.jit(f)(z, R, Y, W)
    assert gradient.sharding.is_equivalent_to(z.sharding, 3)
    close((got, gradient), whole(f, Z, R, Y, W))


@pytest.mark.parametrize("of_hidden", [P("data"), P(None, "data"), P("model", "data")])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_explicit_axis_may_split_tokens_and_vocabulary(of_hidden, transposed):
    """FSDP, and a sequence split as the head is: what a shard sums is of the same tokens."""
    mesh = mesh_of((2, 4), AxisType.Explicit)
    kernel, split = (K.T, P("data", None)) if transposed else (K, P(None, "data"))

    def f(h, k, y, w):
        loss = LINEAR["tnrf"](h, k, H, k, y, w, transposed=transposed).loss
        return (loss * CT).sum(), loss

    f = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)
    with jax.set_mesh(mesh):
        h, k = (jax.device_put(x, jax.NamedSharding(mesh, s))
                for x, s in ((H, of_hidden), (kernel, split)))  # fmt: skip
        got = jax.jit(f)(h, k, Y, W)
    (_, loss), (of_h, of_k) = got
    assert loss.sharding.is_equivalent_to(jax.NamedSharding(mesh, of_hidden), 2)
    for x, gradient in ((h, of_h), (k, of_k)):
        assert gradient.sharding.is_equivalent_to(x.sharding, x.ndim)
    close(got, whole(f, H, kernel, Y, W))


@pytest.mark.parametrize("implementation", [None, "pallas_tpu"])
def test_a_mapped_dimension_that_an_explicit_axis_splits(implementation):
    def f(z, r, y):
        of_one = functools.partial(LOSSES["tnrf"], implementation=implementation)
        return jax.vmap(lambda z, r, y: weighed(of_one(z, r, y, W[0]), CT[0]))(z, r, y).sum()

    f, args = jax.value_and_grad(f), (Z, R, Y)
    with jax.set_mesh(mesh_of((2,), AxisType.Explicit, ("data",))):
        got = jax.jit(f)(*(jax.device_put(x, P("data")) for x in args))
    assert got[1].sharding.spec[0] == "data"
    close(got, whole(f, *args))


def test_explicit_axes_that_a_shard_map_of_ones_own_leaves_out_are_told():
    def f(z, y):
        return jax.lax.psum(tk.cross_entropy_loss(z, y).loss.sum(), "data")

    whole_rows, split = P("data"), P("data", None, "model")
    with jax.set_mesh(mesh_of((2, 4), AxisType.Explicit)):
        f = jax.jit(jax.shard_map(f, in_specs=whole_rows, out_specs=P(), axis_names={"data"}))
        close(f(jax.device_put(Z, whole_rows), Y), tk.cross_entropy_loss(Z, Y).loss.sum())
        with pytest.raises(NotImplementedError, match=r"\['model'\], of type Explicit.*axis_names"):
            f(jax.device_put(Z, split), Y)


def test_explicit_axes_of_a_single_device():
    """`jax.make_mesh` makes them, and people try on one device what they run on many."""
    f = value_and_gradient(LOSSES["tnrf"])
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        got = jax.jit(f)(jax.device_put(Z, P("data")), R, Y, W)
    close(got, whole(f, Z, R, Y, W))


def test_soft_targets_that_are_not_split_as_the_logits_are():
    def f(z, soft):
        return (t5x_losses.cross_entropy_with_logits(z, soft)[0] * CT).sum()

    f, soft = jax.value_and_grad(f, (0, 1)), jax.nn.softmax(R)
    with jax.set_mesh(mesh_of((2, 4), AxisType.Explicit)):
        got = jax.jit(f)(jax.device_put(Z, P("data")), jax.device_put(soft, P(None, "data")))
    close(got, whole(f, Z, soft))


@pytest.mark.parametrize(
    ("axis_type", "model", "losses"),
    [(AxisType.Auto, (H, K), LINEAR), (AxisType.Explicit, (Z,), LOSSES)],
)
def test_outside_of_jit(axis_type, model, losses):
    def f(*model):
        return weighed(losses["ce"](*model, *model, Y, W))

    f = jax.value_and_grad(f, argnums=tuple(range(len(model))))
    mesh = mesh_of((1, 2), axis_type, names=("data", "model"))
    split = P(*[None] * (model[-1].ndim - 1), "model")
    with jax.set_mesh(mesh):
        got = f(*model[:-1], jax.device_put(model[-1], jax.NamedSharding(mesh, split)))
    close(got, whole(f, *model))


def test_t5x_puts_its_mesh_in_the_context_through_pjit():
    mesh, seen = mesh_of((2, 4)), []

    def f(z, r, y, w):
        seen.append(jax.sharding.get_abstract_mesh().axis_names)
        return value_and_gradient(LOSSES["tnff"])(z, r, y, w)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of T5X's way
        from jax.experimental.pjit import pjit

        with mesh:
            got = pjit(f, in_shardings=(P("data", None, "model"),) * 2 + (P("data"),) * 2)(
                Z, R, Y, W
            )
    assert seen == [("data", "model")]
    close(got, whole(value_and_gradient(LOSSES["tnff"]), Z, R, Y, W))


def test_vmap_remat_and_microbatches():
    f = value_and_gradient(LOSSES["tnrr"])

    def vmapped(z, r, y, w):
        out = jax.vmap(lambda *a: LOSSES["tnrr"](*a))(z, r, y, w)
        return weighed(out)

    def remat(z, r, y, w):
        return weighed(jax.checkpoint(LOSSES["tnrr"])(z, r, y, w))

    def microbatches(z, r, y, w):
        def one(total, i):
            def part(x):
                return jax.lax.dynamic_slice_in_dim(x, 2 * i, 2)

            out = LOSSES["tnrr"](*map(part, (z, r, y, w)))
            return total + weighed(out, part(CT)), None

        return jax.lax.scan(one, jnp.float32(0), jnp.arange(B // 2))[0]

    want = whole(f, Z, R, Y, W)
    with jax.set_mesh(mesh_of((2, 4))):
        for g in (vmapped, remat, microbatches):
            close(jax.jit(jax.value_and_grad(g))(Z, R, Y, W), want)


def test_statistics_divergence_and_edits():
    ids = jax.random.randint(jax.random.key(9), (*Y.shape, 3), -1, V)
    edits = tk.Edits(ids, jnp.full(ids.shape, 0.25))

    def f(z, r, y):
        kl = tk.kl_divergence(z, r, direction="reverse", smoothing=1e-6, edits=edits)
        return tk.token_statistics(z, y, r), kl

    with jax.set_mesh(mesh_of((2, 4))):
        got = jax.jit(f)(Z, R, Y)
    close(jax.tree.map(np.float64, got), jax.tree.map(np.float64, whole(f, Z, R, Y)))


def test_flat_tokens_and_a_single_row():
    def f(z, y):
        return tk.cross_entropy_loss(z, y).loss.sum()

    with jax.set_mesh(mesh_of((2, 4))):
        got = jax.jit(f)(Z[0], Y[0]), jax.jit(f)(Z[0, 0], Y[0, 0])
    close(got, (whole(f, Z[0], Y[0]), whole(f, Z[0, 0], Y[0, 0])))


def test_other_names():
    mesh = mesh_of((4, 2), names=("fsdp", "tensor"))
    f = value_and_gradient(LOSSES["tnff"])
    want = whole(f, Z, R, Y, W)
    with jax.set_mesh(mesh):
        with tk.mesh_axes(batch="fsdp", vocab="tensor"):
            close(jax.jit(f)(Z, R, Y, W), want)
        twice = pytest.raises(ValueError, match=r"\['model'\] are named twice.*pass vocab=None")
        with twice, tk.mesh_axes(batch=("data", "model")):
            pass
        with tk.mesh_axes(batch="fdsp", vocab=None), pytest.raises(ValueError, match="mesh_axes"):
            jax.jit(f)(Z, R, Y, W)
        with pytest.warns(UserWarning, match=r"'fsdp', 'tensor'.*every device computes all"):
            close(jax.jit(f)(Z, R, Y, W), want)


def test_names_are_part_of_what_was_traced():
    """A function traced under other names is traced again, not taken from the cache."""
    seen = []

    @jax.jit
    def f(z, y):
        seen.append(1)
        return tk.cross_entropy_loss(z, y).loss

    with jax.set_mesh(mesh_of((2, 4))):
        f(Z, Y)
        with tk.mesh_axes(batch=("data", "model"), vocab=None):
            f(Z, Y)
        f(Z, Y)
    assert len(seen) == 2


def test_a_vocabulary_split_over_two_axes_is_refused():
    mesh = mesh_of((2, 4), AxisType.Explicit)
    z = jax.device_put(Z, jax.NamedSharding(mesh, P(None, None, ("data", "model"))))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="take one axis"):
        jax.jit(tk.cross_entropy_loss)(z, Y)


def test_beside_a_shard_map_of_the_callers():
    """The axes that the caller has taken are left alone, those that remain are used."""
    mesh = mesh_of((2, 4))

    def local(z, r, y, w):
        return LOSSES["tnrr"](z, r, y, w).loss

    rows = P("data")
    call = jax.shard_map(
        local, in_specs=(rows,) * 4, out_specs=rows, axis_names={"data"}, mesh=mesh
    )
    f = jax.value_and_grad(lambda *a: (call(*a) * CT).sum())
    with jax.set_mesh(mesh):
        got = jax.jit(f)(Z, R, Y, W)
    close(got, whole(jax.value_and_grad(lambda *a: (local(*a) * CT).sum()), Z, R, Y, W))


@pytest.mark.parametrize(
    ("name", "vocabulary", "skip_ignored"),
    [*((name, size, False) for name in ("tnff", "tnrf", "ul") for size in (4096, 4099)),
     ("tnrf", 4096, True), ("ul", 4099, True)],
)  # fmt: skip
def test_what_moves_is_a_handful_of_numbers_a_token(name, vocabulary, skip_ignored):
    mesh, batch, length = mesh_of((2, 4)), 8, 16
    split = "model" if vocabulary % 4 == 0 else None
    logits = jax.ShapeDtypeStruct(
        (batch, length, vocabulary), jnp.float32,
        sharding=jax.NamedSharding(mesh, P("data", None, split)),
    )  # fmt: skip
    row = jax.NamedSharding(mesh, P("data"))
    y, w = (
        jax.ShapeDtypeStruct((batch, length), d, sharding=row) for d in (jnp.int32, jnp.float32)
    )

    def f(z, r, y, w):
        return LOSSES[name](z, r, y, w, skip_ignored=skip_ignored).loss.sum()

    spec = jax.NamedSharding(mesh, P("data", None, "model") if split else P("data", "model"))
    with jax.set_mesh(mesh):
        text = (
            jax.jit(jax.value_and_grad(f), out_shardings=(None, spec))
            .lower(logits, logits, y, w).compile().as_text()
        )  # fmt: skip
    found = moved(text)
    assert found  # at least the sum over all tokens
    assert {c.kind for c in found} == {"all-reduce"}
    assert max(c.largest for c in found) <= batch * length


def test_the_control_sees_a_vocabulary_move():
    """The same reading of the dense formula finds what must not be there."""
    mesh = mesh_of((2, 4))
    z = jax.ShapeDtypeStruct(
        (8, 16, 4096), jnp.float32, sharding=jax.NamedSharding(mesh, P("data", None, "model"))
    )
    with jax.set_mesh(mesh):
        f = jax.jit(lambda z: jnp.sort(z, axis=-1))
        assert max(c.largest for c in moved(f.lower(z).compile().as_text())) > 8 * 16


@pytest.mark.parametrize("skip_ignored", [False, True])
def test_the_kernel_moves_only_where_it_must(skip_ignored):
    """Split over the vocabulary and replicated over data, only its gradient is summed over data.

    No hidden states and no logits are gathered, also where ignored tokens are left out: each device
    brings together its own, which are several chunks then.
    """
    mesh, length = mesh_of((2, 4)), 128
    place = {
        "h": P("data"), "k": P(None, "model"), "y": P("data"), "w": P("data"),
    }  # fmt: skip
    shapes = {"h": (B, length, D), "k": (D, 4096), "y": (B, length), "w": (B, length)}
    h, k, y, w = (
        jax.ShapeDtypeStruct(
            shapes[n], jnp.int32 if n == "y" else jnp.float32,
            sharding=jax.NamedSharding(mesh, place[n]),
        )
        for n in "hkyw"
    )  # fmt: skip

    def f(h, k, rh, rk, y, w):
        return LINEAR["tnrf"](h, k, rh, rk, y, w, skip_ignored=skip_ignored).loss.sum()

    out = (None, tuple(jax.NamedSharding(mesh, place[n]) for n in "hk"))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(f, argnums=(0, 1)), out_shardings=out)
        found = moved(step.lower(h, k, h, k, y, w).compile().as_text())
    rows = B // 2 * length
    size = (rows, 4096 // 4, chunked_linear.CHUNK_BYTES["cpu"])
    assert (chunked_linear.chunk_rows(*size, skip_ignored=skip_ignored) < rows) == skip_ignored
    assert {c.kind for c in found} == {"all-reduce"}
    # dW [D, V / 4] over data, as for any head; dh [B / 2, L, D] over model, as for any split head.
    assert [c.largest for c in found if c.largest > B * length * D] == [D * 4096 // 4]


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*TPU")
@pytest.mark.parametrize("linear", [False, slow_unless(False, True)])
def test_tpu_kernels_run_on_each_chip_of_a_slice(linear):
    """Four v4 chips, ahead of time: kernels in the program, and only sums between the chips."""
    mesh = jax.sharding.Mesh(np.array(topology("v4").devices).reshape(2, 2), ("data", "model"))
    batch, length, width, vocabulary = 16, 128, 256, 32128
    kernels = {"implementation": "pallas_tpu"}
    h, k, y, w = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))
        for shape, dtype, spec in (
            ((batch, length, width), jnp.bfloat16, P("data")),
            ((width, vocabulary), jnp.float32, P(None, "model")),
            ((batch, length), jnp.int32, P("data")),
            ((batch, length), jnp.float32, P("data")),
        )
    )

    def logits(h, k):
        return jnp.einsum("bld,dv->blv", h, k.astype(h.dtype)).astype(jnp.float32)

    def f(h, k, rh, rk, y, w):
        if linear:
            return LINEAR["tnrf"](h, k, rh, rk, y, w, **kernels).loss.sum()
        return LOSSES["tnrf"](logits(h, k), logits(rh, rk), y, w, **kernels).loss.sum()

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        step = jax.jit(
            jax.value_and_grad(f, argnums=(0, 1)), out_shardings=(None, (h.sharding, k.sharding))
        )
        text = step.lower(h, k, h, k, y, w).compile().as_text()
    assert "tnrf_first" in text
    assert "tnrf_gradient" in text
    found = moved(text)
    assert {c.kind for c in found} == {"all-reduce"}
    # The gradients to what comes before: hidden states over model, the head's kernel over data.
    assert max(c.largest for c in found) == width * vocabulary // 2
