"""Two processes with four devices each, as two hosts of a pod: the same loss and gradient."""

import two_processes

PROGRAM = """
import jax.numpy as jnp, numpy as np
import t5patches_kernels as tk

P, B, L, V = jax.P, 4, 6, 48
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rng = np.random.default_rng(0)  # the same numbers in both processes
z = rng.normal(size=(B, L, V)).astype(np.float32)
r = (z + rng.normal(size=(B, L, V))).astype(np.float32)
y = rng.integers(0, V, (B, L)).astype(np.int32)
w = rng.choice([1.0, -1.0, 0.0], (B, L)).astype(np.float32)

def step(z, r, y, w):
    return jax.value_and_grad(
        lambda z: tk.targeted_negative_loss(z, r, y, w, objective="tnrf", alpha=3.0).loss.sum()
    )(z)

def put(x, spec):
    return jax.make_array_from_callback(x.shape, jax.NamedSharding(mesh, spec), lambda i: x[i])

split = P("data", None, "model")
with jax.set_mesh(mesh):
    args = put(z, split), put(r, split), put(y, P("data")), put(w, P("data"))
    loss, gradient = jax.jit(step, out_shardings=(None, jax.NamedSharding(mesh, split)))(*args)
want, whole = jax.jit(step)(z, r, y, w)
np.testing.assert_allclose(float(loss), float(want), rtol=2e-5)
for shard in gradient.addressable_shards:
    np.testing.assert_allclose(shard.data, np.asarray(whole)[shard.index], rtol=2e-4, atol=1e-5)
print("same", len(gradient.addressable_shards), jax.process_count())
"""


def test_two_processes(tmp_path):
    for out in two_processes.run(PROGRAM, tmp_path):
        assert "same 4 2" in out
