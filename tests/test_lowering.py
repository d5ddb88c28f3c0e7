"""What is compiled is what suits the machine compiled for, whichever machine compiles."""

import functools
import re
import warnings

import gpu_topology
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_topology
from gpu_topology import passes
from jax import export

import t5patches_kernels as tk
from t5patches_kernels import BlockSizes, dispatch
from t5patches_kernels.core.operation import Operands, Stage
from t5patches_kernels.dispatch import Target

T, V = 264, 32128
MOSAIC = {"tpu": "tpu_custom_call", "gpu": "mosaic_gpu"}
needs_gpu_compiler = pytest.mark.skipif(
    isinstance(gpu_topology.device(), str), reason=str(gpu_topology.device())
)


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    dispatch._warn.cache_clear()


def shapes(columns=V, rows=T, place=None):
    of = functools.partial(jax.ShapeDtypeStruct, sharding=place)
    z = of((rows, columns), jnp.float32)
    return z, z, of((rows,), jnp.int32), of((rows,), jnp.float32)


def step(implementation=None):
    def total(z, r, y, w):
        out = tk.targeted_negative_loss(z, r, y, w, objective="tnrf", implementation=implementation)
        return out.loss.sum()

    return jax.value_and_grad(total)


def lowered(device, implementation=None, columns=V):
    place = jax.sharding.SingleDeviceSharding(device)
    return jax.jit(step(implementation)).lower(*shapes(columns, place=place))


# --- TPU ------------------------------------------------------------------------------------------


@tpu_topology.needs_compiler
@pytest.mark.filterwarnings("ignore:.*TPU")
@pytest.mark.parametrize("implementation", [None, "pallas_tpu"])
def test_a_tpu_gets_the_kernel_by_default_and_by_name(implementation):
    """On a machine without a TPU, as people compile ahead of time for a pod."""
    program = lowered(tpu_topology.device("v4"), implementation).compile()
    assert MOSAIC["tpu"] in program.as_text()
    assert passes(program, (T, V)) == 3


@tpu_topology.needs_compiler
@pytest.mark.filterwarnings("ignore:.*TPU")
@pytest.mark.parametrize("chip", ["v4", "v6e"])
def test_a_kernel_is_planned_for_the_chip(chip, monkeypatch):
    from t5patches_kernels.backends.pallas_tpu import kernel

    planned, honest = [], kernel.call_of

    def call_of(op, stage, chip, *rest):
        planned.append(chip.kind)
        return honest(op, stage, chip, *rest)

    monkeypatch.setattr(kernel, "call_of", call_of)
    device = tpu_topology.device(chip)
    lowered(device, columns=V + len(chip) * 128)  # a shape of its own: nothing is known of it
    assert set(planned) == {device.device_kind}


@tpu_topology.needs_compiler
@pytest.mark.filterwarnings("ignore:.*TPU")
def test_the_default_under_a_mesh_of_tpus():
    mesh = jax.sharding.Mesh(
        np.array(tpu_topology.topology("v4").devices).reshape(2, 2), ("data", "model")
    )
    z, r, y, w = shapes()
    split = (jax.P("data", "model"), jax.P("data", "model"), jax.P("data"), jax.P("data"))
    with jax.set_mesh(mesh):
        f = jax.jit(step(), in_shardings=[jax.NamedSharding(mesh, s) for s in split])
        text = f.lower(z, r, y, w).compile().as_text()
    assert "tnrf_gradient" in text


@tpu_topology.needs_compiler
@pytest.mark.filterwarnings("ignore:.*TPU")
@pytest.mark.parametrize("of_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_a_vocabulary_is_whole_where_its_axis_has_one_device(of_type):
    """As on T5X's meshes without model parallelism: 7 passes where its rows are taken for split."""
    devices = np.array(tpu_topology.topology("v4").devices).reshape(4, 1)
    mesh = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(of_type,) * 2)
    rows, logits = jax.P("data"), jax.P("data", "model")
    with jax.set_mesh(mesh):
        given = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))
            for x, spec in zip(shapes(rows=4 * T), (logits, logits, rows, rows), strict=True)
        ]
        program = jax.jit(step()).lower(*given).compile()
    assert passes(program, (T, V)) == 3


def test_no_other_machine_gets_a_tpu_s_kernel_by_name():
    device = gpu_topology.device()
    if isinstance(device, str):
        pytest.skip(device)
    with pytest.raises(NotImplementedError, match=r'needs a TPU.*cuda.*implementation="xla"'):
        lowered(device, "pallas_tpu")


# --- CPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claims", ["tpu", "gpu"])
def test_a_cpu_beside_a_device_gets_the_form_for_cpus(claims, monkeypatch):
    want = lowered(jax.devices("cpu")[0]).as_text()
    monkeypatch.setattr(jax, "default_backend", lambda: claims)
    jax.clear_caches()
    got = lowered(jax.devices("cpu")[0]).as_text()
    assert got == want
    assert "custom_call" not in got


# --- GPU ------------------------------------------------------------------------------------------


@needs_gpu_compiler
@pytest.mark.parametrize("implementation", [None, "pallas_gpu"])
def test_a_hopper_gets_the_kernel_by_default_and_by_name(implementation):
    assert MOSAIC["gpu"] in lowered(gpu_topology.device(), implementation).as_text()


@needs_gpu_compiler
@pytest.mark.parametrize(
    ("card", "columns", "reason"),
    [("H200", 50257, "pad the vocabulary to a multiple of 4"),
     ("RTX 5090", V, r"compute capability 9 and 10.*this one is of 12\.0")],
)  # fmt: skip
def test_the_default_says_once_why_it_is_not_the_kernel(card, columns, reason):
    device = gpu_topology.device(card)
    with pytest.warns(UserWarning, match=reason) as said:
        text = lowered(device, columns=columns).as_text()
    assert len(said) == 1
    assert MOSAIC["gpu"] not in text
    with warnings.catch_warnings(action="error"):
        lowered(device, columns=columns)  # traced and lowered anew
    with pytest.raises(NotImplementedError, match=f'{reason}.*implementation="xla"'):
        lowered(device, "pallas_gpu", columns)


def test_the_default_says_that_a_split_vocabulary_is_not_the_kernel_s():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "model"))
    z, r, y, w = shapes()
    with jax.set_mesh(mesh), pytest.warns(UserWarning, match="vocabulary is split"):
        text = export.export(jax.jit(step()), platforms=["cuda"])(z, r, y, w).mlir_module()
    assert MOSAIC["gpu"] not in text


@needs_gpu_compiler
def test_the_form_for_gpus_compiles_for_a_card_without_a_kernel():
    lowered(gpu_topology.device("RTX 5090"), "xla").compile()


# --- Several platforms ----------------------------------------------------------------------------


def test_one_export_for_several_platforms():
    """Each has its own form; which GPU it will be nobody knows, so there it is the XLA form."""
    platforms = ("cpu", "tpu", "cuda")
    with pytest.warns(UserWarning, match="which GPU the program will run on is not known"):
        found = export.export(jax.jit(step()), platforms=platforms)(*shapes(256, 16))
    text = found.mlir_module()
    assert MOSAIC["tpu"] in text
    assert MOSAIC["gpu"] not in text
    rng = np.random.default_rng(0)
    z, r = (jnp.asarray(rng.normal(size=(16, 256)), jnp.float32) for _ in range(2))
    y, w = jnp.arange(16, dtype=jnp.int32), jnp.ones(16)
    want, got = step("reference")(z, r, y, w), found.call(z, r, y, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want)


# --- The choice alone -----------------------------------------------------------------------------


class _Card:
    device_kind = "a card"

    def __init__(self, capability):
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("platform", "device", "columns", "dtype", "kernel"),
    [
        ("cuda", _Card("9.0"), 32128, jnp.float32, True),
        ("cuda", _Card("10.3"), 32128, jnp.float32, True),
        ("cuda", _Card("8.9"), 32128, jnp.float32, False),
        ("cuda", _Card("12.0"), 32128, jnp.float32, False),
        ("cuda", None, 32128, jnp.float32, False),
        ("cuda", _Card("9.0"), 32132, jnp.float32, True),
        ("cuda", _Card("9.0"), 32132, jnp.bfloat16, False),
        ("rocm", None, 32128, jnp.float32, False),
        ("cpu", None, 32128, jnp.float32, False),
        ("tpu", None, 50257, jnp.float32, True),
    ],
)
def test_the_default(platform, device, columns, dtype, kernel):
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="needs absl-py")
    z = jax.ShapeDtypeStruct((2, columns), dtype)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        target = Target(platform, device)
        form = dispatch.choose(None, target, Stage.VALUE_AND_GRAD, Operands((z,), (z,)), None)
    assert ("pallas" in getattr(form, "func", form).__module__) == kernel
    if kernel and platform == "cuda":  # no cluster has run on a card
        assert form.args[1] == BlockSizes(cluster=1)
    assert len(said) == (platform == "cuda" and not kernel)


@pytest.mark.parametrize(
    ("name", "platform", "device"),
    [
        ("pallas_tpu", "cuda", _Card("9.0")),
        ("pallas_tpu", "rocm", None),
        ("pallas_gpu", "tpu", None),
        ("pallas_gpu", "rocm", None),
        ("pallas_gpu", "cuda", _Card("8.0")),
        (BlockSizes(cluster=2), "cuda", _Card("8.0")),
        (BlockSizes(), "tpu", None),
    ],
)
def test_by_name_and_impossible(name, platform, device):
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="needs absl-py")
    z = jax.ShapeDtypeStruct((2, V), jnp.float32)
    with pytest.raises(
        NotImplementedError, match=f'{re.escape(str(name))}.*needs.*implementation="xla"'
    ):
        dispatch.choose(
            name, Target(platform, device), Stage.VALUE_AND_GRAD, Operands((z,), (z,)), None
        )
