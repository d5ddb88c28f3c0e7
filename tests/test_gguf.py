"""GGUF files become folders: files written by the format's own library, laid out as llama.cpp's."""

import json
import re
import sys

import gguf
import jax
import numpy as np
import pytest
import tokenizer_samples
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from t5patches import cli
from t5patches.model.decoder.model import small_decoder
from t5patches.model.decoder.network import FULL, SLIDING, Rotary
from t5patches.model.folder import load_model
from t5patches.model.huggingface import read_config, save_checkpoint

SIZES = {"width": 32, "layers": 2, "num_heads": 4, "num_kv_heads": 2, "max_positions": 64}
LLAMA = small_decoder(
    **SIZES,
    vocab_size=336,
    begin_id=0,
    end_ids=(1, 3),
    tied=True,
    layer_types=(FULL,) * 2,
    rotaries=(Rotary(5e5, scaling="llama3", factor=8.0, low=1.0, high=4.0, positions=8192),) * 2,
)
GEMMA = small_decoder(
    **SIZES,
    family="gemma3_text",
    vocab_size=330,
    begin_id=1,
    end_ids=(2,),
    tied=True,
    layer_types=(SLIDING,) * 2,
    sliding_window=8,
    norms="both",
    norm_offset=1.0,
    qk_norm="heads",
    scaled_embedding=True,
    activation="gelu",
    query_scalar=16.0,
    rotaries=(Rotary(1e6), Rotary(1e4)),
)
SPACES = tokenizer_samples.tokenizer_model(user_defined_symbols="▁▁,▁▁▁")
NAMES = {
    "embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "norm": "output_norm",
}
AFTER = {
    "llama": {"post_attention_layernorm": "ffn_norm"},
    "gemma3": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}


def write(path, kind, model, params, change=lambda writer: None):
    """A file of a model, with one matrix of 8 bits."""
    writer, config = gguf.GGUFWriter(path, kind), model.config
    writer.add_embedding_length(config.emb_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_context_length(config.max_positions)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rotaries[0].base)
    writer.add_bos_token_id(config.begin_id)
    writer.add_eos_token_id(config.end_ids[0])
    if kind == "llama":
        turns = [rotary.turns(config.head_dim) for rotary in (Rotary(5e5), config.rotaries[0])]
        writer.add_tensor("rope_freqs.weight", turns[0] / turns[1])
        writer.add_eot_token_id(config.end_ids[1])
        found = json.loads(tokenizer_samples.tokenizer_json("byte-level"))["model"]
        tokens = sorted(found["vocab"], key=found["vocab"].get)
        tokens += [f"[PAD{i}]" for i in range(len(tokens), config.vocab_size)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([" ".join(pair) for pair in found["merges"]])
        writer.add_token_types([3 if i < 4 else 1 for i in range(len(tokens))])
    else:
        writer.add_sliding_window(config.sliding_window)
        found = sentencepiece_model_pb2.ModelProto.FromString(SPACES)
        # As llama.cpp writes Gemma's: spaces as such, the unknown token as a control token.
        tokens = [x.piece.replace("▁", " ") if x.type == 4 else x.piece for x in found.pieces]
        found.pieces[0].type = 3
        writer.add_unk_token_id(0)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([piece.score for piece in found.pieces])
        writer.add_token_types([piece.type for piece in found.pieces])
        writer.add_add_bos_token(True)
    writer.add_token_list(tokens)
    change(writer)
    for name, tensor in model.family.tensors(config).items():
        value = params
        for part in tensor.path:
            value = value[part]
        value = value.T if tensor.transposed else value
        module = name.split(".")[-2]
        there = (NAMES | AFTER[kind])[module]
        if "layers" in name:
            there = f"blk.{name.split('.')[2]}.{there}"
        if kind == "llama" and module in ("q_proj", "k_proj"):
            heads = config.num_heads if module == "q_proj" else config.num_kv_heads
            halves = value.reshape(heads, 2, len(value) // heads // 2, -1)
            value = halves.swapaxes(1, 2).reshape(value.shape)
        value = np.ascontiguousarray(value + (kind == "gemma3" and "norm" in module), np.float32)
        if there == "blk.1.attn_output":
            value = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{there}.weight", value, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{there}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def params_of(model):
    made = jax.jit(model.init)(jax.random.key(0))
    return jax.tree.map(lambda x: np.asarray(x) + np.float32(0.03), made)


@pytest.mark.parametrize(("kind", "model"), [("llama", LLAMA), ("gemma3", GEMMA)])
def test_a_file_becomes_a_folder(kind, model, tmp_path, capsys):
    params = params_of(model)
    write(tmp_path / "x.gguf", kind, model, params)
    given = ["convert", "--model", tmp_path / "x.gguf", "--output", tmp_path / "out", "--json"]
    assert cli.main([str(x) for x in given]) == 0
    assert set(json.loads(capsys.readouterr().out)["quantised"]) == {"F32", "Q8_0"}
    got = load_model(tmp_path / "out")
    assert got.model == model
    quantised = got.params["layers_1"]["attention"].pop("out")["kernel"]
    true = params["layers_1"]["attention"].pop("out")["kernel"]
    assert 0 < np.abs(quantised - true).max() < np.abs(true).max() / 100
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got.params, params)
    assert "Q8_0 (2,048 numbers)" in (tmp_path / "out" / "README.md").read_text()
    for text in ("a fire closed  the    café", "naïve\n def f", "東京"):
        if kind == "llama":
            content = tokenizer_samples.tokenizer_json("byte-level")
            want = Tokenizer.from_buffer(content).encode(text).ids
        else:
            save_checkpoint(
                tmp_path / text,
                model,
                params_of(model),
                files={"tokenizer.model": SPACES},
            )
            want = load_model(tmp_path / text).tokenizer.encode(text).ids
        assert list(got.tokenizer.encode(text).ids) == list(want)
        assert got.tokenizer.decode(want).text == text


def converted(tmp_path, change):
    """What a file of a Llama comes to be."""
    write(tmp_path / "x.gguf", "llama", LLAMA, params_of(LLAMA), change)
    given = ["convert", "--model", tmp_path / "x.gguf", "--output", tmp_path / "out"]
    assert cli.main([str(x) for x in given]) == 0
    return load_model(tmp_path / "out")


@pytest.mark.parametrize("name", ["llama-bpe", "llama3", "llama-v3"])
@pytest.mark.parametrize(("begins", "before"), [(None, (0,)), (False, ())])
def test_a_llama_3_begins_with_its_first_token_unless_the_file_says_no(
    name, begins, before, tmp_path
):
    def change(writer):
        writer.kv_data[0].pop("tokenizer.ggml.pre")
        writer.add_tokenizer_pre(name)
        if begins is not None:
            writer.add_add_bos_token(begins)

    assert converted(tmp_path, change).tokenizer.special.before == before
    others = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))  # who reads it alone
    bare = others.encode("a b", add_special_tokens=False)
    assert others.encode("a b").ids == [*before, *bare.ids]


def test_the_end_of_a_turn_is_known_by_its_spelling(tmp_path):
    def change(writer):
        writer.kv_data[0].pop("tokenizer.ggml.eot_token_id")

    assert converted(tmp_path, change).model.config.end_ids == (1, 3)  # </s> and <|im_end|>


def test_a_linear_scaling_goes_by_an_old_name_and_without_its_kind(tmp_path):
    plain = LLAMA.replace(rotaries=(Rotary(5e5), Rotary(5e5)))
    for i, name in enumerate(("llama.rope.scale_linear", "llama.rope.scaling.factor")):

        def change(writer, name=name):
            writer.tensors[0].pop("rope_freqs.weight")
            writer.add_float32(name, 4.0)

        path = tmp_path / str(i)
        path.mkdir()
        write(path / "x.gguf", "llama", plain, params_of(plain), change)
        given = ["convert", "--model", path / "x.gguf", "--output", path / "out"]
        assert cli.main([str(x) for x in given]) == 0
        assert read_config(path / "out").config.rotaries[0] == Rotary(5e5, 1.0, "linear", 4.0)


def test_what_a_file_says_as_usual_is_no_other(tmp_path):
    """Of heads whose size has no round root too."""
    odd = LLAMA.replace(head_dim=24, rotaries=(Rotary(5e5), Rotary(5e5)))

    def change(writer):
        writer.tensors[0].pop("rope_freqs.weight")
        writer.add_rope_dimension_count(24)
        writer.add_causal_attention(True)
        for name in ("attention.scale", "logit_scale"):
            writer.add_float32(f"llama.{name}", 24**-0.5 if name == "attention.scale" else 0.0)

    write(tmp_path / "x.gguf", "llama", odd, params_of(odd), change)
    given = ["convert", "--model", tmp_path / "x.gguf", "--output", tmp_path / "out"]
    assert cli.main([str(x) for x in given]) == 0
    assert read_config(tmp_path / "out").config.head_dim == 24


def test_a_gemmas_own_pattern_and_base(tmp_path):
    def change(writer):
        writer.add_uint32("gemma3.attention.sliding_window_pattern", 2)
        writer.add_float32("gemma3.rope.freq_base_swa", 500.0)

    write(tmp_path / "x.gguf", "gemma3", GEMMA, params_of(GEMMA), change)
    given = ["convert", "--model", tmp_path / "x.gguf", "--output", tmp_path / "out"]
    assert cli.main([str(x) for x in given]) == 0
    config = read_config(tmp_path / "out").config
    assert config.layer_types == (SLIDING, FULL)
    assert config.rotaries == (Rotary(1e6), Rotary(500.0))


REFUSED = {
    "a part of a head": (
        lambda writer: writer.add_rope_dimension_count(4),
        "llama.rope.dimension_count is 4; only 16 is known",
    ),
    "both directions": (
        lambda writer: writer.add_causal_attention(False),
        "llama.attention.causal is False; only True is known",
    ),
    "a scale": (
        lambda writer: writer.add_logit_scale(0.5),
        "llama.logit_scale is 0.5; only 1.0 is known",
    ),
    "heads by layer": (
        lambda writer: writer.add_array("llama.attention.head_count", [4, 4]),
        r"llama.attention.head_count is \[4, 4\]; a whole number is needed",
    ),
    "experts": (lambda writer: writer.add_expert_count(8), "num_local_experts is set"),
    "yarn": (
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
        "rope_parameters is .*yarn",
    ),
    "words": (lambda writer: writer.add_tokenizer_pre("tekken"), "cuts texts as 'tekken'"),
    "no words": (lambda writer: None, "does not say how texts are cut .* convert .* anew"),
    "a tensor more": (
        lambda writer: writer.add_tensor("blk.0.ssm_a.weight", np.ones(4, np.float32)),
        "blk.0.ssm_a.weight is not part of a llama",
    ),
    "frequencies": (
        lambda writer: writer.add_tensor("rope_freqs.weight", np.full(4, 5.0, np.float32)),
        "rope_freqs.weight is none of Llama 3's",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused(case, tmp_path, capsys):
    change, message = REFUSED[case]
    plain = LLAMA.replace(rotaries=(Rotary(5e5), Rotary(5e5)))
    params = params_of(plain)

    def spoil(writer):
        writer.tensors[0].pop("rope_freqs.weight")
        writer.kv_data[0].pop("tokenizer.ggml.pre")
        if case == "heads by layer":
            writer.kv_data[0].pop("llama.attention.head_count")
        if case not in ("words", "no words"):
            writer.add_tokenizer_pre("gpt-2")
        change(writer)

    write(tmp_path / "x.gguf", "llama", plain, params, spoil)
    given = ["convert", "--model", tmp_path / "x.gguf", "--output", tmp_path / "out"]
    assert run_refused(given, capsys, message)
    assert not (tmp_path / "out").exists()


def run_refused(given, capsys, message):
    assert cli.main([str(x) for x in given]) == 2
    return re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"GGUF" + b"\x03\0\0\0" + b"\xff" * 40, b"x" * 99]
)
def test_spoilt_files_are_told(content, tmp_path, capsys):
    (tmp_path / "x.gguf").write_bytes(content)
    given = ["convert", "--model", tmp_path / "x.gguf", "--output", tmp_path / "out"]
    assert run_refused(given, capsys, "x.gguf is not a whole GGUF file")


def test_a_package_that_is_missing_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    given = ["convert", "--model", tmp_path / "x.gguf", "--output", tmp_path / "out"]
    assert run_refused(given, capsys, r"convert: GGUF needs .*: pip install 't5patches\[gguf\]'\n$")


def test_a_decoder_is_no_t5x_checkpoint(tmp_path, capsys):
    save_checkpoint(tmp_path / "model", LLAMA, params_of(LLAMA))
    given = ["convert", "--model", tmp_path / "model", "--output", tmp_path / "out"]
    assert run_refused(given, capsys, "a T5X checkpoint holds a T5, and .* a llama")
