"""Layers that are run again in the backward pass: the same numbers, and much less held."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from editing_samples import example, model_folder
from harness import slow_unless

from t5patches.cli import main
from t5patches.editing.data import write_examples
from t5patches.editing.train import Step, TrainSettings, train
from t5patches.model.decoder import network
from t5patches.model.decoder.model import small_decoder
from t5patches.model.huggingface import load_checkpoint
from t5patches.model.lora import Lora
from t5patches.model.placement import make_mesh
from t5patches.model.remat import remat
from t5patches.model.t5.model import small_t5

SMALL = {"decoder": small_decoder, "T5": small_t5}
PROMPT, OUTPUT = 24, 8


def batch(model, rows=2):
    rng = np.random.default_rng(0)
    shapes = {"inputs": (rows, PROMPT), "outputs": (rows, OUTPUT)}
    ids = {name: rng.integers(2, model.config.vocab_size, x) for name, x in shapes.items()}
    return {name: x.astype(np.int32) for name, x in ids.items()}


def working(model, **settings):
    """What an update holds beside its arguments; compiled once for the same settings."""
    arrays = batch(model, rows=32)
    arrays["weights"] = np.ones(arrays["outputs"].shape, np.float32)
    step = Step(model, TrainSettings(objective="ul", batch_size=32, **settings), arrays)
    return step.compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [slow_unless((kind, dropout) == ("decoder", 0.1), kind, dropout)
     for kind in SMALL for dropout in (0.0, 0.1)],
)  # fmt: skip
def test_the_gradient_is_the_same(kind, dropout):
    layers = 2 if kind == "decoder" else 1  # of T5, as many in each half
    model = SMALL[kind](vocab_size=32, width=16, layers=layers).replace(dropout_rate=dropout)
    params, arrays = model.init(jax.random.key(0)), batch(model)

    def gradient(remat):
        def total(params):
            # Threefry, the default, would be most of what is compiled here.
            key = jax.random.key(1, impl="rbg") if dropout else None
            hidden = model.replace(remat=remat).hidden(params, arrays, dropout_key=key)
            return jnp.square(hidden).sum()

        return jax.jit(jax.value_and_grad(total))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient(True), gradient(False),
    )  # fmt: skip


@pytest.mark.parametrize("kind", SMALL)
def test_inference_is_the_same(kind):
    model = SMALL[kind](vocab_size=32, width=16, layers=2)
    params, arrays = model.init(jax.random.key(0)), batch(model)

    def logits(model):
        _, length = arrays["outputs"].shape
        cache = model.prefill(
            params, arrays["inputs"], arrays["outputs"], 3, streams=2, max_length=length
        )
        return model.decode(params, cache, np.repeat(arrays["outputs"][:, 2:3], 2, axis=1))[0]

    np.testing.assert_allclose(logits(model.replace(remat=True)), logits(model), rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "lora"),
    [("decoder", Lora(2)), slow_unless(False, "decoder", None), slow_unless(False, "T5", None),
     slow_unless(False, "T5", Lora(2))],
)  # fmt: skip
def test_an_update_holds_what_is_between_layers(kind, lora, monkeypatch):
    model = SMALL[kind](vocab_size=32, width=32, layers=6 if kind == "decoder" else 3)
    again = working(model.replace(remat=True), lora=lora)
    monkeypatch.setattr(network, "remat", lambda part: part)
    assert again < 0.5 * working(model, lora=lora, alpha=2.0)


@pytest.mark.parametrize("lora", [None, slow_unless(False, Lora(2))], ids=["all", "adapter"])
def test_an_update_of_layers_that_are_held_makes_cheap_things_again(lora, monkeypatch):
    """Norms, activations, attention's weights; `jax.checkpoint` saves few up to jax 0.11."""
    model = small_decoder(vocab_size=32, width=32, layers=6)
    held = working(model, lora=lora)
    saves = 1.1 if jax.__version_info__ >= (0, 12) else 0.7
    for alpha, control, share in ((2.0, lambda part: part, 0.5), (3.0, jax.checkpoint, saves)):
        monkeypatch.setattr(network, "remat", control)
        assert held < share * working(model, lora=lora, alpha=alpha)


def test_devices_share_such_an_update():
    model = small_decoder(vocab_size=32, width=16, layers=2, num_kv_heads=2, remat=True)
    params, arrays = model.init(jax.random.key(0)), batch(model, rows=4)
    arrays["weights"] = np.ones(arrays["outputs"].shape, np.float32)
    settings = TrainSettings(objective="ul", batch_size=4, learning_rate=1e-2)
    losses = []
    for mesh in (None, make_mesh(2, jax.devices()[:4])):
        step = Step(model, settings, arrays, mesh)
        state, frozen = step.start(params), step.place(params, params)
        for number in range(3):
            state, metrics = step(state, frozen, arrays, number)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_run_that_was_begun_without_it_goes_on_with_it(tmp_path):
    model = small_decoder(vocab_size=32, width=16, layers=2)
    params, arrays = model.init(jax.random.key(0)), batch(model, rows=4)
    arrays["weights"] = np.ones(arrays["outputs"].shape, np.float32)

    def losses(model, steps, name):
        settings = TrainSettings(objective="ul", batch_size=4, learning_rate=1e-2, steps=steps)
        return train(model, params, arrays, settings, tmp_path / name).history["loss"]

    losses(model, 1, "resumed")
    resumed = losses(model.replace(remat=True), 3, "resumed")
    np.testing.assert_allclose(resumed, losses(model, 3, "whole"), rtol=1e-4)


def test_what_is_frozen_gets_no_gradient():
    layer = remat(lambda params, x: x @ params["kernel"] + x @ params["adapter"])
    kernel, x = jnp.ones((8, 8)), jnp.ones((4, 8))

    def total(adapter):
        return layer({"kernel": kernel, "adapter": adapter}, x).sum()

    text = str(jax.make_jaxpr(jax.grad(total))(kernel))
    assert text.count("dot_general[") == 2 + 2 + 1  # there, again, and the adapter's gradient


def test_a_cotangent_of_zero_and_one_that_is_no_number():
    layer = remat(lambda w, x: (w * x, x))
    x = jnp.arange(3.0)
    assert jax.grad(lambda w: 0.0 * layer(w, x)[0].sum())(2.0) == 0
    assert jnp.isnan(jax.grad(lambda w: jnp.nan * layer(w, x)[0].sum())(2.0))


def test_other_compilers_have_a_barrier():
    """They leave it where it is; a sum would be sent around between devices."""
    gradient = jax.jit(jax.grad(lambda x: remat(lambda _, x: jnp.tanh(x) ** 3)({}, x).sum()))
    text = {
        platform: jax.export.export(gradient, platforms=[platform])(jnp.ones(8)).mlir_module()
        for platform in ("cpu", "tpu", "cuda")
    }
    barriers = {platform: "optimization_barrier" in x for platform, x in text.items()}
    assert barriers == {"cpu": False, "tpu": True, "cuda": True}


@pytest.mark.slow
def test_an_edit_with_it_is_the_same(tmp_path):
    folder = model_folder(tmp_path / "model")
    data = tmp_path / "marked.jsonl"
    write_examples(data, [example("a b", "a c", "c"), example("b", "c b", "b")])
    made = {}
    for name, flags in (("with", ["--remat"]), ("without", [])):
        output = tmp_path / name
        command = ["edit", "--model", folder, "--data", data, "--output", output, "--steps", 2]
        command += ["--batch-size", 2, "--devices", 1, *flags]
        assert main([*map(str, command), "--quiet"]) == 0
        made[name] = load_checkpoint(output)[1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *made.values()
    )
