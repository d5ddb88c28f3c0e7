"""`t5patches edit`: a folder in, a folder like it out, whatever happens in between."""

import dataclasses
import functools
import json
import re
import shlex
import shutil

import editing_samples
import jax
import numpy as np
import pytest
import t5_folders
from harness import slow_unless
from safetensors.numpy import load_file

from t5patches import cli
from t5patches.editing import edit as edit_module
from t5patches.editing import outputs as outputs_module
from t5patches.editing import states as states_module
from t5patches.editing import train as train_module
from t5patches.editing.data import Example, Source
from t5patches.editing.edit import Job, check
from t5patches.editing.records import check_chat, read_rounds
from t5patches.editing.train import TrainSettings
from t5patches.model.decoder.model import small_decoder
from t5patches.model.folder import load_model
from t5patches.model.generate import generate
from t5patches.model.huggingface import load_checkpoint, save_checkpoint
from t5patches.model.tokenizer import Message, input_text, train_sentencepiece
from t5patches.runs import claims
from t5patches.runs.files import unfinished

pytestmark = pytest.mark.usefixtures("shared_programs")

TEXTS = ["a cat sat on a mat", "a dog sat on a cat", "on a mat a dog sat"]
LINES = [
    {"inputs": "a cat sat", "outputs": "a dog sat", "spans": [[2, 5]]},
    {"inputs": "on a mat", "outputs": "a cat sat on a mat", "spans": []},
    {"inputs": "a dog", "outputs": "a dog on a dog", "spans": [[2, 5], [11, 14]]},
    {"inputs": "sat", "outputs": "dog sat", "spans": [[0, 3]]},
]
SMALL = ("--steps", "4", "--batch-size", "2", "--checkpoint-every", "2", "--devices", "1")


# Compile in a third of the time of those under `data/`. With the name of their vocabulary's file.
TINY = {
    "T5": (editing_samples.tiny_model(vocab_size=64, emb_dim=8, head_dim=4), "spiece.model"),
    "decoder": (small_decoder(vocab_size=32, width=8, layers=1), "tokenizer.model"),
}
BOTH = pytest.mark.parametrize("kind", TINY)


@functools.cache
def tiny_params(kind):
    return TINY[kind][0].init(jax.random.key(0))


@pytest.fixture
def place(tmp_path):
    """A place with a model folder, by name one of `data/`, and a data file."""

    def make(name="tiny", kind="T5"):
        model, (network, vocabulary) = tmp_path / name, TINY[kind]
        if name == "tiny":
            save_checkpoint(model, network, tiny_params(kind))
        else:
            shutil.copytree(t5_folders.DATA / name, model)
            (model / "expected.npz").unlink()
        (model / vocabulary).write_bytes(train_sentencepiece(TEXTS * 20, 30))
        data = tmp_path / "edits.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in LINES))
        return tmp_path

    return make


def run(place, *more, model="tiny", output="edited"):
    """The exit code of an edit."""
    # Optax's Adam multiplies a float by an integer count.
    given = ["--model", place / model, "--data", place / "edits.jsonl", "--output", place / output]
    try:
        with jax.numpy_dtype_promotion("standard"):
            return cli.main([str(x) for x in ("edit", *given, *SMALL, *more)])
    except SystemExit as left:
        return left.code


def tensors(folder):
    return {
        k: x for file in sorted(folder.glob("*.safetensors")) for k, x in load_file(file).items()
    }


def test_an_example_of_one_token_in_all_is_known_to_be_of_the_model():
    one = Example("", "a", ((0, 1),), (), (5,), (True,))
    edit_module._check_ids("edits.jsonl", [one], 6)
    with pytest.raises(ValueError, match="has the token 5 and the model 5 ids"):
        edit_module._check_ids("edits.jsonl", [one], 5)


@pytest.mark.parametrize("name", [slow_unless(x == "t5_1_0", x) for x in t5_folders.NAMES])
def test_a_folder_like_the_first_is_made(place, name, capsys):
    place = place(name)
    (place / name / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert run(place, "--quiet", "--json", model=name) == 0
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert shown.err == ""
    tokens = record["counts"]["tokens"]
    assert record["counts"] == {"examples": 4, "tokens": tokens, "marked": 4, "only others": 0}
    assert len(record["history"]["loss"]) == 4
    before, after = place / name, place / "edited"
    assert not unfinished(after).exists()
    expected = {file.name for file in before.iterdir()} | {"t5patches.json", "README.md"}
    assert {file.name for file in after.iterdir()} == expected
    for file in ("config.json", "spiece.model", "generation_config.json"):
        assert (after / file).read_bytes() == (before / file).read_bytes()
    old, new = tensors(before), tensors(after)
    assert {k: (x.shape, x.dtype) for k, x in old.items()} == {
        k: (x.shape, x.dtype) for k, x in new.items()
    }
    assert any(not np.array_equal(old[k], new[k]) for k in old)
    if name == "t5_1_0":
        copy = new["encoder.embed_tokens.weight"]
        np.testing.assert_array_equal(new["shared.weight"], copy)
    card = (after / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# A model\n\n## Edited with t5patches")
    for part in ("objective `tnrf`, alpha 1", "edits.jsonl", "4 updates of 2", "4 of "):
        assert part in card
    assert read_rounds(after) == [record]
    load_model(after)


@BOTH
def test_a_second_round_keeps_the_first_models_distribution(kind, place, capsys):
    place = place(kind=kind)
    assert run(place) == 0
    assert "loss" in capsys.readouterr().out
    original = ("--original", place / "tiny")
    more = place / "more.jsonl"
    more.write_text((place / "edits.jsonl").read_text() + "\n")
    assert run(place, *original, "--data", more, model="edited", output="again") == 2
    assert "they would come back: give those files as data too (edits.jsonl)" in (
        capsys.readouterr().err
    )
    assert run(place, *original, model="edited", output="again") == 0
    first, second = read_rounds(place / "again")
    assert first == read_rounds(place / "edited")[0]
    assert second["fingerprints"]["params"] == first["fingerprints"]["edited"]
    assert second["fingerprints"]["original"] == first["fingerprints"]["original"]
    assert (place / "again" / "README.md").read_text().count("## Edited with") == 2
    assert "Kept close to: tiny." in (place / "again" / "README.md").read_text()


@BOTH
def test_killed_at_any_moment_there_is_no_folder_or_a_whole_one(kind, place, monkeypatch, capsys):
    place = place(kind=kind)
    assert run(place, output="unbroken") == 0

    def kill(module, name, when=1):
        """Interrupts at a call of a function, or (when negative) after it."""
        real, calls = getattr(module, name), []

        def called(*arguments, **options):
            calls.append(0)
            if len(calls) == when:
                raise KeyboardInterrupt
            result = real(*arguments, **options)
            if when < 0:
                raise KeyboardInterrupt
            return result

        return functools.partial(monkeypatch.setattr, module, name, called), functools.partial(
            monkeypatch.setattr, module, name, real
        )

    moments = [
        (edit_module, "load_checkpoint", 1),
        (train_module.Batches, "at", 4),  # beyond the first checkpoint
        (edit_module, "record_of", 1),  # trained, not written
        (edit_module, "save_result", -1),  # written, not renamed
    ]
    for module, name, when in moments:
        spoil, restore = kill(module, name, when)
        spoil()
        assert run(place, "--resume") == 130
        assert "repeat the command with --resume to go on" in capsys.readouterr().err
        restore()
        assert not (place / "edited").exists()
        assert unfinished(place / "edited").exists()
    assert run(place) == 2
    assert "holds an unfinished edit: go on with it (--resume)" in capsys.readouterr().err
    assert run(place, "--resume", "--alpha", "2") == 2
    assert "alpha (1.0 there, 2.0 asked for)" in capsys.readouterr().err
    spoil, restore = kill(outputs_module, "remove")  # renamed, not cleaned up
    spoil()
    assert run(place, "--resume") == 130
    restore()
    whole = tensors(place / "edited")
    assert unfinished(place / "edited").exists()
    assert run(place, "--resume") == 0
    assert not unfinished(place / "edited").exists()
    for name, x in tensors(place / "unbroken").items():
        np.testing.assert_array_equal(whole[name], x)
    (round_,), (unbroken,) = (read_rounds(place / name) for name in ("edited", "unbroken"))
    assert round_ | {"seconds": 0} == unbroken | {"seconds": 0}
    for more in ((), ("--plan",), ("--plan", "--resume", "--seed", "1")):
        assert run(place, *more) == 2
        assert "exists: nothing is overwritten" in capsys.readouterr().err
    assert run(place, "--plan", "--resume") == 0
    assert run(place, "--resume", "--seed", "1") == 2


RESUMED = {
    # What a killed edit of 4 steps is resumed with: the exit code and what is said.
    "as it was": ([], 0, ""),
    "other checkpoints": (["--checkpoint-every", "3"], 0, ""),
    "more steps": (["--steps", "6"], 0, ""),
    "fewer steps": (["--steps", "3"], 2, "differs in steps (4 there, 3 asked for)"),
    "another rate": (["--learning-rate", "0.1"], 2, "choose another directory, remove this one"),
    "cut inputs": (["--truncate-inputs", "3"], 2, "truncate_inputs (None there, 3 asked for)"),
    "fewer inputs": (["--skip-longer", "5"], 2, "skip_longer (None there, 5 asked for)"),
}


def test_a_killed_edit_is_resumed_by_what_is_the_same(place, monkeypatch, capsys):
    place = place()
    with monkeypatch.context() as patched:
        patched.setattr(outputs_module, "remove", None)
        patched.setattr(edit_module.Path, "rename", None)  # written, not renamed
        with pytest.raises(TypeError):
            run(place, output="killed")
    for name, (more, code, said) in RESUMED.items():
        shutil.copytree(unfinished(place / "killed"), unfinished(place / name))
        assert run(place, "--resume", *more, output=name) == code, name
        assert said in capsys.readouterr().err
    assert len(read_rounds(place / "more steps")[0]["history"]["loss"]) == 6
    assert run(place, "--steps", "6", output="unbroken") == 0
    for name, x in tensors(place / "unbroken").items():
        np.testing.assert_array_equal(tensors(place / "more steps")[name], x)
    # An edit that is finished, resumed.
    assert run(place, "--resume", "--checkpoint-every", "3", output="as it was") == 0


def test_an_edit_is_resumed_with_all_of_its_data_in_their_order(place, monkeypatch, capsys):
    place = place()
    (place / "more.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    files = [place / "edits.jsonl", place / "more.jsonl"]
    with monkeypatch.context() as patched:
        patched.setattr(edit_module, "save_result", None)
        with pytest.raises(TypeError):
            run(place, "--data", *files)
    claimed = unfinished(place / "edited") / "run.json"
    before = claimed.read_text()
    for given, told in ((files[:1], "more.jsonl ("), (files[::-1], "order (['edits.jsonl', 'more")):
        assert run(place, "--resume", "--steps", "6", "--data", *given) == 2
        assert told in capsys.readouterr().err
        assert claimed.read_text() == before
    assert run(place, "--resume", "--data", *files) == 0
    assert run(place, "--resume", "--data", *files[::-1]) == 2  # nor is it the one that is finished
    assert "exists: nothing is overwritten" in capsys.readouterr().err


def test_after_a_loss_that_is_no_number_what_to_remove_is_named(place, monkeypatch, capsys):
    place = place()
    with monkeypatch.context() as patched:
        update = train_module.Step.__call__

        def broken(*arguments):
            state, metrics = update(*arguments)
            return state, metrics | {"loss": np.nan}

        patched.setattr(train_module.Step, "__call__", broken)
        assert run(place) == 1
    said = capsys.readouterr().err
    assert f"a lower --learning-rate, remove {unfinished(place / 'edited')}" in said
    shutil.rmtree(unfinished(place / "edited"))
    assert run(place, "--learning-rate", "1e-4") == 0


def test_how_to_measure_it_can_be_copied_to_a_shell(place, capsys):
    place = place()
    assert run(place, "--chat", "off", output="an edit") == 0
    command = shlex.split(capsys.readouterr().out.rpartition("Next: ")[2])
    assert command[:3] == ["t5patches", "evaluate", "--before"]
    assert command[4:] == ["--after", str(place / "an edit"), "--chat", "off", "--inputs", "FILE"]


def test_an_edit_at_work_is_not_called_unfinished(place, monkeypatch, capsys):
    place = place()
    unfinished(place / "edited").mkdir()

    def held(_):
        raise ValueError("another process is at work")

    monkeypatch.setattr(outputs_module, "hold", held)
    assert run(place) == 2
    assert "another process is at work" in capsys.readouterr().err


def test_what_is_cut_or_left_out_is_told_once(place, capsys):
    place = place()
    more = ("--truncate-inputs", "3", "--skip-longer", "7", "--plan")
    assert run(place, *more) == 0
    said = capsys.readouterr().out
    assert said.count("edits.jsonl: ") == said.count("inputs truncated to 3 tokens") == 1


def test_lengths_that_updates_are_padded_to_are_told(place, capsys):
    place = place()
    long = {"inputs": "a cat sat " * 30, "outputs": "a dog sat", "spans": [[2, 5]]}
    (place / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*LINES, long]))
    assert run(place, "--plan") == 0
    said = capsys.readouterr().out
    assert re.search(r"padded, inputs and outputs: [1-3] to \d+ and \d+ tokens, [1-3] to ", said)
    assert run(place, "--skip-longer", "40", "--plan") == 0
    assert "padded" not in capsys.readouterr().out


def spoil_data(place, *lines):
    (place / "edits.jsonl").write_text("\n".join(lines))


def test_what_is_wrong_is_told_before_weights_are_read(place, monkeypatch, capsys):
    place = place()
    monkeypatch.setattr(edit_module, "load_checkpoint", None)
    good = (place / "edits.jsonl").read_text()
    tokenizer = (place / "tiny" / "spiece.model").read_bytes()

    def refused(*more, **options):
        assert run(place, *more, **options) == 2
        assert not (place / "edited").exists()
        assert not unfinished(place / "edited").exists()
        return capsys.readouterr().err

    assert "nowhere is no folder" in refused(model="nowhere")
    assert "No such file" in refused("--data", place / "nowhere.jsonl")
    assert "No such file" in refused("--templates", place / "nowhere.txt")
    spoil_data(place, "")
    assert "has no examples" in refused()
    spoil_data(place, '{"inputs": "a"}', "{")
    message = refused()
    assert "line 1: got the fields ['inputs']" in message
    assert "line 2: not JSON" in message
    (place / "bad.jsonl").write_text("[]")
    message = refused("--data", place / "edits.jsonl", place / "bad.jsonl")
    assert "edits.jsonl: 2 bad lines" in message
    assert "bad.jsonl: 1 bad line" in message
    for name, said in (("README.md", "is not UTF-8"), ("t5patches.json", "cannot be read")):
        (place / "tiny" / name).write_bytes(b"caf\xe9")
        assert f"{name} {said}" in refused()
        (place / "tiny" / name).unlink()
    for name in ("README.md", "t5patches.json", "tokenizer_config.json", "notes.txt"):
        (place / "tiny" / name).symlink_to(place / "edits.jsonl")
        for more in ((), ("--plan",), ("--lora", "2")):
            assert f"{name} is a link to {place / 'edits.jsonl'}, outside its folder" in (
                refused(*more)
            )
        (place / "tiny" / name).unlink()
    spoil_data(place, '{"inputs": "a cat", "outputs": "a dog", "spans": []}')
    assert "nothing is marked in any of 1 examples" in refused()
    spoil_data(place, '{"inputs": "a", "outputs": "", "tokens": [64, 1], "spans": []}')
    assert "example 1 has the token 64 and the model 64 ids" in refused()
    (place / "edits.jsonl").write_text(good)
    assert "'inputs' has 4 tokens and the limit is 3" in refused("--max-input-length", "3")
    assert "rates, cap and temperature mix several" in refused("--cap", "3")
    (place / "more.jsonl").write_text(good + "\n")
    both = ("--data", place / "edits.jsonl", place / "more.jsonl")
    assert "got 1 rates for 2" in refused(*both, "--rates", "1")
    shutil.copy(place / "edits.jsonl", place / "more.jsonl")
    for twice in (both, (*both[:2], both[1])):
        assert f"{both[1]} and {twice[2]} are data of the same content: give it" in refused(*twice)
    assert "'nope'" in refused("--implementation", "nope")
    assert "objective is 'tn': one of ('tnff'" in refused("--objective", "tn")
    assert "optimizer is 'sgd': one of" in refused("--optimizer", "sgd")
    assert "dtype is 'float16': one of" in refused("--dtype", "float16")
    assert "dropout is 1.5" in refused("--dropout", "1.5")
    for cache in ("edited", "edited/cache", ".", "edited.unfinished/cache"):
        told = refused("--cache-teacher", place / cache)
        assert f"{place / cache} and output {place / 'edited'}: neither may be in the" in told
    a_file = place / "edits.jsonl"
    told = refused("--cache-teacher", a_file / "cache")
    assert f"cache_teacher is {a_file / 'cache'}: {a_file} is no folder, or cannot be" in told
    assert f"{a_file} is no folder, or cannot be" in refused("--plan", output=a_file / "edited")
    assert "keep_share is 0.7 and there is nothing to keep" in refused("--keep-share", "0.7")
    assert "the data names no alternatives" in refused("--negatives", "2")
    assert "ul keeps close to no original, and " in refused(
        "--objective", "ul", "--original", place / "tiny"
    )
    assert "alpha is 2.0 and the objective ce" in refused("--objective", "ce", "--alpha", "2")
    long = LINES[0] | {"corrected_targets": "a cat sat on a mat a cat sat on a mat"}
    (place / "long.jsonl").write_text(json.dumps(long) + "\n")
    for limit in ("--max-output-length", "--skip-longer"):
        assert "1 of 1 corrections have more than 9 tokens (the first is of example 1" in refused(
            "--objective", "ce", "--data", place / "long.jsonl", limit, "9"
        )
    assert "there are 8: take fewer" in refused("--devices", "9")
    assert "model_parallel is 2 and there are 1 devices" in refused("--model-parallel", "2")
    (place / "tiny" / "spiece.model").write_bytes(train_sentencepiece(TEXTS, 30)[:-9])
    assert "spiece.model cannot be read" in refused()
    (place / "tiny" / "spiece.model").write_bytes(
        editing_samples.tokenizer()._processor.serialized_model_proto()
    )
    assert "the tokenizer has 330 ids and the model's embedding 64 rows" in refused()
    (place / "tiny" / "spiece.model").unlink()
    assert "holds neither spiece.model nor tokenizer.json" in refused()
    (place / "tiny" / "spiece.model").write_bytes(tokenizer)
    shutil.copytree(t5_folders.DATA / "t5_1_0", place / "t5_1_0")
    shutil.copytree(place / "tiny", place / "other")
    (place / "other" / "spiece.model").write_bytes(train_sentencepiece(["zebra quilt ox"] * 20, 24))
    assert "its tokenizer writes some token otherwise" in refused("--original", place / "other")
    message = refused("--original", place / "t5_1_0")
    assert "must be of the same sizes, and differ in " in message
    assert "Config(" not in message


def say(folder, **changes):
    """Changes what a folder's config says."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def lose_a_shard(folder):
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    names = [*tensors(folder)]
    where = {name: (first, second)[name == names[-1]] for name in names}
    (folder / "model.safetensors").rename(folder / first)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


SPOILT = {
    # What becomes of a decoder's folder, and what is said of that.
    "a missing shard": (lose_a_shard, r"lacks shards .*: model-00002-of-00002.safetensors\."),
    "tensors of another family": (
        lambda folder: shutil.copy(t5_folders.DATA / "t5_1_1" / "model.safetensors", folder),
        r"weights in .*tiny do not fit its config.json: .*model.embed_tokens.weight is missing",
    ),
    "the config of another family": (
        lambda folder: say(folder, model_type="qwen3"),
        r"do not fit its config.json: model.layers.0.self_attn.k_norm.weight is missing",
    ),
    "pickled weights alone": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        r"holds neither model.safetensors nor .*'pytorch_model.bin'.*call save_pretrained",
    ),
    "no end token": (
        lambda folder: say(folder, eos_token_id=None),
        r"eos_token_id is None; an id that ends an output is needed.*generation_config.json",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_folder_of_a_decoder_is_told_and_nothing_is_written(case, place, capsys):
    place, (spoil, said) = place(kind="decoder"), SPOILT[case]
    spoil(place / "tiny")
    there = sorted(place.rglob("*"))
    for more in ((), ("--lora", "2"), ("--plan",), ("--cache-teacher", place / "cache")):
        assert run(place, *more) == 2
        assert re.search(said, capsys.readouterr().err)
    assert sorted(place.rglob("*")) == there


@pytest.mark.parametrize("name", ["t5patches.json", "align.json"])
def test_what_an_adapter_links_to_is_not_read(name, place):
    place = place()
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").touch()
    (place / "elsewhere.json").write_text('{"rounds": []}')
    (place / "adapter" / name).symlink_to(place / "elsewhere.json")
    with pytest.raises(ValueError, match=f"{name} is a link to .*elsewhere.json, outside its"):
        check_chat(place / "adapter", "auto", place / "tiny")


@BOTH
def test_memory_is_planned_before_weights_are_read(kind, place, monkeypatch, capsys):
    place = place(kind=kind)
    monkeypatch.setattr(edit_module, "load_checkpoint", None)
    assert run(place, "--plan", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    parameters = sum(x.nbytes for x in jax.tree.leaves(load_checkpoint(place / "tiny")[1]))
    assert plan["parameters"] == plan["original"] == parameters
    assert plan["working"] > parameters  # gradients at least
    assert plan["optimizer"] > 0
    rows = TINY[kind][0].config.vocab_size
    assert plan["chunk_bytes"] == 4 * rows * plan["chunk_tokens"] > 0
    # Enough for a few examples, not for 64.
    room = 2 * sum(plan[name] for name in ("parameters", "optimizer", "original", "working"))
    monkeypatch.setattr("t5patches.editing.plan._host_memory", lambda: room)
    assert run(place, "--optimizer", "adam", "--batch-size", "64") == 2
    message = capsys.readouterr().err
    assert "that does not fit. a batch size of " in message
    for part in ("--optimizer adafactor", "--max-input-length"):
        assert part in message
    # On a CPU bfloat16 takes more.
    monkeypatch.setattr("t5patches.editing.plan._host_memory", lambda: 1000)
    for smaller in (False, True):
        assert run(place, "--lora", "2") == 2
        message = capsys.readouterr().err
        for part in ("(--dtype bfloat16)", "(--param-dtype bfloat16)"):
            assert (part in message) == smaller
        monkeypatch.setattr("t5patches.editing.plan.bfloat16_is_smaller", lambda: True)
    monkeypatch.setattr("t5patches.editing.plan._host_memory", lambda: None)
    assert run(place, "--plan") == 0


# A decoder is split between two processes in test_hosts.
@pytest.mark.parametrize("kind", [slow_unless(x == "T5", x) for x in TINY])
def test_a_model_that_devices_split_is_edited_the_same(kind, place):
    place = place(kind=kind)
    split = ("--devices", "4", "--model-parallel", "2")
    assert run(place) == run(place, *split, output="split") == 0
    (one,), (two,) = (read_rounds(place / name) for name in ("edited", "split"))
    assert two["devices"] == "4 x cpu"
    np.testing.assert_allclose(two["history"]["loss"], one["history"]["loss"], rtol=1e-5)
    for name, x in tensors(place / "edited").items():
        np.testing.assert_allclose(
            tensors(place / "split")[name], x, rtol=1e-3, atol=1e-5, err_msg=name
        )


def test_a_full_disk_is_told_and_costs_nothing_that_was_reached(place, monkeypatch, capsys):
    place = place()
    usage = shutil.disk_usage(place)
    with monkeypatch.context() as patched:
        patched.setattr(claims.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert run(place) == 1
        assert "MiB of disk space and 0.0 MiB are free" in capsys.readouterr().err

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(states_module.ocp.CheckpointManager, "save", full)
        assert run(place) == 1
        assert "the checkpoint of step 2 cannot be written" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr("t5patches.model.huggingface.save_file", full)
        assert run(place, "--resume") == 1
        assert "No space left on device" in capsys.readouterr().err
    assert not (place / "edited").exists()
    assert run(place, "--resume") == 0


def test_objectives_without_an_original_and_without_sets(place, capsys):
    place = place()
    lines = [{**line, "corrected_targets": "a cat"} for line in LINES]
    lines[1]["edits"] = [{"position": 0, "ids": [20, 21]}]  # where nothing is marked
    (place / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(place, "--objective", "ul", "--optimizer", "adam", output="ul") == 0
    (record,) = read_rounds(place / "ul")
    assert (record["counts"]["marked"], record["counts"]["only others"]) == (4, 1)
    assert "pushed down, and only others in the place of 1;" in (place / "ul/README.md").read_text()
    assert run(place, "--objective", "ce", "--dtype", "bfloat16", output="ce") == 0
    assert read_rounds(place / "ce")[0]["counts"]["marked"] == 0
    assert run(place, "--objective", "nl", "--negatives", "2", output="nl") == 2
    assert "nl pushes down one token a position" in capsys.readouterr().err


def test_the_original_is_held_in_bfloat16_and_all_parameters_are_trained_in_float32(
    place, monkeypatch
):
    place, update, held = place(kind="decoder"), train_module.Step.__call__, []

    def seen(step, state, frozen, *more):
        trees = (state.params, frozen.original)
        held.append([{x.dtype.name for x in jax.tree.leaves(tree)} for tree in trees])
        return update(step, state, frozen, *more)

    monkeypatch.setattr(train_module.Step, "__call__", seen)
    dtypes = ("float32", "bfloat16")
    for dtype in dtypes:
        assert run(place, "--param-dtype", dtype, "--steps", "2", output=dtype) == 0
    assert held == [[{"float32"}, {dtype}] for dtype in dtypes for _ in range(2)]
    plain, rounded = (read_rounds(place / name)[0]["history"]["loss"] for name in dtypes)
    np.testing.assert_allclose(rounded, plain, rtol=1e-3)
    assert rounded != plain
    before, one, two = (tensors(place / name) for name in ("tiny", *dtypes))
    assert {x.dtype for x in two.values()} == {np.dtype(np.float32)}
    changed, apart = (
        np.sqrt(sum(np.sum((x[name] - one[name]) ** 2) for name in one)) for x in (before, two)
    )
    assert 0 < apart < changed / 2


def test_sets_mixtures_and_templates_reach_the_arrays(place):
    place = place()
    more, templates = place / "more.jsonl", place / "templates.txt"
    tokenizer = load_model(place / "tiny").tokenizer
    dog = tokenizer.encode("a dog sat").ids
    tokens = [*dog, 1]
    line = LINES[0] | {"tokens": tokens, "edits": [{"position": 1, "ids": [5, 6, 7]}]}
    more.write_text(json.dumps(line) + "\n")
    templates.write_text("on a mat {inputs}\n")
    job = Job(
        place / "tiny",
        [place / "edits.jsonl", more],
        place / "out",
        TrainSettings(steps=5, batch_size=4),
        templates=templates,
        rates=[1, 3],
        devices=1,
    )
    checked = check(job)
    assert checked.settings.negatives == 4
    assert checked.arrays["edit_ids"].shape[0] == 5
    assert 0.5 < (checked.order == 4).mean() < 1
    assert tokenizer.decode(checked.arrays["inputs"][0]).text == "on a mat a cat sat"


KEPT = [
    {"inputs": "on a mat", "references": ["a dog"]},
    {"inputs": "a cat sat", "outputs": "on a mat a dog"},
    {"inputs": "a dog sat", "outputs": "a cat", "spans": [], "tokens": None},
    {"inputs": "sat on a dog"},
]


def keep_file(place, lines=KEPT):
    """What is kept, in a file beside the data."""
    tokens = list(load_model(place / "tiny").tokenizer.encode("a cat").ids)
    lines = [line | ({"tokens": tokens} if "tokens" in line else {}) for line in lines]
    (place / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place / "kept.jsonl"


def test_outputs_to_keep_are_the_originals_own(place, monkeypatch):
    """Killed after they are made, they are not made again."""
    place, seen = place(), []
    more = ("--keep", keep_file(place), "--keep-share", "0.75", "--seed", "3")
    real = edit_module.train

    def noted(model, params, arrays, settings, *arguments, **options):
        seen.append((arrays, options["order"]))
        if len(seen) == 1:
            raise KeyboardInterrupt
        return real(model, params, arrays, settings, *arguments, **options)

    monkeypatch.setattr(edit_module, "train", noted)
    assert run(place, *more) == 130
    with monkeypatch.context() as patched:
        patched.setattr("t5patches.editing.annotate.generate", None)
        assert run(place, *more, "--resume") == 0
    (arrays, order), again = seen
    for name, x in arrays.items():
        np.testing.assert_array_equal(x, again[0][name])
    np.testing.assert_array_equal(order, again[1])
    assert not (arrays["weights"][len(LINES) :] < 0).any()
    # What is made is what the original says, and what was given stands.
    network, params, tokenizer = load_model(place / "tiny")
    made = generate(
        network, params, arrays["inputs"][[4, 7]], max_length=checked_most(place), temperature=1.0,
        rng=jax.random.key(3), batch_size=2,
    )  # fmt: skip
    np.testing.assert_array_equal(arrays["outputs"][[4, 7], : made.shape[1]], made)
    counted = [(row != network.config.pad_id).sum() for row in made]
    assert list((arrays["weights"][[4, 7]] > 0).sum(-1)) == counted
    ids = (*tokenizer.encode("on a mat a dog").ids, tokenizer.eos_id)
    assert tuple(arrays["outputs"][5][: len(ids)]) == ids
    (record,) = read_rounds(place / "edited")
    assert record["job"]["keep"]["share"] == 0.75
    assert record["counts"]["examples"] == 8
    assert record["counts"]["tokens"] == int((arrays["weights"] != 0).sum())
    assert "75% of what was drawn" in (place / "edited" / "README.md").read_text()
    assert run(place, *more[:-1], "4", "--resume") == 2


def checked_most(place):
    tokenizer = load_model(place / "tiny").tokenizer
    return max(len(tokenizer.encode(line["outputs"]).ids) for line in LINES) + 1


def test_what_is_wrong_with_what_is_kept_is_told_by_line(place, monkeypatch, capsys):
    place = place()
    monkeypatch.setattr(edit_module, "load_checkpoint", None)
    bad = [
        {"inputs": "a cat", "outputs": "a dog", "spans": [[2, 5]]},
        {"inputs": "a cat"},
        {"inputs": "a cat", "outputs": "a dog", "tokens": [3]},
        {"input": "a cat"},
        {"inputs": "a cat", "outputs": "a dog", "edits": [{"position": 0, "ids": [9, 8]}]},
    ]
    (place / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
    (place / "edits.jsonl").write_text("{}\n")
    assert run(place, "--keep", place / "kept.jsonl") == 2
    said = capsys.readouterr().err
    assert "edits.jsonl: 1 bad line" in said
    assert "kept.jsonl: 4 bad lines" in said
    told = "'spans' and 'edits' are at 1 tokens, and this is a file of what is kept"
    assert f"line 1: {told}" in said
    assert f"line 5: {told}" in said
    assert "line 3: 'tokens' spell" in said
    assert "line 4: got the fields ['input']" in said
    assert not unfinished(place / "edited").exists()


def test_what_is_kept_goes_with_the_other_options_of_data(place, monkeypatch):
    """A text file of inputs, cut, under a template and beside two files."""
    place = place()
    for name in ("plan_memory", "require_memory", "require_room_to_speak"):
        monkeypatch.setattr(edit_module, name, lambda *_, **__: None)
    (place / "kept.txt").write_text("a cat sat on a mat on a mat\n\na dog\n")
    (place / "templates.txt").write_text("on {inputs}\n")
    (place / "more.jsonl").write_text((place / "edits.jsonl").read_text() + "\n")
    job = Job(
        place / "tiny",
        [place / "edits.jsonl", place / "more.jsonl"],
        place / "out",
        TrainSettings(steps=400, batch_size=4),
        keep=place / "kept.txt",
        keep_share=0.25,
        rates=[1, 2],
        truncate_inputs=5,
        templates=place / "templates.txt",
        devices=1,
    )
    checked = check(job)
    assert list(checked.unsaid) == [8, 9]
    assert checked.unsaid[9] == "on a dog"
    assert checked.most == checked.arrays["outputs"].shape[1] == checked_most(place)
    shares = [
        ((checked.order >= a) & (checked.order < b)).mean() for a, b in ((0, 4), (4, 8), (8, 10))
    ]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.05)
    assert "kept.txt: 1 inputs truncated to 5 tokens" in "".join(checked.notes)
    with pytest.raises(ValueError, match=r"keep_share is 1\.5"):
        check(dataclasses.replace(job, keep_share=1.5))
    settings = dataclasses.replace(job.settings, objective="ftpo")
    with pytest.raises(ValueError, match="ftpo learns nothing from outputs of which nothing"):
        check(dataclasses.replace(job, settings=settings))


@pytest.mark.slow
def test_an_edit_may_compare_with_corrections(place):
    place = place()
    assert run(place, "--objective", "dpo") == 2
    lines = [{**line, "corrected_targets": "a cat"} for line in LINES]
    (place / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(place, "--objective", "dpo", "--beta", "0.5") == 0
    (record,) = read_rounds(place / "edited")
    assert (record["settings"]["beta"], record["counts"]["marked"]) == (0.5, 4)
    assert "`dpo`, alpha 1, beta 0.5" in (place / "edited" / "README.md").read_text()


def test_an_input_is_held_out_whatever_template_is_around_it(place):
    place = place()
    lines = [line | {"inputs": f"{line['inputs']} {text}"} for line in LINES for text in TEXTS]
    data, templates, keep = (place / name for name in ("edits.jsonl", "templates.txt", "keep.txt"))
    data.write_text("".join(json.dumps(line) + "\n" for line in 4 * lines))
    templates.write_text("cat {inputs}\ndog {inputs}\nmat {inputs}\nsat {inputs}\n")
    settings = TrainSettings(steps=10, until=0.5, batch_size=2)
    job = Job(place / "tiny", [data], place / "out", settings, templates=templates, devices=1)
    checked = check(job)
    tokenizer = load_model(place / "tiny").tokenizer

    def sources(arrays):
        prompts = {
            tokenizer.decode([int(i) for i in row if i > 1]).text for row in arrays["inputs"]
        }
        assert len(prompts) > 1
        return {prompt.split(" ", 1)[1] for prompt in prompts}

    (held,), trained = sources(checked.held_out), sources(checked.arrays)
    assert held not in trained
    assert {line["inputs"] for line in lines} == {held, *trained}
    keep.write_text(f"{held}\n{trained.pop()}\n")
    checked = check(dataclasses.replace(job, keep=keep))
    assert "these are also 1 of the 2 inputs to keep" in " ".join(checked.notes)
    keep.write_text(f"{held}\n")
    with pytest.raises(ValueError, match="until holds out all 1 inputs that it has"):
        check(dataclasses.replace(job, keep=keep))


def test_an_input_is_held_out_whatever_prompts_it_has(tmp_path):
    """Where a chat template holds the date it has one a day; and two inputs may have the same."""
    first = [editing_samples.example(f"news {i}", "a fire", "fire") for i in range(20)]
    spaced = [dataclasses.replace(e, inputs=e.inputs.replace(" ", "  ")) for e in first]
    later = [
        dataclasses.replace(e, inputs=(Message("user", e.inputs),), input_ids=(9, *e.input_ids))
        for e in first
    ]
    kept = [Source(f"news {i}") for i in range(20)] + [Source(f"news   {i}") for i in range(20)]
    tokenizer = editing_samples.tokenizer()
    job = Job(tmp_path, ["a", "b", "c"], tmp_path, TrainSettings(steps=10, until=0.1), keep="d")
    left, others, held, note = edit_module._hold_out(job, [first, spaced, later], kept, tokenizer)
    prompts = {e.input_ids for e in held}
    texts = {input_text(e.inputs) for e in held}
    assert len(held) >= 4
    for part in left:
        assert not texts & {input_text(e.inputs) for e in part}
        assert not prompts & {e.input_ids for e in part}
    assert [item for item in kept if tokenizer.encode_prompt(item.inputs) not in prompts] == others
    assert not texts & {item.inputs for item in others}
    assert "outputs to 4 inputs, of 60 to 40" in note


def test_an_edit_stops_by_what_it_holds_out(place, capsys):
    place = place()
    lines = [line | {"inputs": f"{line['inputs']} {word}"} for line in LINES for word in TEXTS]
    lines[0]["edits"] = [{"position": 1, "ids": [5, 6]}]
    (place / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keep = keep_file(place, [KEPT[0], {"inputs": lines[0]["inputs"]}])
    more = ("--until", "0.001", "--steps", "10", "--keep", keep)
    assert run(place, *more, "--plan") == 0
    said = capsys.readouterr().out
    assert "held out to stop by: 1 outputs to 1 inputs, of 12 to 12" in said
    assert "copies" in said
    assert run(place, *more) == 0
    said = capsys.readouterr().out
    assert re.search(r"the state after \d+ updates is kept, with [\d.]+% left on inputs held", said)
    (record,) = read_rounds(place / "edited")
    found = record["held out"]
    assert (found["why"], found["step"]) == ("steps", [0, 10])
    assert found["updates"] == found["step"][int(np.argmin(found["left"]))]
    assert found["kl"][0] == pytest.approx(0, abs=1e-6)
    assert record["counts"]["examples"] == 11 + 2
    assert "Kept is the state after" in (place / "edited" / "README.md").read_text()
    assert run(place, "--until", "0.9", output="other") == 2
    assert "steps is 4, and until looks at every 10th update" in capsys.readouterr().err


def test_data_files_of_one_name_are_told_apart(tmp_path):
    files = [tmp_path / "a" / "edits.jsonl", tmp_path / "b" / "edits.jsonl", tmp_path / "c.jsonl"]
    for number, file in enumerate(files):
        file.parent.mkdir(exist_ok=True)
        file.write_text(str(number))
    assert list(edit_module._named(files)) == [str(files[0]), str(files[1]), "c.jsonl"]


def test_a_model_that_was_changed_meanwhile_is_told(place, capsys, monkeypatch):
    """An adapter goes with the weights that it was trained on, and with no others."""
    place, trained, network = place(), edit_module._trained, TINY["T5"][0]
    weights = place / "tiny" / "model.safetensors"
    before = weights.read_bytes()

    def and_changed(*given):
        out = trained(*given)
        changed = jax.tree.map(lambda x: x + 1, tiny_params("T5"))
        save_checkpoint(place / "other", network, changed)
        weights.write_bytes((place / "other" / "model.safetensors").read_bytes())
        return out

    with monkeypatch.context() as patch:
        patch.setattr(edit_module, "_trained", and_changed)
        assert run(place, "--lora", "2", "--quiet") == 2
    assert "were changed while this run trained" in capsys.readouterr().err
    assert not (place / "edited").exists()
    weights.write_bytes(before)
    assert run(place, "--lora", "2", "--quiet", "--resume") == 0


def test_what_another_process_makes_meanwhile_is_kept_and_not_made_again(tmp_path):
    job = {"of": "this"}
    record = outputs_module.record_in(outputs_module.RECORD)
    output = outputs_module.Output(tmp_path / "edited", record, "edit")
    assert output.finished(job, resume=True) is None
    (tmp_path / "edited").mkdir()
    (tmp_path / "edited" / outputs_module.RECORD).write_text(json.dumps({"job": job}))
    with pytest.raises(ValueError, match="edited exists: another process has made it meanwhile"):
        output.make(job, 0, lambda: pytest.fail("trained again"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edited"]


def test_links_are_no_place_for_an_output(tmp_path):
    job, nowhere = {"of": "this"}, tmp_path / "nowhere"
    output = outputs_module.Output(tmp_path / "edited", lambda folder: None, "edit")
    output.path.symlink_to(nowhere)
    with pytest.raises(ValueError, match="edited exists: nothing is overwritten"):
        output.finished(job, resume=False)
    output.path.unlink()
    nowhere.mkdir()
    output.work.symlink_to(nowhere)
    with pytest.raises(ValueError, match="unfinished is a link"):
        output.make(job, 0, lambda: pytest.fail("trained"))


def test_what_is_kept_is_named_where_an_edit_cannot_go_on(tmp_path):
    output = outputs_module.Output(tmp_path / "edited", lambda folder: None, "edit")

    def write():
        if keeps:
            (output.work / "kept").mkdir()
            (output.work / "kept" / "outputs-0").touch()
        raise ValueError("0.1 is left")

    for keeps in (False, True):
        with pytest.raises(ValueError, match=r"0\.1 is left") as raised:
            output.make({"of": "this"}, 0, write)
        assert ("keeps what was made so far" in str(raised.value)) == keeps
        assert output.work.exists() == keeps
