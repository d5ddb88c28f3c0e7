"""Annotate, edit and evaluate a decoder-only model by the commands, as they do a T5."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_samples
from editing_samples import model_folder

from t5patches import cli
from t5patches.editing import annotate as annotate_module
from t5patches.model.decoder.model import small_decoder
from t5patches.model.decoder.network import SLIDING
from t5patches.model.folder import load_model
from t5patches.model.huggingface import save_checkpoint

pytestmark = pytest.mark.usefixtures("shared_programs")

INPUTS = ["a fire closed the library", "the mayor", "café", "Paris"]
MODEL = small_decoder(
    vocab_size=336,  # more rows than the tokenizer has ids
    width=16,
    layers=2,
    family="mistral",
    layer_types=(SLIDING,) * 2,
    sliding_window=6,
    begin_id=0,
    end_ids=(1, 3),
)


def run(*arguments):
    try:
        with jax.numpy_dtype_promotion("standard"):
            return cli.main([str(x) for x in arguments])
    except SystemExit as left:
        return left.code


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that says letters, as one that is not trained does; its rules and inputs."""
    path = tmp_path_factory.mktemp("decoder")
    params = jax.jit(MODEL.init)(jax.random.key(0))
    params = jax.tree.map(lambda x: np.asarray(2 * x), params)
    files = {
        "tokenizer.json": tokenizer_samples.tokenizer_json("byte-level"),
        "tokenizer_config.json": json.dumps({"bos_token": "<s>", "add_bos_token": True}),
    }
    save_checkpoint(path / "model", MODEL, params, files=files)
    (path / "rules.toml").write_text('[[rule]]\npattern = "[a-m]"\n')
    (path / "inputs.txt").write_text("".join(text + "\n" for text in INPUTS))
    return path


def test_the_loop(place, capsys):
    model, inputs = place / "model", ("--inputs", place / "inputs.txt")
    rules, quiet = ("--rules", place / "rules.toml"), ("--quiet", "--json")
    made = ("--max-length", 6, "--seed", 1)
    sampled = ("--samples", 3, "--temperature", 1, "--expand", 4)
    edits = ("--output", place / "edits.jsonl")
    assert run("annotate", "--model", model, *inputs, *rules, *made, *sampled, *edits, *quiet) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["outputs"] == 12
    assert found["marked_tokens"] > 3
    assert found["negatives"] > 0
    lines = [json.loads(line) for line in (place / "edits.jsonl").read_text().splitlines()]
    assert all(0 <= i < 336 for line in lines for i in line["tokens"])  # no padding

    how = ("--steps", 30, "--batch-size", 4, "--learning-rate", 3e-2, "--alpha", 10)
    how += ("--objective", "tnff", "--cache-teacher", place / "cache", "--devices", 1)
    edited = ("--data", place / "edits.jsonl", "--output", place / "edited")
    assert run("edit", "--model", model, *edited, *how, *quiet) == 0
    history = json.loads(capsys.readouterr().out)["history"]
    assert sum(history["said"][-5:]) < sum(history["said"][:5])
    before, after = load_model(model), load_model(place / "edited")
    assert after.model == before.model
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (place / "edited" / file).read_bytes() == (model / file).read_bytes()

    compared = ("--before", model, "--after", place / "edited")
    assert run("evaluate", *compared, *inputs, *rules, *made, "--report", place / "r", *quiet) == 0
    assert "kl" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["t5", "decoder"])
def test_what_a_model_says_is_made_in_bfloat16_where_it_is_asked_for(
    family, place, tmp_path, monkeypatch, capsys
):
    model = place / "model"
    if family == "t5":
        model = tmp_path / "t5"
        model_folder(model)
    given = ("--inputs", place / "inputs.txt", "--rules", place / "rules.toml", "--max-length", 6)
    given += ("--dtype", "bfloat16", "--quiet", "--json")
    honest, computed_in = annotate_module.generate, []

    def generate(network, *arguments, **options):
        computed_in.append(network.config.dtype)
        return honest(network, *arguments, **options)

    monkeypatch.setattr(annotate_module, "generate", generate)
    sampled = ("--samples", 3, "--temperature", 1, "--expand", 4)
    edits = ("--output", tmp_path / "edits.jsonl")
    assert run("annotate", "--model", model, *given, *sampled, *edits) == 0
    assert json.loads(capsys.readouterr().out)["negatives"] > 0
    assert run("evaluate", "--before", model, "--after", model, *given) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["dtype"] == "bfloat16"
    assert found["rows"][0]["measures"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert len(computed_in) >= 4
    assert {*computed_in} == {jnp.bfloat16}
    # The cache is half as large for that.
    network, params, _ = load_model(model, dtype="bfloat16")
    prompts, begun = jnp.full((2, 3), 5), jnp.zeros((2, 0), jnp.int32)
    cache = jax.eval_shape(
        lambda x: network.prefill(x, prompts, begun, 0, streams=2, max_length=6), params
    )
    floats = [x.dtype for x in jax.tree.leaves(cache) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {*floats} == {jnp.dtype(jnp.bfloat16)}
    call = ("annotate", "--model", model, *given, "--output", tmp_path / "none.jsonl")
    assert run(*call, "--dtype", "float16") == 2
    assert "one of ('float32', 'bfloat16') is needed" in capsys.readouterr().err
    assert not (tmp_path / "none.jsonl").exists()


def test_what_is_longer_than_the_positions_is_told(place, capsys):
    short = MODEL.replace(max_positions=12)
    save_checkpoint(
        place / "short",
        short,
        load_model(place / "model").params,
        files={"tokenizer.json": tokenizer_samples.tokenizer_json("byte-level")},
    )
    asked = ("--inputs", place / "inputs.txt", "--rules", place / "rules.toml")
    call = ("annotate", "--model", place / "short", *asked, "--output", place / "none.jsonl")
    assert run(*call, "--max-length", 10) == 2
    assert "has 12 positions" in capsys.readouterr().err
    assert not (place / "none.jsonl").exists()
    # A correction that answers may be longer than what it corrects: told before weights are read.
    line = {"inputs": "a", "outputs": "ab", "spans": [[0, 1]], "corrected_targets": "ab " * 9}
    (place / "answers.jsonl").write_text(json.dumps(line))
    call = ("edit", "--model", place / "short", "--data", place / "answers.jsonl")
    for objective in ("ce", "dpo"):
        assert run(*call, "--objective", objective, "--output", place / "none", "--plan") == 2
        assert "has 12 positions" in capsys.readouterr().err
