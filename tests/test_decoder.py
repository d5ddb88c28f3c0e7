"""Decoder-only networks: numbers of the original library, folders, generation, programs."""

import functools
import json
import re
import shutil

import decoder_folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from editing_samples import assert_same_folder
from harness import slow_unless
from safetensors.numpy import load_file, save_file

from t5patches.editing.train import TrainSettings, cache_teacher, token_loss, train
from t5patches.model.decoder.model import small_decoder
from t5patches.model.decoder.network import FULL, SLIDING, Rotary
from t5patches.model.generate import generate
from t5patches.model.huggingface import (
    config_file,
    load_checkpoint,
    read_config,
    save_checkpoint,
    understand,
)
from t5patches.model.placement import make_mesh, param_shardings

pytestmark = pytest.mark.usefixtures("shared_programs")

# Everything that a step of decoding does in a way of its own.
MANY = {
    "layer_types": (SLIDING, FULL),
    "sliding_window": 3,
    "norms": "both",
    "norm": "layer",
    "qk_norm": "heads",
    "attention_softcap": 2.0,
    "logit_softcap": 4.0,
    "rotaries": (Rotary(scaling="linear", factor=2.0, share=0.5), Rotary(base=50.0)),
    "end_ids": (1, 7),
}
MODEL = small_decoder(vocab_size=24, width=16, layers=2, num_heads=4, num_kv_heads=2, **MANY)
PARAMS = jax.tree.map(lambda x: 2 * x, MODEL.init(jax.random.key(0)))
PROMPTS = np.array([[5, 6, -1, -1, -1], [8, 9, 3, 4, 10], [4, -1, -1, -1, -1], [-1] * 5])
# Of each prompt, two beginnings: none, one, all and some of whose tokens are shared.
PREFIXES = np.array(
    [
        [[3, 4, -1], [3, 5, 6]],
        [[-1, -1, -1], [3, 4, -1]],
        [[8, 9, 10], [8, 9, 10]],
        [[11, 2, -1], [11, -1, -1]],
    ]
)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch):
    return model.head(params).logits(model.hidden(params, batch))


@pytest.mark.parametrize("name", decoder_folders.NAMES)
def test_logits_are_those_of_the_original_library(name):
    model, params, expected = decoder_folders.load(name)
    got = logits(model, params, expected)
    real = expected["outputs"] >= 0
    np.testing.assert_allclose(got[real], expected["logits"][real], rtol=0, atol=1e-4)
    assert np.std(expected["logits"][real]) > 0.5


@pytest.mark.parametrize(
    "name", [slow_unless(i % 3 == 2, name) for i, name in enumerate(decoder_folders.NAMES)]
)
def test_greedy_outputs_are_those_of_the_original_library(name):
    model, params, expected = decoder_folders.load(name)
    length = expected["greedy"].shape[1]
    got = generate(model, params, expected["inputs"], max_length=length, batch_size=4)
    np.testing.assert_array_equal(got, expected["greedy"])


@pytest.mark.parametrize("name", decoder_folders.NAMES)
def test_an_unchanged_model_is_written_back_bit_for_bit(name, tmp_path):
    model, params, _ = decoder_folders.load(name)
    original, out = decoder_folders.DATA / name, tmp_path / "out"
    save_checkpoint(out, model, params, like=original)
    assert_same_folder(out, original)


def test_what_the_network_does_not_have_may_be_infinite(tmp_path):
    """An older library's mask, -1e9, in float16."""
    folder = shutil.copytree(decoder_folders.DATA / "gpt2_base", tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    tensors["h.0.attn.masked_bias"] = np.array(-np.inf, np.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, params = load_checkpoint(folder)
    save_checkpoint(tmp_path / "out", model, params, like=folder)
    assert_same_folder(tmp_path / "out", folder)


def test_named_templates_stay_with_their_folder(tmp_path):
    folder = shutil.copytree(decoder_folders.DATA / "gpt2", tmp_path / "gpt2")
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("x")
    model, params = load_checkpoint(folder)
    save_checkpoint(tmp_path / "out", model, params, like=folder)
    assert (tmp_path / "out" / templates.name / "tool_use.jinja").read_text() == "x"
    templates.rename(tmp_path / "elsewhere")
    templates.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="additional_chat_templates is a link"):
        load_checkpoint(folder)


@pytest.mark.parametrize("kinds", [(FULL, SLIDING), (FULL, FULL), (SLIDING, SLIDING)])
@pytest.mark.parametrize("window", [0, 3])
def test_a_mistral_may_mix_windows_and_none(kinds, window):
    """As Ministral does, which goes by the same name."""
    if window or SLIDING not in kinds:
        model = load_checkpoint(decoder_folders.DATA / "mistral")[0]
        mixed = model.replace(layer_types=kinds, sliding_window=window)
        assert understand(json.loads(config_file(mixed)), {}, "config.json") == mixed


@pytest.mark.parametrize("name", decoder_folders.NAMES)
def test_a_model_from_nowhere_is_written_whole(name, tmp_path):
    model, params, _ = decoder_folders.load(name)
    save_checkpoint(tmp_path / "out", model, params)
    got_model, got = load_checkpoint(tmp_path / "out")
    assert got_model == model
    jax.tree.map(np.testing.assert_array_equal, got, params)


@pytest.mark.parametrize("name", decoder_folders.NAMES)
def test_shapes_axes_and_names_are_of_the_same_parameters(name):
    model, params, _ = decoder_folders.load(name)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, model.param_shapes())
    assert jax.tree.map(np.shape, params) == jax.tree.map(
        np.shape, jax.eval_shape(model.init, jax.random.key(0))
    )
    for path, x in jax.tree.leaves_with_path(params):
        assert len(model.param_axes()[tuple(key.key for key in path)]) == x.ndim


def test_each_step_computes_what_the_whole_sequence_does():
    """From every place at which an output may have begun, in streams side by side."""
    outputs = np.random.default_rng(0).integers(2, 24, (4, 2, 6))
    outputs[:, 1, :3] = outputs[:, 0, :3]

    @jax.jit
    def by_steps(start):
        cache = MODEL.prefill(
            PARAMS, PROMPTS, outputs[:, 0, :4], start, streams=2, max_length=outputs.shape[-1]
        )
        first = jnp.broadcast_to(MODEL.first_inputs(PROMPTS)[:, None, None], (4, 2, 1))
        given = jnp.concatenate([first, outputs[..., :-1]], axis=-1)
        rows = jnp.zeros((6, 4, 2, 24))

        def step(t, state):
            found, cache = MODEL.decode(PARAMS, state[1], given[..., t])
            return state[0].at[t].set(found), cache

        return jax.lax.fori_loop(start, 6, step, (rows, cache))[0]

    want = np.stack(
        [logits(MODEL, PARAMS, {"inputs": PROMPTS, "outputs": outputs[:, i]}) for i in (0, 1)], 1
    )
    for start in (0, 1, 3):
        got = np.moveaxis(by_steps(start), 0, 2)
        np.testing.assert_allclose(got[:, :, start:], want[:, :, start:], rtol=0, atol=2e-5)


def test_prefixes_and_streams_are_generated_as_the_network_predicts():
    outputs = generate(MODEL, PARAMS, PROMPTS, max_length=7, prefixes=PREFIXES, batch_size=4)
    forced = np.pad(PREFIXES, ((0, 0), (0, 0), (0, 4)), constant_values=-1) >= 0
    ended = np.isin(outputs, (1, 7))
    for stream in (0, 1):
        batch = {"inputs": PROMPTS, "outputs": outputs[:, stream]}
        likeliest = np.argmax(logits(MODEL, PARAMS, batch), -1)
        free = ~forced[:, stream] & (batch["outputs"] >= 0)
        np.testing.assert_array_equal(batch["outputs"][free], likeliest[free])
        np.testing.assert_array_equal(
            PREFIXES[:, stream][forced[:, stream, :3]], (batch["outputs"][forced[:, stream]])
        )
    # Any end token ends an output, and nothing but padding follows.
    after = np.cumsum(ended, axis=-1) - ended > 0
    assert (outputs[after] == -1).all()
    assert (outputs[~after] >= 0).all()


def test_a_prompt_stands_for_itself_whatever_the_batch():
    """Its length, its neighbours and its padding change nothing."""
    alone = [
        generate(MODEL, PARAMS, PROMPTS[i : i + 1, :length], max_length=5)[0]
        for i, length in enumerate((2, 5, 2, 2))
    ]
    np.testing.assert_array_equal(generate(MODEL, PARAMS, PROMPTS, max_length=5), alone)


def test_bfloat16_activations_and_cache():
    model, params, expected = decoder_folders.load("llama")
    model = model.replace(dtype=jnp.bfloat16)
    got = logits(model, params, expected)
    real = expected["outputs"] >= 0
    assert jax.eval_shape(model.hidden, params, expected).dtype == jnp.bfloat16
    assert got.dtype == jnp.float32
    assert np.abs(got[real] - expected["logits"][real]).mean() < 0.1
    said = generate(model, params, expected["inputs"], max_length=3, batch_size=4)
    assert (said == expected["greedy"][:, :3]).mean() > 0.7
    cache = jax.eval_shape(
        functools.partial(model.prefill, streams=2, max_length=3),
        *(params, expected["inputs"], expected["outputs"][:, :0], 0),
    )
    assert {x.dtype for x in jax.tree.leaves(cache.layers)} == {jnp.dtype(jnp.bfloat16)}


def test_dropout_drops_and_keeps_the_mean():
    model = MODEL.replace(dropout_rate=0.1)
    batch = {"inputs": PROMPTS, "outputs": np.full((4, 3), 5)}
    hidden = jax.jit(model.hidden)
    plain = hidden(PARAMS, batch)
    np.testing.assert_array_equal(jax.jit(MODEL.hidden)(PARAMS, batch), plain)
    one, other = (hidden(PARAMS, batch, dropout_key=jax.random.key(i)) for i in (0, 1))
    assert not np.allclose(one, other)
    assert np.corrcoef(np.ravel(one), np.ravel(plain))[0, 1] > 0.5


def arrays(vocabulary, rows=4, length=9, output_length=3):
    random = np.random.default_rng(0)
    outputs = random.integers(2, vocabulary, (rows, output_length))
    weights = np.where(outputs % 3 == 0, -1.0, 1.0).astype(np.float32)
    return {
        "inputs": random.integers(2, vocabulary, (rows, length)),
        "outputs": outputs,
        "weights": weights,
    }


def most_with_the_vocabulary(loss, model, params, batch):
    """The largest number of rows of an array [rows, vocabulary] in a compiled gradient."""
    program = jax.jit(jax.grad(loss)).lower(params, batch).compile().as_text()
    v = model.config.vocab_size
    shapes = (tuple(map(int, s.split(","))) for s in re.findall(r"[a-z]\d+\[([\d,]+)\]", program))
    return max(int(np.prod(s)) // v for s in shapes if v in s)


def test_no_array_holds_logits_of_prompts():
    vocabulary, batch = 509, arrays(509)
    model = small_decoder(vocab_size=vocabulary, width=8, layers=1)
    params = model.init(jax.random.key(0))
    settings = TrainSettings(objective="tnff")

    def fused(params, batch):
        return token_loss(model, params, params, batch, settings).loss.sum()

    def of_prompts_too(params, batch):
        everything = jnp.concatenate([batch["inputs"], batch["outputs"]], axis=1)
        return logits(
            model, params, {"inputs": batch["inputs"][:, :1], "outputs": everything}
        ).sum()

    assert most_with_the_vocabulary(fused, model, params, batch) <= 4 * 3
    assert most_with_the_vocabulary(of_prompts_too, model, params, batch) == 4 * 12  # the control


def test_sines_are_made_once_and_products_transpose_no_activations():
    rotary, sizes = Rotary(base=50.0), {"width": 24, "head_dim": 8, "num_heads": 4}
    model = small_decoder(vocab_size=32, **sizes, layers=2, rotaries=(rotary, rotary))
    batch = arrays(32)

    def total(params):
        return model.hidden(params, batch).sum()

    program = jax.jit(jax.grad(total)).lower(model.init(jax.random.key(0))).compile().as_text()
    made = re.findall(r"= f32\[([\d,]+)\]\S* sine\(", program)
    assert made == ["12,4"]  # of 12 positions, for both layers, forwards and backwards
    turned = re.findall(r"= f32\[(\d+),4,12\]\S* (?:copy|transpose)\(", program)
    assert not turned  # [width, batch, tokens]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "devices", "split"), [(4, 2, 2, "model"), (8, 2, 4, None)]
)
def test_devices_split_between_heads_of_keys(heads, kv_heads, devices, split):
    mesh = make_mesh(devices, jax.devices()[:devices])
    sizes = {"vocab_size": 8, "width": 16, "layers": 1}
    for qkv, place in (("split", "query"), ("groups", "qkv"), ("blocks", "qkv")):
        model = small_decoder(**sizes, num_heads=heads, num_kv_heads=kv_heads, head_dim=4, qkv=qkv)
        placed = param_shardings(mesh, model)["layers_0"]
        of_queries = None if qkv == "blocks" else split
        assert tuple(placed["attention"][place]["kernel"].spec) == (None, of_queries)
        assert tuple(placed["attention"]["out"]["kernel"].spec) == (split, None)
        assert tuple(placed["mlp"]["down"]["kernel"].spec) == ("model", None)
    # Half of the columns of two matrices in one is one of them.
    in_one = model.replace(gate_up="blocks", qk_norm="whole")
    placed = param_shardings(mesh, in_one)["layers_0"]
    assert tuple(placed["mlp"]["gate_up"]["kernel"].spec) == (None, None)
    assert tuple(placed["attention"]["query_norm"]["scale"].spec) == (split,)


@pytest.mark.parametrize(
    "name", ["falcon_new", slow_unless(False, "olmo2"), slow_unless(False, "phi3")]
)
def test_training_over_devices_is_the_same(name, tmp_path):
    """Vocabulary, heads and examples divided, the original live and cached."""
    model, params, _ = decoder_folders.load(name)
    data = arrays(64)
    data["inputs"][0, 5:], data["outputs"][1, 2:], data["weights"][1, 2:] = -1, -1, 0
    settings = TrainSettings(steps=2, batch_size=4, learning_rate=1e-2)
    want = train(model, params, data, settings, tmp_path / "one")
    mesh = make_mesh(2, jax.devices()[:4])
    got = train(model, params, data, settings, tmp_path / "four", mesh=mesh)
    np.testing.assert_allclose(got.history["loss"], want.history["loss"], rtol=1e-4)
    cache = cache_teacher(tmp_path / "cache", model, params, data, dtype="float32")
    cached = train(model, params, data, settings, tmp_path / "cached", teacher=cache)
    np.testing.assert_allclose(cached.history["loss"], want.history["loss"], rtol=1e-4)


@pytest.fixture
def folder(tmp_path):
    """A copy of a folder, to spoil; its config with other values, None for none."""

    def copy(name, **changes):
        path = shutil.copytree(decoder_folders.DATA / name, tmp_path / name)
        config = json.loads((path / "config.json").read_text()) | changes
        kept = {key: x for key, x in config.items() if x != "absent"}
        (path / "config.json").write_text(json.dumps(kept))
        return path

    return copy


YARN = {"rope_type": "yarn", "factor": 4.0}
REFUSED = {
    # folder, changes of its config.json, what is said
    "yarn": (
        "llama",
        {"rope_parameters": YARN},
        r"rope_parameters is .*'yarn'.*'linear'.*'llama3'",
    ),
    "yarn as before": (
        "llama",
        {"rope_parameters": "absent", "rope_scaling": {"type": "yarn", "factor": 4.0}},
        "rope_parameters is .*'yarn'",
    ),
    "linear without a factor": (
        "mistral",
        {"rope_parameters": {"rope_type": "linear"}},
        r"\(with a positive factor\)",
    ),
    "llama3 upside down": (
        "llama",
        {
            "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0}
            | {"high_freq_factor": 1.0, "original_max_position_embeddings": 16}
        },
        "low_freq_factor",
    ),
    "part of a head": ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "'linear'"),
    "no dict": ("qwen2", {"rope_parameters": 7}, "rope_parameters is .*7"),
    "activation": ("llama", {"hidden_act": "xielu"}, "hidden_act is 'xielu'; known are"),
    "experts": ("llama", {"num_local_experts": 8}, "num_local_experts is set; only models without"),
    "vision": ("gemma3_text", {"vision_config": {"a": 1}}, "vision_config is set; only models of"),
    "quantized": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is set"),
    "alibi": ("falcon", {"alibi": True}, "alibi is True; only False is known"),
    "inverse layers": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx is True; only False",
    ),
    "cross attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    "both directions": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention is True; only False",
    ),
    **{
        f"both directions, {name}": (name, {"is_causal": False}, "is_causal is False; only True")
        for name in ("llama", "gpt2", "falcon", "gemma2")
    },
    "norms": (
        "falcon_new",
        {"num_ln_in_parallel_attn": 3},
        "num_ln_in_parallel_attn is 3; 1 or 2 is needed",
    ),
    "chunks": ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "layer_types is .*chunked"),
    "too few layer types": ("gemma2", {"layer_types": [FULL]}, "layer_types has 1 entries.*2 lay"),
    "no window": ("qwen3", {"layer_types": [FULL, SLIDING]}, "no sliding_window says how wide"),
    "half a window": ("mistral", {"sliding_window": 4.5}, "sliding_window is 4.5; a whole number"),
    "heads": ("llama", {"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
    "head size": ("qwen2", {"head_dim": None, "hidden_size": 17}, "head_dim is None; a positive"),
    "two scalings": (
        "qwen2",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "and rope_scaling is .*'factor': 2.0.*: one of the two is needed",
    ),
    "odd": ("llama", {"head_dim": 7}, "7 entries of a head of 7 turn"),
    "end beyond": ("llama", {"eos_token_id": 64}, r"eos_token_id and bos_token_id are \(64, 1, 7"),
    "end of words": ("llama", {"eos_token_id": "</s>"}, r"eos_token_id is \['</s>'"),
    "softcap": ("gemma2", {"final_logit_softcapping": -1}, "final_logit_softcapping is -1; a pos"),
    "too many layers": ("llama", {"num_hidden_layers": 2**30}, "layer_types has 0 entries"),
    "factors of a long context": (
        "phi3",
        {"rope_parameters": "absent", "rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
        "rope_parameters is .*'longrope'",
    ),
    "who turns": (
        "smollm3",
        {"no_rope_layers": [1, 0, 2]},
        r"no_rope_layers is \[1, 0, 2\]; a list is needed, of each layer 1",
    ),
    "too few turn": ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 ent.*3 layers"),
    "no layer turns by itself": (
        "smollm3",
        {"no_rope_layers": "absent", "no_rope_layer_interval": 0},
        "no_rope_layers is None",
    ),
    "no attention": (
        "granite",
        {"attention_multiplier": 0},
        "attention_multiplier is 0; a positive number is needed",
    ),
    "another family": ("llama", {"model_type": "mixtral"}, "model_type is 'mixtral'; known are"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_network_cannot_express_is_refused(case, folder):
    name, changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        read_config(folder(name, **changes))


def test_no_end_token_is_told(folder):
    path = folder("llama", eos_token_id=None)
    (path / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="eos_token_id is None; an id that ends an output"):
        read_config(path)


UNDERSTOOD = {
    # folder, changes of its config.json, fields of the config
    "ids of both files": ("llama", {"eos_token_id": [3, 7]}, {"end_ids": (3, 7, 1)}),
    "no begin": ("llama", {"bos_token_id": None}, {"begin_id": 1}),
    "heads and their size": (
        "llama_tied",
        {"num_key_value_heads": None, "head_dim": "absent"},
        {"num_kv_heads": 4, "head_dim": 4},
    ),
    "version 4": (
        "llama",
        {"rope_parameters": "absent", "rope_theta": 77.0}
        | {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rotaries": (Rotary(77.0, scaling="linear", factor=2.0),) * 2},
    ),
    "version 4, unscaled": (
        "qwen2",
        {"rope_parameters": "absent", "rope_theta": 5, "rope_scaling": None},
        {"rotaries": (Rotary(5.0),) * 2},
    ),
    "version 4 of gemma 3": (
        "gemma3_text",
        {"rope_parameters": "absent", "rope_theta": 1e6, "rope_local_base_freq": 1e4}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "layer_types": "absent"}
        | {"sliding_window_pattern": 2},
        {
            "rotaries": (Rotary(1e6, scaling="linear", factor=8.0), Rotary(1e4)),
            "layer_types": (SLIDING, FULL, SLIDING),
        },
    ),
    "version 4 of gemma 2": ("gemma2", {"layer_types": "absent"}, {"layer_types": (SLIDING, FULL)}),
    "no softcaps": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        {"attention_softcap": 0.0, "logit_softcap": 0.0},
    ),
    "gemma 3, whose layers have none": (
        "gemma3_text",
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {"attention_softcap": 0.0, "logit_softcap": 30.0},
    ),
    "version 4 of neox": (
        "gpt_neox",
        {"rope_parameters": "absent", "rotary_emb_base": 33, "rotary_pct": 0.5},
        {"rotaries": (Rotary(33.0, 0.5),) * 2},
    ),
    "mistral without windows": (
        "mistral",
        {"sliding_window": None},
        {"layer_types": (FULL, FULL), "sliding_window": 0},
    ),
    "ministral": ("mistral", {"layer_types": [FULL, SLIDING]}, {"layer_types": (FULL, SLIDING)}),
    "a scaling said twice": (
        "llama_tied",
        {"rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rotaries": (Rotary(scaling="linear", factor=3.0),) * 2},
    ),
    "a scaling of gemma 3's full layers": (
        "gemma3_text",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rotaries": (Rotary(1e6, scaling="linear", factor=2.0), Rotary(100.0))},
    ),
    "mistral's own": ("mistral", {"sliding_window": "absent"}, {"sliding_window": 4096}),
    "qwen without windows": (
        "qwen2",
        {"use_sliding_window": False, "layer_types": "absent"},
        {"layer_types": (FULL, FULL)},
    ),
    "qwen of version 4": ("qwen2", {"layer_types": "absent"}, {"layer_types": (FULL, SLIDING)}),
    "gemma's first files": (
        "gemma",
        {"hidden_act": "gelu", "hidden_activation": None},
        {"activation": "gelu"},
    ),
    "every third layer does not turn": (
        "smollm3",
        {"no_rope_layers": "absent", "layer_types": "absent"},
        {"turning": (True, True, False), "layer_types": (FULL, FULL, SLIDING)},
    ),
    "a longer list of who turns": (
        "smollm3",
        {"no_rope_layers": [0, 1, 1, 0]},
        {"turning": (False, True, True)},
    ),
    "windows that are off": (
        "smollm3_untied",
        {"layer_types": "absent"},
        {"layer_types": (FULL, FULL), "sliding_window": 0},
    ),
    "smollm3's own": (
        "smollm3",
        {"num_key_value_heads": "absent", "rope_parameters": "absent", "rope_theta": "absent"},
        {"num_kv_heads": 4, "rotaries": (Rotary(2e6),) * 2},
    ),
    "a part of phi's heads": (
        "phi3",
        {"rope_parameters": "absent", "rope_theta": 5, "partial_rotary_factor": 0.75},
        {"rotaries": (Rotary(5.0, 0.75),) * 2},
    ),
    "phi without windows": (
        "phi3",
        {"sliding_window": "absent"},
        {"layer_types": (FULL, FULL), "sliding_window": 0},
    ),
    "granite's own": (
        "granite",
        dict.fromkeys(
            ("attention_multiplier", "embedding_multiplier", "residual_multiplier"), "absent"
        )
        | {"logits_scaling": "absent"},
        {"query_scalar": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0}
        | {"logit_divisor": 1.0},
    ),
    "types of numbers": ("llama", {"dtype": "bfloat16", "torch_dtype": "float16"}, {}),
    "width of gpt2": ("gpt2", {"n_inner": None}, {"mlp_dim": 64}),
    "falcon, one norm": ("falcon_new", {"num_ln_in_parallel_attn": 1}, {"shared_norm": True}),
}


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_what_files_leave_to_be_understood(case, folder):
    name, changes, fields = UNDERSTOOD[case]
    config = read_config(folder(name, **changes)).config
    assert {field: getattr(config, field) for field in fields} == fields


@pytest.mark.parametrize("learned", [True, False])
def test_what_is_longer_than_the_positions_is_refused(learned, tmp_path):
    model = MODEL.replace(max_positions=9, **({"rotaries": None} if learned else {}))
    params = model.init(jax.random.key(0))
    generate(model, params, PROMPTS, max_length=5)
    message = "a prompt has 5 tokens and its output may have 6: the model has 9 positions"
    with pytest.raises(ValueError, match=message):
        generate(model, params, PROMPTS, max_length=6)
    with pytest.raises(ValueError, match="a prompt has 8 tokens and its output may have 3"):
        train(model, params, arrays(24, length=8), TrainSettings(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensors_of_another_family_are_told(folder):
    path = folder("gpt2")
    shutil.copy(decoder_folders.DATA / "llama" / "model.safetensors", path)
    with pytest.raises(ValueError, match=r"transformer.h.0.attn.c_attn.bias is missing"):
        load_checkpoint(path)
