"""Makes the small Hugging Face T5 folders that the tests read.

    python3 -m venv /tmp/hf
    /tmp/hf/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors
    /tmp/hf/bin/python tests/data/make_hf_t5.py

Random weights, so that nothing is downloaded; every kind of parameter is far from its initial
value, so that none can be forgotten unseen. Beside each folder's weights lies `expected.npz`, what
the original library computes with them in float32:

* `inputs`, `targets`, `logits`: a batch with padding on both sides;
* `long_inputs`, `long_targets`, `long_logits`: one row beyond the last bucket of distances;
* `greedy`: its greedy continuation of `inputs`; `prefixes`, `prefixed`: the same from a prefix.

| folder | model | what else it covers |
|---|---|---|
| `t5_1_1` | gated GELU, untied | config.json as in the folders published for T5 1.1 and Flan-T5 |
| `t5_1_0` | ReLU, tied | the encoder's and the decoder's own copies of the embedding in the file |
| `mt5` | gated GELU, untied | shards with an index, bfloat16, config.json as written today |

And a `tokenizer` with `tokenizer.json` as the library writes it, and in `expected.json` texts with
the ids that it gives them.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent
VOCAB = 64
SIZES = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 6,  # heads * d_kv is not d_model, as in T5 1.1 small
    "num_heads": 3,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "decoder_start_token_id": 0,
}


def main():
    """Writes the four folders."""
    write_tokenizer()
    t5_1_1 = transformers.T5Config(
        **SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    )
    folder = write("t5_1_1", transformers.T5ForConditionalGeneration(t5_1_1), seed=1)
    edit_config(folder, tie_word_embeddings=False, scale_decoder_outputs=None)

    t5_1_0 = transformers.T5Config(**SIZES, feed_forward_proj="relu")
    folder = write("t5_1_0", transformers.T5ForConditionalGeneration(t5_1_0), seed=2)
    tensors = load_file(folder / "model.safetensors")
    for side in ("encoder", "decoder"):
        tensors[f"{side}.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    mt5 = transformers.MT5Config(**SIZES, tie_word_embeddings=False)
    model = transformers.MT5ForConditionalGeneration(mt5)
    write("mt5", model, seed=3, dtype=torch.bfloat16, max_shard_size="20KB")


def write_tokenizer():
    """Saves a tokenizer of a few pieces, and what it does with some texts."""
    pieces = ["▁", "▁a", "▁cat", "▁sat", "▁on", "▁mat", "▁caf", "at", *"acdegmnostz", "é", "ab"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    vocab += [(piece, -9.0 + 1.5 * len(piece) - 0.01 * i) for i, piece in enumerate(pieces)]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(3))]
    tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=3)
    folder = HERE / "tokenizer"
    tokenizer.save_pretrained(folder)
    texts = ["a cat sat on a mat", "  two  spaces ", "café zebra", "", "東京 at a", "a<extra_id_1>"]
    expected = [[text, tokenizer(text).input_ids] for text in texts]
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def write(name, model, *, seed, dtype=torch.float32, **options):
    """Randomises a model, saves it in `dtype` and puts what it computes beside it."""
    torch.manual_seed(seed)
    if model.config.feed_forward_proj != "relu":
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB, SIZES["d_model"]))
    for parameter_name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=spread(parameter_name, parameter))
        if "layer_norm" in parameter_name:
            parameter.data += 1
    # Likelier ends, so that the rows of a batch end at different places.
    model.get_output_embeddings().weight.data[1] *= 1.5
    folder = HERE / name
    model.to(dtype).save_pretrained(folder, **options)
    np.savez_compressed(folder / "expected.npz", **compute(model.float().eval()))
    return folder


def spread(name, parameter):
    """A standard deviation that keeps activations and attention lively."""
    if any(part in name for part in ("layer_norm", "relative_attention_bias")):
        return 0.5
    if "shared" in name:
        return 1.0
    return parameter.shape[-1] ** -0.5


@torch.no_grad()
def compute(model):
    """What the original library computes."""
    random = np.random.default_rng(0)

    def ids(rows, length, shortest):
        out = random.integers(2, VOCAB, (rows, length))
        for row in out:
            row[random.integers(shortest, length + 1) :] = 0
        return out

    def logits(inputs, targets):
        begin = np.zeros((len(targets), 1), targets.dtype)
        shifted = np.concatenate([begin, targets[:, :-1]], axis=1)
        inputs = torch.from_numpy(inputs)
        return model(
            input_ids=inputs,
            attention_mask=(inputs != 0).long(),
            decoder_input_ids=torch.from_numpy(shifted),
        ).logits.numpy()

    def greedy(inputs, prefixes):
        begin = np.zeros((len(prefixes), 1), prefixes.dtype)
        inputs = torch.from_numpy(inputs)
        out = model.generate(
            input_ids=inputs,
            attention_mask=(inputs != 0).long(),
            decoder_input_ids=torch.from_numpy(np.concatenate([begin, prefixes], axis=1)),
            max_length=25,
            do_sample=False,
            num_beams=1,
            use_cache=False,  # its cache has a place per *encoder* layer in this version
        ).numpy()
        return np.pad(out[:, 1:], ((0, 0), (0, 25 - out.shape[1])))

    inputs, targets = ids(6, 11, 3), ids(6, 9, 2)
    long_inputs, long_targets = ids(1, 170, 170), ids(1, 150, 150)
    prefixes = random.integers(2, VOCAB, (6, 4))
    found = {
        "inputs": inputs,
        "targets": targets,
        "logits": logits(inputs, targets),
        "long_inputs": long_inputs,
        "long_targets": long_targets,
        "long_logits": logits(long_inputs, long_targets),
        "greedy": greedy(inputs, prefixes[:, :0]),
        "prefixes": prefixes,
        "prefixed": greedy(inputs, prefixes),
    }
    print(found["greedy"])
    return {name: x.astype(np.int32) if x.dtype == np.int64 else x for name, x in found.items()}


def edit_config(folder, **changes):
    """Sets entries of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
