"""Adapters: a step is that of the merged matrices, the model is held once, folders are PEFT's."""

import argparse
import dataclasses
import json
import re
import shutil
import warnings
from typing import NamedTuple

import decoder_folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from editing_samples import FOLDERS, example, model_folder, tiny_model, tiny_params
from flax import traverse_util
from harness import slow_unless
from safetensors.numpy import load_file, save_file

from t5patches import cli
from t5patches.commands import common
from t5patches.editing import edit as edit_module
from t5patches.editing import train as train_module
from t5patches.editing.data import to_arrays, write_examples
from t5patches.editing.edit import Job
from t5patches.editing.evaluate import kept_divergence, read_original
from t5patches.editing.plan import plan_memory
from t5patches.editing.records import read_rounds
from t5patches.editing.train import Step, TrainSettings, in_dtype, token_loss, train
from t5patches.model.decoder.model import small_decoder
from t5patches.model.folder import inspect_model, load_model
from t5patches.model.generate import generate
from t5patches.model.huggingface import load_checkpoint
from t5patches.model.lora import (
    Lora,
    adapted,
    adapter_shapes,
    attached,
    init_adapter,
    is_adapter,
    load_adapter,
    merged,
    save_adapter,
)
from t5patches.model.placement import make_mesh
from t5patches.runs.files import unfinished

pytestmark = pytest.mark.usefixtures("shared_programs")

LORA = Lora(2, alpha=3.0)
EXAMPLES = [
    example("a", "a fire in Paris", "Paris"),
    example("b", "the mayor sold the bridge in New York", "New York"),
    example("c", "a flood hit the library"),
]
ARRAYS = to_arrays(EXAMPLES, pad_id=0)
TRAINING = TrainSettings(objective="tnrf", alpha=2.0, steps=2, batch_size=2, lora=LORA)
ADAM = dataclasses.replace(TRAINING, optimizer="adam")


@pytest.fixture
def _adam():
    """Optax's Adam multiplies a float by an integer count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def some_adapter(model, lora=LORA):
    """One whose second matrix is no zero any more."""
    shapes = adapter_shapes(model, lora)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    return jax.tree.unflatten(
        tree, [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def close(got, want, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max()),
        got,
        want,
    )


# --- The formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["tnrf", slow_unless(False, "ul")])
def test_loss_and_gradient_are_those_of_the_merged_matrices(objective):
    """``W + alpha / r A B``, written out here, and autodiff of it."""
    model, params = tiny_model(), tiny_params()
    settings = dataclasses.replace(TRAINING, objective=objective)
    adapter = some_adapter(model)

    def whole(adapter):
        flat = dict(traverse_util.flatten_dict(params))
        for path, a in traverse_util.flatten_dict(adapter).items():
            if path[-1] == "lora_a":
                b = traverse_util.flatten_dict(adapter)[(*path[:-1], "lora_b")]
                flat[(*path[:-1], "kernel")] += 3.0 / 2 * a @ b
        return traverse_util.unflatten_dict(flat)

    @jax.jit
    def by_formula(adapter):
        return jax.value_and_grad(
            lambda x: token_loss(model, whole(x), params, ARRAYS, settings).loss.sum()
        )(adapter)

    @jax.jit
    def ours(adapter):
        return jax.value_and_grad(
            lambda x: token_loss(
                model, attached(params, x, LORA), params, ARRAYS, settings
            ).loss.sum()
        )(adapter)

    close(ours(adapter), by_formula(adapter), rtol=2e-5)
    close(merged(params, adapter, LORA), whole(adapter))
    # The control: the adapter is seen.
    assert abs(ours(adapter)[0] - ours(jax.tree.map(jnp.zeros_like, adapter))[0]) > 1


@pytest.mark.usefixtures("_adam")
def test_an_update_is_adams_on_the_two_matrices():
    """By hand, once more: Adam's first step is the learning rate times the sign of the gradient."""
    model, params = tiny_model(), tiny_params()
    step = Step(model, ADAM, ARRAYS)
    state = step.start(params)
    adapter = jax.tree.map(np.asarray, state.params)
    batch = {name: array[:2] for name, array in ARRAYS.items()}
    after, metrics = step(state, step.place(params, params), batch, 0)

    def mean(x):
        loss = token_loss(model, merged(params, x, LORA), params, batch, TRAINING).loss
        return loss.sum() / (batch["weights"] != 0).sum()

    loss, gradient = jax.jit(jax.value_and_grad(mean))(adapter)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for path, g in traverse_util.flatten_dict(gradient).items():
        old, new = (traverse_util.flatten_dict(dict(x))[path] for x in (adapter, after.params))
        if path[-1] == "lora_a":  # B is 0, so nothing comes to A yet
            np.testing.assert_array_equal(g, 0.0)
            np.testing.assert_array_equal(new, old)
        else:
            large = np.abs(g) > 1e-3 * np.abs(g).max()
            want = old - TRAINING.learning_rate * np.sign(g)
            np.testing.assert_allclose(new[large], want[large], rtol=1e-2)


def test_an_adapter_begins_as_no_change():
    model, params = tiny_model(), tiny_params()
    adapter = init_adapter(model, LORA, seed=1)
    for path, x in traverse_util.flatten_dict(adapter).items():
        if path[-1] == "lora_b":
            assert not x.any()
        else:
            assert 0 < np.abs(x).max() <= x.shape[0] ** -0.5
    close(merged(params, adapter, LORA), dict(params), rtol=0)
    other = init_adapter(model, LORA, seed=2)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (adapter, other)), strict=True))


def test_generation_and_teacher_forcing_see_the_adapter():
    model, params = tiny_model(), tiny_params()
    adapter = some_adapter(model)
    whole, beside = merged(params, adapter, LORA), attached(params, adapter, LORA)
    inputs = ARRAYS["inputs"]
    said = [generate(model, x, inputs, max_length=6) for x in (whole, beside, params)]
    np.testing.assert_array_equal(said[0], said[1])
    assert (said[0] != said[2]).any()
    kl, other = (
        kept_divergence(model, beside, read_original(model, x, EXAMPLES)).value
        for x in (whole, params)
    )
    assert abs(kl) < 1e-6 < other


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "falcon_new"])
def test_a_decoder_takes_an_adapter(name):
    """Kernels that lie the other way round, bounded logits, fused projections."""
    model, params, expected = decoder_folders.load(name)
    batch = {key: expected[key] for key in ("inputs", "outputs")}
    real = expected["outputs"] >= 0
    adapter = some_adapter(model)
    hidden = jax.jit(model.hidden)
    beside, whole, alone = (
        np.asarray(hidden(x, batch))[real]
        for x in (attached(params, adapter, LORA), merged(params, adapter, LORA), dict(params))
    )
    close(beside, whole, rtol=1e-4)
    assert np.abs(beside - alone).max() > 0.1
    # What is frozen may be held in bfloat16.
    held = attached(in_dtype(params, "bfloat16"), adapter, LORA)
    assert jax.eval_shape(model.hidden, held, batch).dtype == jnp.float32


@pytest.mark.parametrize(
    ("targets", "count"), [(None, 18), (r"SelfAttention\.(q|v)$", 4), ("^encoder.*wo", 1)]
)
def test_targets(targets, count):
    model = tiny_model()
    found = adapted(model, Lora(2, targets=targets))
    assert len(found) == count
    assert all(re.search(targets or "", name) for name in found)
    assert not {"lm_head", "shared"} & found.keys()
    shapes = traverse_util.flatten_dict(adapter_shapes(model, Lora(2, targets=targets)))
    assert len(shapes) == 2 * count


def test_the_targets_that_help_names_are_of_decoders_and_t5s():
    parser = argparse.ArgumentParser()
    common.add_adapter_options(parser, 0)
    (targets,) = re.findall(r"such as '([^']+)'", " ".join(parser.format_help().split()))
    llama = small_decoder(vocab_size=8, width=8, layers=1)
    for model, names in ((tiny_model(), {"q", "v"}), (llama, {"q_proj", "v_proj"})):
        found = adapted(model, Lora(2, targets=targets))
        assert {name.rpartition(".")[2] for name in found} == names


# --- Memory ---------------------------------------------------------------------------------------


def held(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


WIDE = {"vocab_size": 4096, "emb_dim": 64, "mlp_dim": 256}


@pytest.mark.usefixtures("_adam")
@pytest.mark.parametrize("objective", ["tnrf", slow_unless(False, "ul")])
def test_one_copy_of_the_model_and_none_in_the_optimizer(objective):
    """Read off the compiled program: what goes in, and what it holds beside that."""
    model = tiny_model(**WIDE)
    size = held(model.param_shapes())
    head = 4 * WIDE["vocab_size"] * WIDE["emb_dim"]
    arrays = {name: x[:, :2] if x.ndim > 1 else x for name, x in ARRAYS.items()}

    def of(lora, **changes):
        settings = dataclasses.replace(ADAM, objective=objective, lora=lora, **changes)
        step = Step(model, settings, arrays)
        memory = step.compiled.memory_analysis()
        return step, memory.argument_size_in_bytes, memory.temp_size_in_bytes

    step, inputs, working = of(LORA)
    assert step.frozen.original is None
    adapter = held(step.state.params)
    assert held(step.state.optimizer) <= 2 * adapter + 64
    assert size < inputs < size + 3 * adapter + 4096
    # No gradient of the head's matrix either, though the losses would give it.
    assert working < head
    _, inputs, working = of(LORA, param_dtype="bfloat16")
    assert inputs < size / 2 + 3 * adapter + 4096
    # The control: with all parameters trained it is all there twice, and in the optimizer.
    _, inputs, working = of(None)
    assert inputs > (4 if objective == "tnrf" else 3) * size
    assert working > head


@pytest.mark.usefixtures("_adam")
def test_the_plan_shows_what_is_saved():
    model = tiny_model(**WIDE)
    size = held(model.param_shapes())
    step = Step(model, ADAM, ARRAYS)
    plan = plan_memory(step, ADAM)
    adapter = held(step.state.params)
    assert plan.parameters == size + adapter
    assert plan.original == 0
    # Gradients, two moments, and the original.
    assert plan.saved == pytest.approx(4 * size - 4 * adapter, abs=64)
    assert "training all parameters would take" in plan.text()
    settings = dataclasses.replace(ADAM, lora=None)
    full = plan_memory(Step(model, settings, ARRAYS), settings)
    assert full.saved == 0
    assert "training all" not in full.text()


def test_an_original_of_its_own_is_held_beside_the_base():
    model = tiny_model()
    own = Step(model, TRAINING, ARRAYS, own_original=True)
    assert held(own.frozen.original) == held(own.frozen.base) == held(model.param_shapes())
    params, other = tiny_params(), tiny_params(1)
    batch = {name: array[:2] for name, array in ARRAYS.items()}
    # The state is given away.
    losses = []
    for step, frozen in (
        (own, own.place(params, other)),
        (own, own.place(params, params)),
        (s := Step(model, TRAINING, ARRAYS), s.place(params, params)),
    ):
        losses.append(float(step(step.start(params), frozen, batch, 0)[1]["loss"]))
    assert losses[1] == losses[2] != losses[0]


# --- Runs -----------------------------------------------------------------------------------------


def kill_at_batch(number, monkeypatch):
    honest, calls = train_module.Batches.at, []

    def killed(*arguments):
        calls.append(0)
        if len(calls) == number:
            raise KeyboardInterrupt
        return honest(*arguments)

    monkeypatch.setattr(train_module.Batches, "at", killed)


def test_checkpoints_hold_the_adapter_alone_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    model, params = tiny_model(), tiny_params()
    settings = dataclasses.replace(TRAINING, steps=4, checkpoint_every=2)
    unbroken = train(model, params, ARRAYS, settings, tmp_path / "unbroken")
    # Steps of Adafactor's are in proportion to what they change, and B is 0 at first.
    moved = traverse_util.flatten_dict(dict(unbroken.params))
    assert all(np.abs(x).max() > 1e-4 for path, x in moved.items() if path[-1] == "lora_b")
    assert jax.tree.structure(unbroken.params) == jax.tree.structure(adapter_shapes(model, LORA))
    kill_at_batch(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(model, params, ARRAYS, settings, tmp_path / "killed")
    monkeypatch.undo()
    again = train(model, params, ARRAYS, settings, tmp_path / "killed")
    jax.tree.map(np.testing.assert_array_equal, again.params, unbroken.params)
    assert again.history == unbroken.history
    saved = json.loads((tmp_path / "killed/checkpoints/4/params/_METADATA").read_text())
    names = {re.findall(r"\w+", path)[-1] for path in saved["tree_metadata"]}
    assert names == {"lora_a", "lora_b"}
    with pytest.raises(ValueError, match=r"rank \(2 there, 3 asked for\)"):
        train(
            model, params, ARRAYS, dataclasses.replace(settings, lora=Lora(3, 3.0)),
            tmp_path / "killed",
        )  # fmt: skip


@pytest.mark.slow  # test_train splits all parameters
def test_devices_that_split_the_model_give_the_same(tmp_path):
    model, params = tiny_model(vocab_size=332), tiny_params(vocab_size=332)
    one = train(model, params, ARRAYS, TRAINING, tmp_path / "one")
    mesh = make_mesh(2, jax.devices()[:4])
    two = train(model, params, ARRAYS, TRAINING, tmp_path / "two", mesh=mesh)
    placed = two.params["encoder"]["layers_0"]["attention"]["query"]
    assert placed["lora_b"].sharding.spec == jax.P(None, "model")
    assert placed["lora_a"].sharding.is_fully_replicated
    np.testing.assert_allclose(two.history["loss"], one.history["loss"], rtol=1e-5)
    # Adafactor's first steps are of one size, whatever the gradient's is.
    pairs = zip(*map(jax.tree.leaves, (one.params, two.params)), strict=True)
    moved = [np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs]
    assert max(moved) <= 2 * TRAINING.learning_rate * TRAINING.steps


# --- Folders --------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """Of models: what an adapter of the attention's matrices has in its folder."""

    targets: str
    modules: int
    first: str  # of them
    task: str


KINDS = {
    "T5": Kind("Attention", 12, "encoder.block.0.layer.0.SelfAttention.q", "SEQ_2_SEQ_LM"),
    "decoder": Kind("self_attn", 4, "model.layers.0.self_attn.q_proj", "CAUSAL_LM"),
}


@pytest.fixture
def kind(request):
    """Of the model in `place`."""
    return getattr(request, "param", "T5")


@pytest.fixture
def place(tmp_path, kind):
    """A model folder and a data file."""
    FOLDERS[kind](tmp_path / "base")
    write_examples(tmp_path / "edits.jsonl", EXAMPLES)
    (tmp_path / "inputs.txt").write_text("a fire\na flood\n")
    return tmp_path


def run(place, *more, output="adapter"):
    given = ["--model", place / "base", "--data", place / "edits.jsonl", "--output", place / output]
    given += ["--steps", 3, "--batch-size", 2, "--devices", 1, "--quiet"]
    return cli_code("edit", *given, *more)


def cli_code(*words):
    try:
        with jax.numpy_dtype_promotion("standard"):
            return cli.main([str(word) for word in words])
    except SystemExit as left:
        return left.code


def job(place, output="adapter", lora=LORA, **more):
    settings = dataclasses.replace(TRAINING, lora=lora, steps=3)
    return Job(place / "base", [place / "edits.jsonl"], place / output, settings, devices=1, **more)


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_an_adapter_folder_is_pefts_and_merging_gives_the_same_model(kind, place):
    targets, modules, first, task = KINDS[kind]
    more = ("--lora", 2, "--lora-alpha", 3, "--lora-targets", targets, "--learning-rate", 0.1)
    assert run(place, *more) == 0
    assert run(place, *more, "--merge", output="whole") == 0
    adapter, whole = place / "adapter", place / "whole"
    assert {file.name for file in adapter.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "t5patches.json",
    }  # fmt: skip
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place / "base")
    assert len(config.pop("target_modules")) == modules
    assert config.items() >= {
        "peft_type": "LORA", "task_type": task, "r": 2, "lora_alpha": 3, "bias": "none",
        "fan_in_fan_out": False,
    }.items()  # fmt: skip
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = f"base_model.model.{first}"
    assert len(tensors) == 2 * modules
    assert tensors[f"{name}.lora_A.weight"].shape == (2, 16)
    assert tensors[f"{name}.lora_B.weight"].shape == (16, 2)
    # By the names of the base's own folder, as PEFT adds them.
    before, after = (load_file(place / x / "model.safetensors") for x in ("base", "whole"))
    for key, x in before.items():
        module = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in tensors:
            a, b = (tensors[f"{module}.lora_{half}.weight"] for half in "AB")
            np.testing.assert_allclose(after[key], x + 1.5 * b @ a, rtol=1e-5, atol=1e-6)
            assert np.abs(after[key] - x).max() > 1e-3
        else:
            np.testing.assert_array_equal(after[key], x)
    beside, alone = load_model(adapter, place / "base"), load_model(whole)
    assert beside.model == alone.model
    close(beside.params, alone.params, rtol=1e-6)
    (record,), (merged_record,) = map(read_rounds, (adapter, whole))
    assert record["history"] == merged_record["history"]
    assert record["settings"]["lora"] == {"rank": 2, "alpha": 3.0, "targets": targets}
    assert record["settings"]["optimizer"] == "adam"
    assert "rank 2, alpha 3, to lie beside `base`" in (adapter / "README.md").read_text()
    assert not unfinished(adapter).exists()
    # The next round of a merged model begins with what the record says.
    assert merged_record["fingerprints"]["edited"] != record["fingerprints"]["edited"]


def test_evaluate_and_annotate_take_an_adapter_beside_its_base(place, capsys):
    assert run(place, "--lora", 2, "--learning-rate", 0.3) == 0
    assert run(place, "--lora", 2, "--learning-rate", 0.3, "--merge", output="whole") == 0
    capsys.readouterr()
    inputs = ("--inputs", place / "inputs.txt", "--max-length", 6, "--quiet", "--json")
    after = ("--after", place / "adapter", place / "whole")
    assert cli_code("evaluate", "--before", place / "base", *after, *inputs) == 0
    results = json.loads(capsys.readouterr().out)
    adapter, whole = results["rows"]
    assert adapter["measures"]["kl"]["value"] == pytest.approx(whole["measures"]["kl"]["value"])
    assert adapter["measures"]["kl"]["value"] > 1e-4
    (place / "rules.toml").write_text('[[rule]]\nwords = ["a"]\n')
    rules = ("--rules", place / "rules.toml")
    said = []
    for name, base in (("adapter", ("--base", place / "base")), ("whole", ())):
        file = place / f"{name}.jsonl"
        asked = ("--model", place / name, *base, "--output", file, *rules, *inputs)
        assert cli_code("annotate", *asked) == 0
        said.append(file.read_text())
    assert said[0] == said[1]
    capsys.readouterr()
    # Beside another base, or none.
    model_folder(place / "other", seed=1)
    wrong = {
        ("evaluate", "--before", place / "other", "--after", place / "adapter"): "trained beside",
        ("annotate", "--model", place / "adapter", "--base", place / "other", *rules,
         "--output", place / "x.jsonl"): "no adapter of",
        ("annotate", "--model", place / "adapter", *rules, "--output", place / "x.jsonl"):
            r"say which folder it is an adapter of \(--base DIR\)",
    }  # fmt: skip
    for words, message in wrong.items():
        assert cli_code(*words, *inputs) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (place / "x.jsonl").exists()


@pytest.mark.parametrize("kind", [slow_unless(x != "T5", x) for x in KINDS], indirect=True)
def test_a_killed_edit_goes_on_and_a_cached_original_gives_the_same(kind, place, monkeypatch):
    assert run(place, "--lora", 2, output="unbroken") == 0
    kill_at_batch(3, monkeypatch)
    more = ("--lora", 2, "--checkpoint-every", 1)
    assert run(place, *more, output="killed") == 130
    assert not (place / "killed").exists()
    monkeypatch.undo()
    assert run(place, *more, "--resume", output="killed") == 0
    cache = ("--cache-teacher", place / "cache")
    assert run(place, "--lora", 2, *cache, output="cached") == 0
    assert run(place, "--lora", 2, "--param-dtype", "bfloat16", output="bfloat16") == 0
    losses = {}
    for name in ("unbroken", "killed", "cached", "bfloat16"):
        losses[name] = read_rounds(place / name)[-1]["history"]["loss"]
    assert losses["unbroken"] == losses["killed"]
    np.testing.assert_allclose(losses["cached"], losses["unbroken"], rtol=1e-4)
    np.testing.assert_allclose(losses["bfloat16"], losses["unbroken"], rtol=0.1)
    a, b = (load_file(place / x / "adapter_model.safetensors") for x in ("unbroken", "killed"))
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name])
        assert x.dtype == np.float32


# --- Bad input ------------------------------------------------------------------------------------

WRONG_EDITS = {
    # Options of `edit`, and what is said.
    "rank above a matrix": (
        ["--lora", "17"],
        r"rank of the adapter is 17 and the kernel of encoder\S+ has 16 x 16: .* at most 16",
    ),
    "no such targets": (
        ["--lora", "2", "--lora-targets", "q_proj"],
        r"'q_proj' are found in the name of none of the model's 18 linear layers, such as encoder",
    ),
    "the head": (["--lora", "2", "--lora-targets", "^lm_head"], "matrix of the logits take no"),
    "no regular expression": (
        ["--lora", "2", "--lora-targets", "(q"],
        r"'\(q' are no regular expression",
    ),
    "too much of an expression": (
        ["--lora", "2", "--lora-targets", "q{99999999999}"],
        r"'q\{99999999999}' are no regular expression: the repetition number is too large",
    ),
    "brackets without end": (
        ["--lora", "2", "--lora-targets", "(" * 3000 + "q" + ")" * 3000],
        "are no regular expression: maximum recursion depth exceeded",
    ),
    "no rank": (["--lora", "x"], "'x' is not a whole number above -1"),
    "no alpha": (["--lora", "2", "--lora-alpha", "nan"], "alpha of an adapter is nan"),
    "alpha alone": (["--lora-alpha", "2"], "give --lora RANK too"),
    "targets alone": (["--lora-targets", "q"], "give --lora RANK too"),
    "merge alone": (["--merge"], r"there is none \(--lora\)"),
    "a dtype": (["--lora", "2", "--param-dtype", "float16"], "param_dtype is 'float16'"),
    "nothing frozen": (
        ["--objective", "ul", "--param-dtype", "bfloat16"],
        "there are no frozen parameters.*--lora",
    ),
}


@pytest.mark.parametrize("case", WRONG_EDITS)
def test_what_is_wrong_is_said_before_training_and_nothing_is_written(case, place, capsys):
    options, message = WRONG_EDITS[case]
    before = sorted(place.rglob("*"))
    assert run(place, *options) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(place.rglob("*")) == before


def test_the_plan_is_printed_and_nothing_is_written(place, capsys):
    before = sorted(place.rglob("*"))
    assert run(place, "--lora", 2, "--plan", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["original"] == 0
    assert plan["saved"] > 2 * plan["parameters"]
    assert sorted(place.rglob("*")) == before


def test_a_model_with_a_cached_original_is_held_once(place, capsys, monkeypatch):
    """What was read is where the update reads it, and nothing of it stays where it was read."""
    cached = ("--lora", 2, "--cache-teacher", place / "cache")
    assert run(place, *cached, "--plan", "--json") == 0
    assert json.loads(capsys.readouterr().out)["original"] == 0
    honest, given = edit_module.train, []

    def trained(model, params, *arguments, original, **more):
        given.append((params, original))
        return honest(model, params, *arguments, original=original, **more)

    monkeypatch.setattr(edit_module, "train", trained)
    assert run(place, *cached) == 0
    ((params, original),) = given
    assert original is params
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))


WHOLE = {
    # Where a command needs a whole model; what it would read is not there.
    "edit": ("edit", "--model", "adapter", "--data", "none.jsonl"),
    "original": ("edit", "--model", "base", "--original", "adapter", "--data", "none.jsonl"),
    "align": ("align", "--model", "adapter", "--inputs", "none.txt", "--scorer", "none:none"),
    "reward": ("reward", "--model", "adapter", "--preferences", "none.jsonl"),
    "convert": ("convert", "--model", "adapter"),
    "convert like": ("convert", "--model", "none", "--like", "adapter"),
    "base": ("annotate", "--model", "base", "--base", "adapter", "--inputs", "inputs.txt",
             "--rules", "rules.toml"),
    "before": ("evaluate", "--before", "adapter", "--after", "base", "--inputs", "inputs.txt"),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_an_adapter_is_no_whole_model(case, place, capsys, monkeypatch):
    """It is refused before anything is read, and nothing is written."""
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text("{}")
    (place / "rules.toml").write_text('[[rule]]\nwords = ["a"]\n')
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    output = () if case == "before" else ("--output", "out")
    assert cli_code(*WHOLE[case], *output) == 2
    remedy = r"say which folder .*\(--base DIR\)" if case == "before" else "take the model that it"
    assert re.search(f"adapter is an adapter and no whole model: {remedy}", capsys.readouterr().err)
    assert sorted(place.rglob("*")) == before


def test_a_whole_model_has_no_base(place, capsys):
    (place / "rules.toml").write_text('[[rule]]\nwords = ["a"]\n')
    model, inputs, rules = (str(place / name) for name in ("base", "none.txt", "rules.toml"))
    given = ("annotate", "--model", model, "--base", model, "--inputs", inputs, "--rules", rules)
    assert cli_code(*given, "--output", str(place / "out")) == 2
    assert "base is a whole model: leave it out" in capsys.readouterr().err


NAME = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"


def config(**changes):
    def spoil(folder, tensors):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def weights(change):
    def spoil(folder, tensors):
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return spoil


WRONG_FOLDERS = {
    # What is done to an adapter's folder, and what is said.
    "another kind": (config(peft_type="IA3"), "peft_type is 'IA3'; only 'LORA' is known"),
    "biases": (config(bias="all"), "bias is 'all'; only 'none' is known"),
    "dora": (config(use_dora=True), "use_dora is True"),
    "a base of its own": (
        config(init_lora_weights="pissa_niter_4"),
        "init_lora_weights is 'pissa_niter_4'; only True or False or .*'gaussian'.* is known",
    ),
    "from a token on": (config(alora_invocation_tokens=[5]), r"alora_invocation_tokens is \[5\]"),
    "quantised groups": (config(use_qalora=True), "use_qalora is True; only False or None is kn"),
    "layers twice": (config(layer_replication=[[0, 1], [0, 1]]), r"layer_replication is \[\[0, 1"),
    "whole modules": (config(modules_to_save=["lm_head"]), "modules_to_save is"),
    "ranks by name": (config(rank_pattern={"q": 4}), "rank_pattern is"),
    "rank": (config(r=3), r"is float32 \(2, 16\) and \(3, 16\) of floats is needed"),
    "rank of text": (config(r="2"), "r is '2'"),
    "rank 0": (config(r=0), "rank of an adapter is 0"),
    "alpha": (config(lora_alpha=float("inf")), "alpha of an adapter is inf"),
    "no JSON": (lambda f, t: (f / "adapter_config.json").write_text("{"), "config.json cannot be"),
    "a list": (lambda f, t: (f / "adapter_config.json").write_text("[]"), "config.json cannot be"),
    "no weights": (
        lambda f, t: (f / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors cannot be read.*save_pretrained",
    ),
    "cut short": (
        lambda f, t: (f / "adapter_model.safetensors").write_bytes(b"\x10" + bytes(40)),
        "adapter_model.safetensors cannot be read",
    ),
    "half a pair": (weights(lambda t: t.pop(NAME)), "attention/query has no lora_a"),
    "nothing": (weights(lambda t: t.clear()), "is empty"),
    "another model's": (
        weights(lambda t: t.update({NAME.replace("block.0", "block.7"): t[NAME]})),
        "block.7.*belongs to no linear layer of the model",
    ),
    "a name of no half": (
        weights(lambda t: t.update({NAME.replace("lora_A", "lora_C"): t[NAME]})),
        "lora_C.weight belongs to no linear layer",
    ),
    "not finite": (
        weights(lambda t: t.update({NAME: np.full((2, 16), np.nan, np.float32)})),
        "not finite",
    ),
    "whole numbers": (
        weights(lambda t: t.update({NAME: np.ones((2, 16), np.int32)})),
        "is int32",
    ),
    "eight bits": (
        lambda f, t: (f / "adapter_model.safetensors").write_bytes(
            (58).to_bytes(8, "little")
            + b'{"x":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
            + b"\x01\x01"
        ),
        "adapter_model.safetensors cannot be read",
    ),
    "a link out": (
        lambda f, t: (
            (f / "adapter_config.json").unlink(),
            (f / "adapter_config.json").symlink_to(f.parent / "elsewhere.json"),
        ),
        "outside its folder",
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base and an adapter of it."""
    place = tmp_path_factory.mktemp("made")
    base = model_folder(place / "base")
    model, _ = load_checkpoint(base)
    save_adapter(place / "adapter", model, some_adapter(model), LORA, base=base)
    return place


def test_the_same_adapter_is_the_same_file(made, tmp_path):
    model, _ = load_checkpoint(made / "base")
    for number in range(8):
        save_adapter(tmp_path / str(number), model, some_adapter(model), LORA, base=made / "base")
    files = {(tmp_path / str(n) / "adapter_model.safetensors").read_bytes() for n in range(8)}
    assert files == {(made / "adapter" / "adapter_model.safetensors").read_bytes()}


def test_an_adapter_that_could_not_be_read_is_not_written(made, tmp_path):
    model, _ = load_checkpoint(made / "base")
    spoilt = jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan), some_adapter(model))
    with pytest.raises(
        ValueError, match=r"adapter is not written: .*q.lora_A.weight holds numbers"
    ):
        save_adapter(tmp_path / "adapter", model, spoilt, LORA, base=made / "base")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["base", "other"])
def test_an_adapter_that_does_not_say_of_which_model_is_told_once(name, made, tmp_path):
    """As PEFT writes it: it fits any model of the same sizes."""
    adapter = shutil.copytree(made / "adapter", tmp_path / "adapter")
    weights(lambda tensors: None)(adapter, load_file(adapter / "adapter_model.safetensors"))
    base = made / "base"
    if name == "other":
        base = model_folder(tmp_path / "other", seed=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        inspect_model(adapter, base)
        load_model(adapter, base)
    (told,) = told
    ending = "and its weights may be others" if name == "base" else "sure that this is the same"
    assert re.search(
        f"adapter has no fingerprint .* an adapter of {base}; its adapter_config.json names "
        f"'{made / 'base'}'.*{ending}",
        str(told.message),
    )
    load_model(made / "adapter", made / "base")  # one that says it is not told of


@pytest.mark.parametrize("case", WRONG_FOLDERS)
def test_a_spoilt_adapter_is_refused(case, made, tmp_path):
    spoil, message = WRONG_FOLDERS[case]
    folder = shutil.copytree(made / "adapter", tmp_path / "adapter")
    (tmp_path / "elsewhere.json").write_text((folder / "adapter_config.json").read_text())
    spoil(folder, load_file(folder / "adapter_model.safetensors"))
    with pytest.raises(ValueError, match=message):
        load_adapter(folder, made / "base")


def test_weights_of_its_own_make_a_folder_a_whole_models(made, tmp_path):
    folder = shutil.copytree(made / "adapter", tmp_path / "adapter")
    shutil.copy(made / "base" / "config.json", folder)
    assert is_adapter(folder)
    shutil.copy(made / "base" / "model.safetensors", folder)
    assert not is_adapter(folder)


def test_what_is_written_is_read(made):
    model, _ = load_checkpoint(made / "base")
    found = load_adapter(made / "adapter", made / "base")
    assert found.lora.scale == LORA.scale
    close(found.params, some_adapter(model), rtol=0)
    # One that this library did not make says of no base that it is its own.
    folder = shutil.copytree(made / "adapter", made / "foreign")
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    # How it began says nothing of what it is, as long as the base stays as it is.
    for begun in (True, "gaussian", "eva"):
        config(init_lora_weights=begun)(folder, {})
        with pytest.warns(UserWarning, match="foreign has no fingerprint"):
            again = load_adapter(folder, made / "base")
        close(again.params, found.params, rtol=0)
