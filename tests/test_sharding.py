"""A vocabulary split over a mesh axis: the same numbers, and nothing of size V between devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import slow_unless
from test_transforms import CT, LINEAR, LOSSES, D, H, K, R, V, W, Y, Z, close, weighed

import t5patches_kernels as tk

P = jax.P
MESHES = [(1, 8), (2, 4), (4, 2)]
VOCAB = {"vocab_axis": "model"}
ROWS = P("data", None)


def mesh_of(shape):
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("data", "model"), axis_types=auto)


def total(name, z, r, y, w, ct, **options):
    return weighed(LOSSES[name](z, r, y, w, **options), ct)


def sharded_total(name, mesh, check_vma):
    """The sum over all tokens, taken outside of the shard_map, as trainers do."""

    def per_shard(z, r, y, w, ct):
        out = LOSSES[name](z, r, y, w, **VOCAB)
        return out.loss * ct + out.log_prob * ct**2 + out.z_loss * jnp.sin(ct), out.correct

    logits = P("data", None, "model")
    call = jax.shard_map(
        per_shard, mesh=mesh, in_specs=(logits, logits, ROWS, ROWS, ROWS),
        out_specs=(ROWS, ROWS), check_vma=check_vma,
    )  # fmt: skip
    return lambda *a: call(*a)[0].sum()


@pytest.mark.parametrize(
    ("name", "shape", "check_vma"),
    [slow_unless((name == "tnrf" or i == j) and (i + j) % 2 == check_vma, name, shape, check_vma)
     for i, name in enumerate(("tnff", "ul", "ce", "tnrf")) for j, shape in enumerate(MESHES)
     for check_vma in (True, False)],
)  # fmt: skip
def test_same_value_and_gradient(name, shape, check_vma):
    f = jax.jit(jax.value_and_grad(sharded_total(name, mesh_of(shape), check_vma)))
    want = jax.value_and_grad(lambda z: total(name, z, R, Y, W, CT))(Z)
    close(f(Z, R, Y, W, CT), want)


@pytest.mark.parametrize("check_vma", [True, False])
def test_an_axis_of_one_device_splits_nothing(check_vma, monkeypatch):
    from t5patches_kernels import autodiff

    mesh = mesh_of((8, 1))
    tokens = (jnp.repeat(jnp.repeat(x[:1], 8, 0), 2, 1) for x in (H, Y, W))
    h, y, w = tokens
    k, stages = K, []
    monkeypatch.setattr(autodiff.sharding, "merge", lambda *_: stages.append("merge"))

    def per_shard(h, k, y, w):
        return LINEAR["tnrf"](h, k, h - 1, k, y, w, **VOCAB).loss

    call = jax.shard_map(
        per_shard, mesh=mesh, in_specs=(P("data"), P(None, "model"), ROWS, ROWS), out_specs=ROWS,
        check_vma=check_vma,
    )  # fmt: skip
    got = jax.jit(jax.grad(lambda h, k: call(h, k, y, w).sum(), (0, 1)))(h, k)
    want = jax.grad(lambda h, k: LINEAR["tnrf"](h, k, h - 1, k, y, w).loss.sum(), (0, 1))(h, k)
    close(got, want)
    assert not stages


@pytest.mark.parametrize("name", ["tnrr", "tnrll"])
def test_gradient_taken_inside(name):
    """With check_vma=True a loss inside the shard_map is one number, whatever the axis size."""
    mesh, logits = mesh_of((2, 4)), P("data", None, "model")

    def step(z, r, y, w, ct):
        return jax.grad(lambda z: total(name, z, r, y, w, ct, **VOCAB))(z)

    f = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(logits, logits, ROWS, ROWS, ROWS), out_specs=logits
        )
    )
    close(f(Z, R, Y, W, CT), jax.grad(lambda z: total(name, z, R, Y, W, CT))(Z))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("transposed", "softcap"), [(False, 2.0), (True, None)])
def test_linear(transposed, softcap, check_vma):
    mesh = mesh_of((2, 4))
    kernel, spec = (K.T, P("model", None)) if transposed else (K, P(None, "model"))
    hidden = P("data", None, None)

    head = {"transposed": transposed, "softcap": softcap}

    def f(h, k, **options):
        return LINEAR["tnrf"](h, k, H[: h.shape[0]], k, Y, W, **head, **options)

    def per_shard(h, k, rh, y, w):
        return LINEAR["tnrf"](h, k, rh, k, y, w, **head, **VOCAB).loss

    call = jax.shard_map(
        per_shard, mesh=mesh, in_specs=(hidden, spec, hidden, ROWS, ROWS), out_specs=ROWS,
        check_vma=check_vma,
    )  # fmt: skip
    got = jax.jit(jax.grad(lambda h, k: (call(h, k, H, Y, W) * CT).sum(), (0, 1)))(H, kernel)
    want = jax.grad(lambda h, k: (f(h, k).loss * CT).sum(), (0, 1))(H, kernel)
    close(got, want)


@pytest.mark.parametrize("check_vma", [True, False])
def test_tokens_split_with_another_factor_on_each_device(check_vma):
    """A kernel's gradient is summed over devices after each has weighed its own tokens."""
    mesh = mesh_of((4, 1))

    def per_shard(h, k, rh, y, w):
        return LINEAR["tnff"](h, k, rh, k, y, w).loss

    call = jax.shard_map(
        per_shard, mesh=mesh, in_specs=(P("data"), P(), P("data"), ROWS, ROWS), out_specs=ROWS,
        check_vma=check_vma,
    )  # fmt: skip
    factor = jnp.arange(1.0, len(Y) + 1)[:, None]
    got = jax.jit(jax.grad(lambda h, k: (call(h, k, H, Y, W) * factor).sum(), (0, 1)))(H, K)
    want = jax.grad(lambda h, k: (per_shard(h, k, H, Y, W) * factor).sum(), (0, 1))(H, K)
    close(got, want)


@pytest.mark.parametrize(
    ("implementation", "vocab"),
    [(None, None), (None, "model"), ("pallas_tpu", None), ("pallas_tpu", "model"),
     ("pallas_gpu", None)],
)  # fmt: skip
def test_outside_of_jit(implementation, vocab):
    """`jax.shard_map` as it stands: JAX runs it step by step, and the loss as one of them."""
    z = jax.random.normal(jax.random.key(5), (2, 512), jnp.float32)
    y = jnp.array([3, 300])
    # The GPU's interpreter dies where several devices run a kernel.
    mesh, logits = mesh_of((1, 1 if implementation == "pallas_gpu" else 2)), P("data", vocab)
    call = jax.shard_map(
        lambda z: tk.cross_entropy_loss(
            z, y, z_loss=0.1, vocab_axis=vocab, implementation=implementation
        ).loss,
        mesh=mesh, in_specs=logits, out_specs=P("data"), check_vma=implementation is None,
    )  # fmt: skip
    want, back = jax.vjp(
        lambda z: tk.cross_entropy_loss(z, y, z_loss=0.1, implementation="reference").loss, z
    )
    if implementation is None:  # the gradient runs the forward pass too
        got, pull = jax.vjp(call, z)
        close(pull(jnp.ones(2)), back(jnp.ones(2)))
    else:
        got = call(z)
    close(got, want)


def test_the_gpu_kernel_is_of_whole_rows():
    z, y = jnp.ones((2, 512)), jnp.array([3, 300])

    def loss(z):
        return tk.cross_entropy_loss(z, y, implementation="pallas_gpu", **VOCAB).loss

    call = jax.shard_map(
        loss, mesh=mesh_of((1, 2)), in_specs=P(None, "model"), out_specs=P(), check_vma=False
    )
    with pytest.raises(NotImplementedError, match=r'vocabulary is split.*implementation="xla"'):
        jax.jit(call)(z)


def test_edits_and_targets_are_global_ids():
    mesh, logits = mesh_of((1, 8)), P(None, None, "model")
    ids = jax.random.randint(jax.random.key(9), (*Y.shape, 3), -1, V)
    factors = jnp.full(ids.shape, 0.25)

    def loss(z, r, ids, factors, **options):
        edits = tk.Edits(ids, factors)
        return tk.targeted_negative_loss(z, r, Y, W, edits=edits, alpha=1.0, **options).loss

    call = jax.shard_map(
        lambda *a: loss(*a, **VOCAB), mesh=mesh,
        in_specs=(logits, logits, P(), P()), out_specs=P(),
    )  # fmt: skip
    close(jax.jit(call)(Z, R, ids, factors), loss(Z, R, ids, factors))


def test_nothing_of_the_vocabulary_moves():
    """Every collective of value and gradient is a handful of numbers a token."""
    mesh, v, t = mesh_of((2, 4)), 4096, 64
    f = jax.jit(
        jax.grad(sharded_total("tnrf", mesh, True)),
        in_shardings=[jax.NamedSharding(mesh, s) for s in
                      [P("data", None, "model")] * 2 + [ROWS] * 3],
    )  # fmt: skip
    z = jax.ShapeDtypeStruct((4, t // 4, v), jnp.float32)
    row = jax.ShapeDtypeStruct((4, t // 4), jnp.float32)
    y = jax.ShapeDtypeStruct((4, t // 4), jnp.int32)
    text = f.lower(z, z, y, row, row).compile().as_text()
    moved = re.findall(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute)\(", text)
    assert any(kind == "all-reduce" for _, kind in moved)
    assert {kind for _, kind in moved} == {"all-reduce"}
    for shape, _ in moved:
        for dims in re.findall(r"f32\[([\d,]*)\]", shape):
            assert np.prod([int(d) for d in dims.split(",") if d]) <= t
    assert v > D  # the test would see a vocabulary
