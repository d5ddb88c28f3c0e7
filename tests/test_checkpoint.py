"""Folders in the original library's format: what is read, what is written, what is refused."""

import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import t5_folders
from editing_samples import assert_same_folder
from safetensors.numpy import load_file, save_file

from t5patches.model import huggingface
from t5patches.model.huggingface import load_checkpoint, save_checkpoint
from t5patches.model.t5.model import T5
from t5patches.model.t5.network import T5Config

SIZES = {
    "vocab_size": 64,
    "emb_dim": 16,
    "num_heads": 3,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "head_dim": 6,
    "mlp_dim": 24,
}
GATED = T5Config(**SIZES, mlp_activations=("gelu", "linear"))
CONFIGS = {
    "t5_1_1": GATED,
    "t5_1_0": T5Config(**SIZES, mlp_activations=("relu",), logits_via_embedding=True),
    "mt5": GATED,
}
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@pytest.fixture
def folder(tmp_path):
    """A copy of a folder under `data/`, to spoil."""

    def copy(name):
        return shutil.copytree(t5_folders.DATA / name, tmp_path / name)

    return copy


def tensors(folder):
    return {
        k: x for file in sorted(folder.glob("*.safetensors")) for k, x in load_file(file).items()
    }


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, **changes):
    """Sets tensors of a one-file folder; None removes one."""
    path = folder / "model.safetensors"
    found = {k: x for k, x in (load_file(path) | changes).items() if x is not None}
    save_file(found, path, metadata={"format": "pt"})


def moved(params):
    return jax.tree.map(lambda x: x + np.float32(0.125), params)


@pytest.mark.parametrize("name", t5_folders.NAMES)
def test_the_config_says_the_same_in_t5xs_words(name):
    model, params, _ = t5_folders.load(name)
    assert model == T5(CONFIGS[name])
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", t5_folders.NAMES)
def test_an_unchanged_model_is_written_back_bit_for_bit(name, tmp_path):
    model, params, _ = t5_folders.load(name)
    original, out = t5_folders.DATA / name, tmp_path / "deep" / "out"
    save_checkpoint(out, model, params, like=original)
    assert_same_folder(out, original)


@pytest.mark.parametrize("name", t5_folders.NAMES)
def test_an_edited_model_comes_back_and_so_do_all_names_of_its_embedding(name, tmp_path):
    model, params, _ = t5_folders.load(name)
    params = moved(params)
    save_checkpoint(tmp_path / "out", model, params, like=t5_folders.DATA / name)
    got_model, got = load_checkpoint(tmp_path / "out")
    assert got_model == model
    # The folder of mT5 holds bfloat16: half of its spacing, 2**-9 relative.
    rounding = 2**-8 if name == "mt5" else 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rounding), got, params)


@pytest.mark.parametrize("name", ["t5_1_1", "t5_1_0"])
def test_a_model_from_nowhere_is_written_whole(name, tmp_path):
    model, params, _ = t5_folders.load(name)
    save_checkpoint(tmp_path / "out", model, params)
    got_model, got = load_checkpoint(tmp_path / "out")
    assert got_model == model
    jax.tree.map(np.testing.assert_array_equal, got, params)


def test_tokenizers_are_copied_and_stale_weights_are_not(folder, tmp_path):
    model, params, _ = t5_folders.load("t5_1_1")
    source = folder("t5_1_1")
    for name in ("spiece.model", "tokenizer.json", "README.md"):
        (source / name).write_text(name)
    stale = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5")
    for name in (*stale, "flax_model.msgpack", "other.safetensors"):
        (source / name).write_text(name)
    (source / "onnx").mkdir()
    save_checkpoint(tmp_path / "out", model, params, like=source)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("config.json", "generation_config.json", "expected.npz", "model.safetensors"),
        *("spiece.model", "tokenizer.json", "README.md"),
    }


def test_a_tensor_that_no_version_uses_is_carried_along(folder, tmp_path):
    model, params, _ = t5_folders.load("t5_1_0")
    source = folder("t5_1_0")
    unused = np.arange(96, dtype=np.float32).reshape(32, 3)
    edit_tensors(source, **{UNUSED: unused})
    load_checkpoint(source)
    save_checkpoint(tmp_path / "out", model, params, like=source)
    np.testing.assert_array_equal(tensors(tmp_path / "out")[UNUSED], unused)


def test_the_embedding_may_go_by_another_name(folder):
    source = folder("t5_1_0")
    edit_tensors(source, **{"shared.weight": None})
    _, params = load_checkpoint(source)
    jax.tree.map(np.testing.assert_array_equal, params, t5_folders.load("t5_1_0")[1])


@pytest.mark.parametrize(
    ("name", "changes", "tied"),
    [
        # As the library's version 5 writes T5 1.1 and mT5.
        ("t5_1_1", {"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ("mt5", {"tie_word_embeddings": False}, False),
        ("mt5", {"tie_word_embeddings": True}, False),
        ("t5_1_0", {"tie_word_embeddings": True, "scale_decoder_outputs": True}, True),
    ],
)
def test_both_generations_of_config_files_are_understood(folder, name, changes, tied):
    source = folder(name)
    edit_config(source, **changes)
    assert load_checkpoint(source)[0].config.logits_via_embedding is tied


# As the library's version 5 makes them from a config: both flags, and no matrix for the logits.
FROM_A_CONFIG = {
    "t5_1_1": {"tie_word_embeddings": True, "scale_decoder_outputs": False},
    "mt5": {"model_type": "mt5", "tie_word_embeddings": True},
}


def from_a_config(source, name, **changes):
    edit_config(source, **FROM_A_CONFIG[name], **changes)
    edit_tensors(source, **{"lm_head.weight": None})
    return source


@pytest.mark.parametrize("name", FROM_A_CONFIG)
def test_the_embedding_may_make_logits_without_a_scale(name, folder, tmp_path):
    source = from_a_config(folder("t5_1_1"), name)
    model, params = load_checkpoint(source)
    assert model == T5(CONFIGS["t5_1_1"]).replace(
        logits_via_embedding=True, scale_embedding_logits=False
    )
    assert model.head(params).logit_scale == 1
    save_checkpoint(tmp_path / "like", model, moved(params), like=source)
    save_checkpoint(tmp_path / "new", model, moved(params))
    said = (source / "config.json").read_bytes()
    assert (tmp_path / "like" / "config.json").read_bytes() == said
    for out in ("like", "new"):
        got, found = load_checkpoint(tmp_path / out)
        assert got == model
        jax.tree.map(np.testing.assert_array_equal, found, moved(params))
        assert "lm_head.weight" not in tensors(tmp_path / out)


def test_a_matrix_of_its_own_is_missed_where_the_config_says_there_is_one(folder):
    source = folder("t5_1_1")
    edit_tensors(source, **{"lm_head.weight": None})
    with pytest.raises(ValueError, match=r"lm_head.weight is missing"):
        load_checkpoint(source)


OTHER_SETTINGS = {
    # in config.json: in T5Config
    "an exact gelu": ({"feed_forward_proj": "gelu", "dense_act_fn": "gelu"}, ("gelu_exact",)),
    "T5X's gelu, no gate": ({"feed_forward_proj": "gelu_new", "dense_act_fn": None}, ("gelu",)),
    "an epsilon": ({"layer_norm_epsilon": 1e-5}, 1e-5),
    "a distance": ({"relative_attention_max_distance": 77}, 77),
    "buckets": ({"relative_attention_num_buckets": 8}, 8),
}


@pytest.mark.parametrize("case", OTHER_SETTINGS)
def test_settings_are_read_and_written_back(case, folder, tmp_path):
    said, value = OTHER_SETTINGS[case]
    source = folder("t5_1_0")
    edit_config(source, **said)
    name = "feed_forward_proj" if "feed_forward_proj" in said else next(iter(said))
    field = {"feed_forward_proj": "mlp_activations"}.get(name, name)
    if case == "buckets":
        for side in ("encoder", "decoder"):
            table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            edit_tensors(source, **{table: np.ones((8, 3), np.float32)})
    model, params = load_checkpoint(source)
    assert model == T5(CONFIGS["t5_1_0"]).replace(**{field: value})
    for out, like in (("like", source), ("new", None)):
        save_checkpoint(tmp_path / out, model, params, like=like)
        assert json.loads((tmp_path / out / "config.json").read_text())[name] == said[name]
        assert load_checkpoint(tmp_path / out)[0] == model


def test_config_values_are_all_judged_at_once(folder):
    source = folder("t5_1_1")
    edit_config(
        source,
        feed_forward_proj="gated-swish",
        dense_act_fn=None,
        d_ff=0,
        d_kv="6",
        relative_attention_num_buckets=3,
        relative_attention_max_distance="128",
        layer_norm_epsilon=0,
        pad_token_id=3,
        dropout_rate=1,
        quantization_config={"bits": 4},
    )
    with pytest.raises(ValueError, match="describes a model that cannot be read") as error:
        load_checkpoint(source)
    for part in (
        "d_ff is 0; a positive whole number is needed",
        "d_kv is '6'",
        "relative_attention_num_buckets is 3; a whole number of at least 4 is needed",
        "relative_attention_max_distance is '128'; a positive whole number",
        "layer_norm_epsilon is 0; a positive number is needed",
        "pad_token_id is 3; only 0",
        "quantization_config",
        "feed_forward_proj is 'gated-swish'; known are ['gated-gelu', 'gated-relu',",
        "dropout_rate is 1",
    ):
        assert part in str(error.value)
    edit_config(source, model_type="umt5")
    with pytest.raises(ValueError, match='model_type is \'umt5\'; known are "t5", "mt5", "llama"'):
        load_checkpoint(source)


def test_tensors_are_all_judged_at_once(folder):
    source = folder("t5_1_1")
    edit_tensors(
        source,
        **{"encoder.final_layer_norm.weight": None},
        **{"decoder.final_layer_norm.weight": np.ones(7, np.float32)},
        **{"classifier.weight": np.ones(7, np.float32)},
        **{"lm_head.weight": np.ones((64, 16), np.int8)},
    )
    with pytest.raises(ValueError, match=r"do not fit its config.json") as error:
        load_checkpoint(source)
    for part in (
        "encoder.final_layer_norm.weight is missing",
        "decoder.final_layer_norm.weight has shape (7,), the config says (16,)",
        "classifier.weight is not part of this model",
        "lm_head.weight holds I8; known are F32, F16, BF16",
    ):
        assert part in str(error.value)


def test_many_problems_are_counted(folder):
    source = folder("t5_1_0")
    edit_config(source, d_model=17)
    with pytest.raises(ValueError, match=r"; and \d+ more. The folder") as error:
        load_checkpoint(source)
    assert len(str(error.value)) < 3000


def test_a_matrix_of_its_own_under_a_tied_config_is_refused(folder):
    source = folder("t5_1_1")
    edit_config(source, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from shared.weight.*config.json"):
        load_checkpoint(source)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"config.json does not exist: give a Hugging Face"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read .JSONDecodeError"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"must hold an object, got '\[\]': copy the model's"):
        load_checkpoint(tmp_path)
    shutil.copy(t5_folders.DATA / "t5_1_1" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"it holds \['config.json', 'pytorch_model.bin'\].*save_"):
        load_checkpoint(tmp_path)


def test_spoilt_shards(folder):
    source = folder("mt5")
    shard = source / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"00002-of-00002.safetensors is not a whole safetensors"):
        load_checkpoint(source)
    shard.unlink()
    with pytest.raises(ValueError, match=r"lacks shards.*model-00002-of-00002.safetensors"):
        load_checkpoint(source)
    (source / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_checkpoint(source)


def test_params_that_do_not_fit_are_told_before_anything_is_written(tmp_path):
    model, params, _ = t5_folders.load("t5_1_0")
    norm = {"scale": np.ones(5, np.float32)}
    wrong = {**params, "encoder": {**params["encoder"], "encoder_norm": norm}, "extra": norm}
    del wrong["token_embedder"]
    with pytest.raises(ValueError, match="params do not fit the config") as error:
        save_checkpoint(tmp_path / "out", model, wrong)
    for part in (
        "token_embedder/embedding is missing",
        "encoder/encoder_norm/scale has shape (5,), the config says (16,)",
        "extra/scale is not in this model",
    ):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    model, params, _ = t5_folders.load("t5_1_0")
    with pytest.raises(ValueError, match="exists: nothing is overwritten"):
        save_checkpoint(tmp_path, model, params)


def test_a_folder_of_another_model_is_no_template(tmp_path):
    model, params, _ = t5_folders.load("t5_1_0")
    with pytest.raises(ValueError, match=r"not of the sizes of the folder .* differ in "):
        save_checkpoint(tmp_path / "out", model, params, like=t5_folders.DATA / "mt5")
    assert not list(tmp_path.iterdir())


def test_a_value_too_large_for_its_type_is_told(folder, tmp_path):
    source = folder("t5_1_0")
    edit_tensors(source, **{k: x.astype(np.float16) for k, x in tensors(source).items()})
    model, params = load_checkpoint(source)
    params["decoder"]["decoder_norm"]["scale"] = np.full(16, 1e6, np.float32)
    with pytest.raises(
        ValueError, match=r"decoder.final_layer_norm.weight holds 1e\+06, more than"
    ):
        save_checkpoint(tmp_path / "out", model, params, like=source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    model, params, _ = t5_folders.load("t5_1_0")
    monkeypatch.setattr(huggingface.os, "fsync", fail)
    with pytest.raises(type(error)):
        save_checkpoint(tmp_path / "out", model, params)
    assert not list(tmp_path.iterdir())


# What a folder may hold that is not the model's own.

SHARD = "model-00002-of-00002.safetensors"


def move(name):
    """Moves a shard to where the index then says it is, as it would be found."""

    def spoil(folder):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / SHARD).rename(target)
        return name

    return spoil


def link_out(folder):
    (folder / SHARD).rename(folder.parent / "elsewhere")
    (folder / SHARD).symlink_to(folder.parent / "elsewhere")
    return SHARD


def pipe(folder):
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    return SHARD


def make_folder(folder):
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()
    return SHARD


def twice(folder):
    """A tensor is in both shards."""
    extra = "model-00003-of-00003.safetensors"
    shutil.copy(folder / SHARD, folder / extra)
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["again"] = extra
    index.write_text(json.dumps(found))
    return SHARD


SHARDS = {
    # what the index says of the second shard (or makes it say), and what is said of that
    "a folder below": (move("shards/x.safetensors"), "names files that are not in its folder: 'sh"),
    "a folder beside": (move("../x.safetensors"), r"in its folder: '\.\./x.safetensors' \("),
    "absolute": (lambda folder: str(folder / SHARD), "names files that are not in its folder: '/"),
    "by way of itself": (lambda folder: f"./{SHARD}", r"not in its folder: '\./model"),
    "the folder": (lambda folder: ".", r"not in its folder: '\.' \("),
    "above": (lambda folder: "..", r"not in its folder: '\.\.' \("),
    "nothing": (lambda folder: "", "not in its folder: '' "),
    "null": (lambda folder: None, r"not in its folder: None \("),
    "a number": (lambda folder: 2, r"not in its folder: 2 \("),
    "a list": (lambda folder: [SHARD], r"not in its folder: \['model"),
    "zero bytes": (lambda folder: f"{SHARD}\0", "not in its folder: 'model"),
    "a link out": (link_out, "is a link to .*elsewhere, outside its folder"),
    "a pipe": (pipe, "is no file but a pipe"),
    "a directory": (make_folder, "is no file but a folder"),
    "a tensor twice": (twice, "is in model-00002-of-00002.safetensors and in model-00003"),
}


def name_second_shard(folder, name):
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    names = {k: name if v == SHARD else v for k, v in found["weight_map"].items()}
    index.write_text(json.dumps(found | {"weight_map": names}))


@pytest.mark.parametrize("case", SHARDS)
def test_weights_that_are_not_the_folders_own_are_refused(case, folder):
    source = folder("mt5")
    spoil, message = SHARDS[case]
    name_second_shard(source, spoil(source))
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(source)
    assert len(str(error.value)) < 1000 + 5 * len(str(source))


@pytest.mark.parametrize("name", ["f00", "f00/base"])
def test_links_within_a_folder_and_those_of_a_download_are_its_own(name, folder, tmp_path):
    source = folder("mt5")
    revision, blobs = tmp_path / "hub" / "snapshots" / name, tmp_path / "hub" / "blobs"
    revision.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(source.iterdir()):
        shutil.copy(file, blobs / str(i))
        (revision / file.name).symlink_to(blobs / str(i))
    model, params = load_checkpoint(revision)
    save_checkpoint(tmp_path / "out", model, params, like=revision)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(tmp_path / "out")[1], params)
    (source / SHARD).rename(source / "x")
    (source / SHARD).symlink_to("x")
    load_checkpoint(source)


def test_what_a_folder_links_to_is_not_copied_from_elsewhere(folder, tmp_path):
    model, params, _ = t5_folders.load("t5_1_0")
    source = folder("t5_1_0")
    (tmp_path / "secret").write_text("a key")
    (source / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"README.md is a link to .*secret, outside its folder"):
        save_checkpoint(tmp_path / "out", model, params, like=source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_refused(value, dtype, folder):
    source = folder("t5_1_0")
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    spoilt = tensors(source)[name].astype(dtype)
    spoilt[2, 3] = value
    edit_tensors(source, **{name: spoilt})
    message = rf"{name} in .*model.safetensors holds 1 of 384 numbers that are not finite"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(source)


@pytest.mark.parametrize("like", [None, "t5_1_0"])
def test_what_is_written_is_read_back_before_it_counts(like, tmp_path):
    model, params, _ = t5_folders.load("t5_1_0")
    params = moved(params)
    params["decoder"]["decoder_norm"]["scale"] = np.full(16, np.nan, np.float32)
    like = None if like is None else t5_folders.DATA / like
    with pytest.raises(ValueError, match=r"out is not written.*decoder.final_layer_norm.weight"):
        save_checkpoint(tmp_path / "out", model, params, like=like)
    assert not list(tmp_path.iterdir())


CONFIGS_SPOILT = {
    "an activation in a list": (
        {"feed_forward_proj": ["relu"]},
        r"feed_forward_proj is \['relu'\]",
    ),
    "an activation in an object": ({"feed_forward_proj": {}}, "feed_forward_proj is {}"),
    "two activations": ({"dense_act_fn": "silu"}, "is 'relu with dense_act_fn silu'; known"),
    "buckets beyond the furthest": (
        {"relative_attention_max_distance": 16},
        "config.json describes .* relative_attention_max_distance is 16, and 32 buckets need",
    ),
    "a distance beyond all": (
        {"relative_attention_max_distance": 10**400},
        "relative_attention_max_distance is 1000",
    ),
    "an epsilon beyond all": ({"layer_norm_epsilon": 10**400}, "layer_norm_epsilon is 1000"),
    "an epsilon that is none": ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
    "no activation": ({"feed_forward_proj": None}, "feed_forward_proj is None"),
    "layers without end": ({"num_layers": 10**7}, "speaks of 10000003 layers, and the weights"),
    "a kind in a list": ({"model_type": ["t5"]}, r"model_type is \['t5'\]"),
    "a dropout that is none": ({"dropout_rate": float("nan")}, "dropout_rate is nan"),
}


@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id", "decoder_start_token_id"])
def test_tokens_that_no_t5_here_has_are_refused_in_either_file(name, folder):
    source = folder("t5_1_0")
    known = int(name == "eos_token_id")
    for file in ("config.json", "generation_config.json"):
        path = source / file
        said = json.loads(path.read_text())
        path.write_text(json.dumps(said | {name: [known]}))
        assert load_checkpoint(source)[0].config.end_ids == (1,)
        path.write_text(json.dumps(said | {name: 5}))
        with pytest.raises(ValueError, match=f"{name} is 5; only {known} is known, here"):
            load_checkpoint(source)
        path.write_text(json.dumps(said))


@pytest.mark.parametrize("case", CONFIGS_SPOILT)
def test_spoilt_settings_are_told_in_a_line(case, folder):
    source = folder("t5_1_0")
    changes, message = CONFIGS_SPOILT[case]
    edit_config(source, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[" * 99_999, "\ud83d", '{"a": ' + "9" * 5000 + "}", None])
def test_config_files_that_are_none_are_told(content, tmp_path):
    path = tmp_path / "config.json"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=r"config.json cannot be read \(.*\): copy the model's"):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="nowhere is no folder"):
        load_checkpoint(tmp_path / "nowhere")
