"""T5X checkpoints in and out, without T5X; `tests/with_t5x/test_checkpoints.py` has T5X do it."""

import json
import re
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import t5_folders
import tensorstore
from flax import serialization, traverse_util
from safetensors.numpy import load_file, save_file

from t5patches import cli
from t5patches.model.folder import load_model
from t5patches.model.huggingface import load_checkpoint, read_config
from t5patches.model.t5x_format import find_t5x, infer_model, load_t5x, save_t5x
from t5patches.model.tokenizer import train_sentencepiece


def run(*arguments):
    return cli.main(["convert", *(str(x) for x in arguments)])


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", t5_folders.NAMES)
def test_there_and_back_is_the_same_folder(name, tmp_path, capsys):
    folder = t5_folders.DATA / name
    assert run("--model", folder, "--output", tmp_path / "t5x", "--step", 7, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["output"] == str(tmp_path / "t5x" / "checkpoint_7")
    assert said["step"] == 7
    assert run("--model", tmp_path / "t5x", "--like", folder, "--output", tmp_path / "back") == 0
    assert {p.name for p in (tmp_path / "back").iterdir()} == {p.name for p in folder.iterdir()}
    for file in folder.glob("*.safetensors"):
        equal(load_file(tmp_path / "back" / file.name), load_file(file))


def test_sizes_are_read_off_the_parameters(tmp_path):
    model, params, _ = t5_folders.load("t5_1_0")
    assert infer_model(params) == model
    save_t5x(tmp_path / "t5x", params)
    (tmp_path / "some.model").write_bytes(train_sentencepiece(["a cat sat on a mat"] * 9, 20))
    checkpoint = tmp_path / "t5x" / "checkpoint_0"
    tokenizer = ("--tokenizer", tmp_path / "some.model")
    assert run("--model", checkpoint, "--output", tmp_path / "new", *tokenizer, "--quiet") == 0
    found = load_model(tmp_path / "new")
    assert found.model == model
    equal(found.params, params)


def with_gates(folder, gates):
    """A copy of a folder with a tokenizer, and other gates."""
    shutil.copytree(t5_folders.DATA / "t5_1_1", folder)
    path = folder / "config.json"
    said = json.loads(path.read_text()) | {"feed_forward_proj": gates, "dense_act_fn": None}
    path.write_text(json.dumps(said))
    (folder / "spiece.model").write_bytes(train_sentencepiece(["a cat sat on a mat"] * 9, 20))
    return folder


def test_gates_come_back_as_they_were_and_are_not_guessed(tmp_path, capsys):
    folder, t5x = with_gates(tmp_path / "there", "gated-silu"), tmp_path / "t5x"
    back = tmp_path / "back"
    assert run("--model", folder, "--output", t5x, "--quiet") == 0
    tokenizer = ("--tokenizer", folder / "spiece.model", "--quiet")
    for model in (t5x, t5x / "checkpoint_0"):
        assert run("--model", model, "--output", back, *tokenizer) == 0
        found, params = load_checkpoint(back)
        assert found == load_checkpoint(folder)[0]
        equal(params, load_checkpoint(folder)[1])
        shutil.rmtree(back)
    other = with_gates(tmp_path / "other", "gated-gelu")
    assert run("--model", other, "--output", t5x, "--step", 1) == 2
    assert "holds checkpoints of another model" in capsys.readouterr().err
    shutil.rmtree(t5x / "t5patches")  # as T5X's own have none
    assert run("--model", other, "--output", t5x, "--step", 1) == 2
    assert "holds checkpoints of which nothing says the model" in capsys.readouterr().err
    assert run("--model", t5x, "--output", back, *tokenizer) == 2
    assert "the model has gates, and its parameters do not show" in capsys.readouterr().err
    assert not back.exists()


def test_the_record_of_a_conversion_beside_this_one_stays(tmp_path, monkeypatch, capsys):
    """Of two to one place the second finds the first one's checkpoint."""
    folder, t5x = with_gates(tmp_path / "there", "gated-silu"), tmp_path / "t5x"

    def meanwhile(*_):
        (t5x / "checkpoint_0").mkdir()
        raise ValueError("checkpoint_0 exists")

    monkeypatch.setattr("t5patches.model.t5x_format.save_t5x", meanwhile)
    assert run("--model", folder, "--output", t5x, "--quiet") == 2
    assert "checkpoint_0 exists" in capsys.readouterr().err
    assert (t5x / "t5patches" / "config.json").exists()


def test_what_t5xs_config_cannot_say_comes_back(tmp_path):
    """As the library's version 5 writes a T5 1.1 from a config, with other settings."""
    folder, t5x = with_gates(tmp_path / "there", "gated-gelu"), tmp_path / "t5x"
    config = json.loads((folder / "config.json").read_text())
    config |= {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    config |= {"layer_norm_epsilon": 1e-5, "relative_attention_max_distance": 64}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    tied = {name: x for name, x in weights.items() if name != "lm_head.weight"}
    for step, tensors in enumerate((weights, tied)):
        save_file(tensors, folder / "model.safetensors")
        model, params = load_checkpoint(folder)
        assert model.config.logits_via_embedding is (tensors is tied)
        assert run("--model", folder, "--output", t5x / str(step), "--quiet") == 0
        back, tokenizer = tmp_path / f"back-{step}", ("--tokenizer", folder / "spiece.model")
        assert run("--model", t5x / str(step), "--output", back, *tokenizer, "--quiet") == 0
        assert load_checkpoint(back)[0] == model
        equal(load_checkpoint(back)[1], params)


@pytest.mark.parametrize(
    ("record", "heading"),
    [
        ("t5patches.json", "## Edited with targeted negative training"),
        ("align.json", "## Aligned with a score"),
        ("reward.json", "## A reward model"),
    ],
)
def test_what_runs_have_said_of_other_weights_is_not_copied(record, heading, tmp_path):
    like, t5x = with_gates(tmp_path / "like", "gated-gelu"), tmp_path / "t5x"
    (like / record).write_text("{}")
    own = "# A T5\n\nIn English.\n\n### Edited with care\n"
    (like / "README.md").write_text(f"{own}\n{heading}\n\nRemoved: names.\n")
    params = load_checkpoint(like)[1]
    save_t5x(t5x, params)
    save_t5x(t5x, jax.tree.map(lambda x: x + np.float32(1), params), 1)
    for step, edited in ((0, True), (1, False)):
        out = tmp_path / f"out-{step}"
        checkpoint = t5x / f"checkpoint_{step}"
        assert run("--model", checkpoint, "--like", like, "--output", out, "--quiet") == 0
        assert (out / record).exists() is edited
        said = (like / "README.md").read_text() if edited else own
        assert (out / "README.md").read_text() == said
        assert (out / "spiece.model").exists()


@pytest.mark.parametrize(
    ("rows", "pieces", "message"),
    [
        (16, 20, "the tokenizer has 20 ids and the model's embedding 16 rows"),
        (400, 20, "the tokenizer has 20 ids and the model's embedding 400 rows"),
        (128, 20, None),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(rows, pieces, message, tmp_path, capsys):
    params = t5_folders.load("t5_1_0")[1]
    params = params | {"token_embedder": {"embedding": np.zeros((rows, 16), np.float32)}}
    save_t5x(tmp_path / "t5x", params)
    (tmp_path / "x.model").write_bytes(train_sentencepiece(["a cat sat on a mat"] * 9, pieces))
    given = ("--model", tmp_path / "t5x", "--tokenizer", tmp_path / "x.model", "--quiet")
    assert run(*given, "--output", tmp_path / "out") == (2 if message else 0)
    if message:
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def write_first_format(directory, params, *, driver, version=3, names="kvstore"):
    """A checkpoint as T5X wrote it first: matrices beside the msgpack file, vectors in it."""
    directory.mkdir(parents=True)
    leaves = {}
    for path, x in traverse_util.flatten_dict(params).items():
        leaves[path] = x
        if x.ndim == 2:
            name = "target." + ".".join(path)
            stored = x.view(np.uint16) if version == 2 else x
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": str(directory / name)},
                "metadata": {
                    "compressor": {"id": "gzip", "level": 1},
                    "chunks": [5, x.shape[1]],
                    "shape": list(x.shape),
                    "dtype": stored.dtype.str if stored.dtype != ml_dtypes.bfloat16 else "bfloat16",
                },
            }
            tensorstore.open(spec, create=True).result().write(stored).result()
            described = {
                "driver": "zarr",
                "dtype": str(x.dtype),
                "metadata": {"shape": list(x.shape)},
            }
            store = {"driver": driver, "bucket": "t5x-dummy-bucket"}
            leaves[path] = (
                described | {"kvstore": store | {"path": name + "/"}}
                if names == "kvstore"
                else described | {"kvstore": store, "path": name}
            )
    tree = {"target": traverse_util.unflatten_dict(leaves), "state": {"step": np.int32(9)}}
    content = serialization.msgpack_serialize({"version": version, "optimizer": tree})
    (directory / "checkpoint").write_bytes(content)


@pytest.mark.parametrize(
    ("driver", "version", "names"),
    [("file", 3, "kvstore"), ("gcs", 3, "kvstore"), ("gfile", 3, "path"), ("file", 2, "path")],
)
def test_the_first_format_is_read(driver, version, names, tmp_path):
    params = t5_folders.load("t5_1_0")[1]
    if version == 2:  # bfloat16, spelled as integers
        params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    write_first_format(
        tmp_path / "checkpoint_9", params, driver=driver, version=version, names=names
    )
    got = load_t5x(tmp_path)
    assert got.step == 9
    equal(got.params, jax.tree.map(lambda x: x.astype(np.float32), params))


def name_array(checkpoint, **changes):
    """Says otherwise where the embedding of a checkpoint in the first format lies."""
    found = serialization.msgpack_restore((checkpoint / "checkpoint").read_bytes())
    found["optimizer"]["target"]["token_embedder"]["embedding"] |= changes
    (checkpoint / "checkpoint").write_bytes(serialization.msgpack_serialize(found))


EMBEDDING = "target.token_embedder.embedding"
OUTSIDE = {
    # What becomes of where an array lies, and what is said of it.
    "absolute": (
        lambda at: name_array(at, kvstore={"path": str(at.parent / "other" / EMBEDDING)}),
        "lies in '/.*/other/.*', outside the checkpoint",
    ),
    "above": (
        lambda at: name_array(at, kvstore={"path": f"x/../../other/{EMBEDDING}"}),
        "lies in 'x/../../other/.*', outside the checkpoint",
    ),
    "another store": (
        lambda at: name_array(at, driver="json", kvstore={"path": "../other/notes"}),
        "is stored by 'json', and only 'zarr' is known",
    ),
    "a link to an array": (
        lambda at: (
            shutil.rmtree(at / EMBEDDING),
            (at / EMBEDDING).symlink_to(at.parent / "other" / EMBEDDING),
        ),
        "embedding is a link to .*other.*, outside its folder",
    ),
    "a link to a part": (
        lambda at: (
            (at / EMBEDDING / "0.0").unlink(),
            (at / EMBEDDING / "0.0").symlink_to(at.parent / "other" / EMBEDDING / "0.0"),
        ),
        "0.0 is a link to .*other.*, outside its folder",
    ),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_arrays_that_are_not_the_checkpoints_own_are_not_read(case, tmp_path):
    params = t5_folders.load("t5_1_0")[1]
    for name in ("checkpoint_9", "other"):
        write_first_format(tmp_path / name, params, driver="file")
    spoil, message = OUTSIDE[case]
    spoil(tmp_path / "checkpoint_9")
    with pytest.raises(ValueError, match=message):
        load_t5x(tmp_path)


def test_the_latest_step_is_taken_and_none_is_overwritten(tmp_path):
    params = t5_folders.load("t5_1_0")[1]
    for step in (9, 10):
        save_t5x(tmp_path, params, step)
    assert find_t5x(tmp_path).name == "checkpoint_10"
    assert find_t5x(tmp_path / "checkpoint_9").name == "checkpoint_9"
    with pytest.raises(ValueError, match="checkpoint_9 exists: nothing is overwritten"):
        save_t5x(tmp_path, params, 9)


def test_a_checkpoint_too_large_for_the_memory_is_not_called_broken(tmp_path, monkeypatch):
    def full(_):
        raise MemoryError("Unable to allocate 9 TiB")

    save_t5x(tmp_path, t5_folders.load("t5_1_0")[1])
    monkeypatch.setattr("t5patches.model.t5x_format._read_orbax", full)
    with pytest.raises(MemoryError, match="9 TiB"):
        load_t5x(tmp_path)


def test_adafactor_starts_afresh():
    from t5patches.model.t5x_format import _fresh_adafactor

    found = _fresh_adafactor({"a": np.ones((200, 130)), "b": np.ones((200, 100)), "c": np.ones(9)})
    shapes = jax.tree.map(np.shape, found, is_leaf=lambda x: isinstance(x, np.ndarray))
    one = {"m": (1,), "v": (1,), "v_row": (1,), "v_col": (1,)}
    assert shapes["a"] == one | {"v_row": (130,), "v_col": (200,)}
    assert shapes["b"] == one | {"v": (200, 100)}
    assert shapes["c"] == one | {"v": (9,)}


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    from t5patches.model import t5x_format

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(t5x_format.ocp.CheckpointManager, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        save_t5x(tmp_path, t5_folders.load("t5_1_0")[1])
    assert not list(tmp_path.iterdir())


LIMITED = """
import resource, sys
from t5patches import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("size", [100, 2000, 10_000])  # no record, no arrays, not all of them
def test_a_disk_that_takes_no_more_is_told_in_a_line_and_leaves_nothing(size, tmp_path):
    given = ["convert", "--model", t5_folders.DATA / "t5_1_1", "--output", tmp_path / "a" / "t5x"]
    command = [sys.executable, "-c", LIMITED, str(size), *map(str, given)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert re.fullmatch(r"t5patches convert: .* cannot .*File too large.*\n", ended.stderr) or (
        re.fullmatch(r"t5patches convert: .*config.json: File too large\n", ended.stderr)
    )
    assert not list(tmp_path.iterdir())


def test_a_folder_that_finds_no_room_leaves_nothing(tmp_path, capsys, monkeypatch):
    checkpoint = save_t5x(tmp_path / "t5x", t5_folders.load("t5_1_1")[1])
    given = ("--model", checkpoint, "--like", t5_folders.DATA / "t5_1_1")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("t5patches.model.huggingface.save_file", full)
    assert run(*given, "--output", tmp_path / "a" / "back") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["t5x"]


def test_a_checkpoint_that_finds_no_room_is_not_begun(tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    assert run("--model", t5_folders.DATA / "t5_1_1", "--output", tmp_path / "t5x") == 1
    said = capsys.readouterr().err
    assert "the checkpoint needs 0.1 MiB of disk space and 0.0 MiB are free" in said
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_was_killed_before_there_was_a_checkpoint_belongs_to_nobody(tmp_path):
    for name in ("t5_1_0", "t5_1_1"):
        given = ("--model", t5_folders.DATA / name, "--output", tmp_path / "t5x")
        assert run(*given) == 0
        assert run("--model", tmp_path / "t5x", "--output", tmp_path / name) == 0
        shutil.rmtree(tmp_path / "t5x" / "checkpoint_0")
    of_first, of_second = (read_config(tmp_path / name) for name in ("t5_1_0", "t5_1_1"))
    assert of_first != of_second


def test_what_is_none_is_told(tmp_path, capsys):
    def refused(*arguments):
        assert run(*arguments, "--output", tmp_path / "out") == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "is no T5X checkpoint: a checkpoint_STEP directory has" in refused("--model", tmp_path)
    folder = t5_folders.DATA / "t5_1_1"
    assert "--like says nothing here" in refused("--model", folder, "--like", folder)
    params = t5_folders.load("t5_1_1")[1]
    checkpoint = save_t5x(tmp_path / "t5x", params)
    assert "--step says nothing here" in refused("--model", checkpoint, "--step", 3)
    like = ("--like", t5_folders.DATA / "t5_1_0")
    assert "params do not fit the config: " in refused("--model", checkpoint, *like)
    (tmp_path / "bad.model").write_bytes(b"no model")
    message = refused("--model", checkpoint, "--tokenizer", tmp_path / "bad.model")
    assert "bad.model is no sentencepiece model" in message
    for file in checkpoint.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    assert "cannot be read as a T5X checkpoint" in refused("--model", checkpoint)
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    (checkpoint / "checkpoint").write_bytes(serialization.msgpack_serialize({"version": 1}))
    assert "its version is 1, and 2 and 3 are known" in refused("--model", checkpoint)


def test_trees_of_other_models_are_refused():
    with pytest.raises(ValueError, match=r"has no 'layers_0' where a T5 has it; its trees are"):
        infer_model({"decoder": {}, "encoder": {"scan": {}}})
    with pytest.raises(ValueError, match=r"the model has gates.*\(--like\)"):
        infer_model(load_checkpoint(t5_folders.DATA / "mt5")[1])
