"""Makes the small Hugging Face folders of decoder-only models that the tests read.

    python3 -m venv /tmp/hf
    /tmp/hf/bin/pip install torch==2.14.1 transformers==5.24.0 safetensors
    /tmp/hf/bin/python tests/data/make_hf_decoders.py

Random weights, so that nothing is downloaded; every kind of parameter is far from its initial
value, so that none can be forgotten unseen. Beside each folder's weights lies `expected.npz`, what
the original library computes with them in float32, each row alone and without padding:

* `inputs`, `outputs`: -1 after their ends; `logits`: before each token of the outputs;
* `greedy`: its greedy continuation of `inputs`, -1 after an end.

`CASES` says what each folder covers. `tests/test_original_library.py` makes the same models anew.
"""

import pathlib

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent
VOCAB, LENGTH = 64, 12
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
GATED = SIZES | {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 6}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    # folder: the library's class, its config, and how it is saved
    "llama": (
        "Llama",
        {**GATED, "attention_bias": True, "mlp_bias": True, "rope_theta": 500.0}
        | {"rope_scaling": LLAMA_3, "hidden_act": "gelu_pytorch_tanh"},
        {},
    ),
    "llama_tied": (
        "Llama",
        {**SIZES, "intermediate_size": 24, "tie_word_embeddings": True}
        | {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        {"dtype": torch.float16},
    ),
    "mistral": ("Mistral", {**GATED, "sliding_window": 5, "rms_norm_eps": 1e-2}, {}),
    "qwen2": (
        "Qwen2",
        {**GATED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        {"dtype": torch.bfloat16, "max_shard_size": "6KB"},
    ),
    "qwen3": ("Qwen3", {**GATED, "attention_bias": True}, {}),
    "gemma": ("Gemma", {**GATED, "num_key_value_heads": 1}, {}),
    "gemma2": (
        "Gemma2",
        {**GATED, "sliding_window": 5, "query_pre_attn_scalar": 12}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        {},
    ),
    "gemma3_text": (
        "Gemma3",
        {**GATED, "num_hidden_layers": 3, "sliding_window": 4, "query_pre_attn_scalar": 12}
        | {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        {},
    ),
    "gpt2": ("GPT2", {**SIZES, "n_inner": 40}, {}),
    "gpt2_base": ("GPT2", SIZES, {"base": True}),
    "gpt_neox": (
        "GPTNeoX",
        {**SIZES, "intermediate_size": 24, "hidden_size": 32}
        | {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e3}
            | {"partial_rotary_factor": 0.25}
        },
        {},
    ),
    "gpt_neox_sequential": (
        "GPTNeoX",
        {**SIZES, "intermediate_size": 24, "use_parallel_residual": False, "hidden_size": 32}
        | {"attention_bias": False, "tie_word_embeddings": True},
        {},
    ),
    "falcon": ("Falcon", SIZES, {}),
    "falcon_new": (
        "Falcon",
        {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 40},
        {},
    ),
    "falcon_sequential": (
        "Falcon",
        {**SIZES, "parallel_attn": False, "multi_query": False, "bias": True}
        | {"tie_word_embeddings": False},
        {},
    ),
    # Numbers go by the place in this table: what is new comes last.
    "qwen2_tied": (
        "Qwen2",
        {**GATED, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
        {"dtype": torch.bfloat16},
    ),
    "qwen3_sliding": (
        "Qwen3",
        {**GATED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        | {"tie_word_embeddings": True, "rms_norm_eps": 1e-2},
        {"dtype": torch.bfloat16},
    ),
    "gemma_biased": (
        "Gemma",
        {**GATED, "attention_bias": True, "tie_word_embeddings": False, "hidden_act": "silu"},
        {"dtype": torch.bfloat16},
    ),
    "gemma2_plain": (
        "Gemma2",
        {**GATED, "attention_bias": True, "tie_word_embeddings": False, "sliding_window": 5}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"query_pre_attn_scalar": 4, "hidden_activation": "silu"},
        {"dtype": torch.bfloat16},
    ),
    "gemma3_softcap": (
        "Gemma3",
        {**GATED, "attention_bias": True, "tie_word_embeddings": False, "sliding_window": 4}
        | {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}
        | {"layer_types": ["sliding_attention", "full_attention"], "hidden_activation": "relu"}
        | {"query_pre_attn_scalar": 4},
        {"dtype": torch.bfloat16},
    ),
    "mistral_full": (
        "Mistral",
        {**GATED, "sliding_window": None, "tie_word_embeddings": True, "hidden_act": "gelu"},
        {"dtype": torch.bfloat16},
    ),
    "gpt2_untied": (
        "GPT2",
        {**SIZES, "n_inner": 24, "tie_word_embeddings": False, "activation_function": "relu"}
        | {"layer_norm_epsilon": 1e-2},
        {"dtype": torch.bfloat16},
    ),
    "gpt_neox_half": (
        "GPTNeoX",
        {**SIZES, "intermediate_size": 24, "hidden_act": "gelu_fast", "layer_norm_eps": 1e-2}
        | {
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e3}
            | {"partial_rotary_factor": 0.5}
        },
        {"dtype": torch.bfloat16},
    ),
    "falcon_one_norm": (
        "Falcon",
        {**SIZES, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}
        | {"num_kv_heads": 2, "ffn_hidden_size": 24, "bias": True, "activation": "relu"}
        | {"layer_norm_epsilon": 1e-2},
        {"dtype": torch.bfloat16},
    ),
    "smollm3": (
        "SmolLM3",
        {**GATED, "num_hidden_layers": 3, "no_rope_layer_interval": 3, "rms_norm_eps": 1e-2}
        | {"use_sliding_window": True, "sliding_window": 4, "rope_theta": 500.0, "pad_token_id": 0},
        {},
    ),
    "smollm3_untied": (
        "SmolLM3",
        {**SIZES, "intermediate_size": 24, "no_rope_layers": [0, 1], "tie_word_embeddings": False}
        | {"attention_bias": True, "mlp_bias": True, "sliding_window": 4, "pad_token_id": 0},
        {"dtype": torch.bfloat16},
    ),
    "olmo2": ("Olmo2", {**GATED, "rope_theta": 500.0}, {}),
    "olmo2_tied": (
        "Olmo2",
        {**SIZES, "intermediate_size": 24, "attention_bias": True, "tie_word_embeddings": True}
        | {"rms_norm_eps": 1e-2, "hidden_act": "gelu"},
        {"dtype": torch.bfloat16},
    ),
    "granite": (
        "Granite",
        {**GATED, "attention_multiplier": 0.3, "embedding_multiplier": 2.5, "logits_scaling": 1.5}
        | {"residual_multiplier": 0.7, "rope_theta": 500.0},
        {},
    ),
    "granite_tied": (
        "Granite",
        {**SIZES, "intermediate_size": 24, "attention_bias": True, "mlp_bias": True}
        | {"attention_multiplier": 0.5, "logits_scaling": 0.4, "tie_word_embeddings": True},
        {"dtype": torch.bfloat16},
    ),
    "phi3": (
        "Phi3",
        {**GATED, "head_dim": 8, "sliding_window": 5, "pad_token_id": 0}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
        | {"partial_rotary_factor": 0.5},
        {},
    ),
    "phi3_full": (
        "Phi3",
        {**SIZES, "intermediate_size": 24, "tie_word_embeddings": True, "pad_token_id": 0}
        | {"hidden_act": "gelu", "rms_norm_eps": 1e-2},
        {"dtype": torch.bfloat16, "max_shard_size": "6KB"},
    ),
}


def main():
    """Writes the folders."""
    transformers.utils.logging.disable_progress_bar()
    for name in CASES:
        folder = HERE / "decoders" / name
        theirs = make(name, folder)
        np.savez_compressed(folder / "expected.npz", **compute(theirs))


def make(name, folder):
    """Saves a model with random weights; returns it as it is read, in float32."""
    kind, config, how = CASES[name]
    torch.manual_seed(list(CASES).index(name))
    model_class = transformers.AutoModelForCausalLM
    config = getattr(transformers, f"{kind}{'Text' * (kind == 'Gemma3')}Config")(**config)
    model = model_class.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=spread(parameter_name, parameter))
        if is_norm(parameter_name) and not kind.startswith("Gemma"):
            parameter.data += 1
    # Likelier ends, so that rows end at different places.
    model.get_output_embeddings().weight.data[[1, 7]] *= 1.5
    model.generation_config.eos_token_id = [1, 7]
    model.generation_config.pad_token_id = 0
    saved = model.base_model if how.get("base") else model
    options = {name: value for name, value in how.items() if name == "max_shard_size"}
    saved.to(how.get("dtype", torch.float32)).save_pretrained(folder, **options)
    model.generation_config.save_pretrained(folder)
    if how.get("base"):
        # As the library's first versions wrote them.
        tensors = load_file(folder / "model.safetensors")
        for i in range(model.config.num_hidden_layers):
            tensors[f"h.{i}.attn.bias"] = torch.tril(torch.ones(64, 64, dtype=torch.uint8))[None]
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # Read again, as numbers that are no parameters were rounded too.
    return read(folder)


def read(folder):
    """A folder's model, as the library reads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def is_norm(name):
    """Whether a parameter is the scale of a norm."""
    return name.endswith("weight") and any(part in name for part in ("norm", "ln_"))


def spread(name, parameter):
    """A standard deviation that keeps activations and attention lively."""
    if parameter.ndim == 1:
        return 0.3
    if any(part in name for part in ("embed", "wte", "wpe")):
        return 0.5
    return 1.5 * min(parameter.shape) ** -0.5


def ids(random, lengths):
    """Rows of ids that end no output."""
    out = np.full((len(lengths), max(lengths)), -1)
    for row, length in zip(out, lengths, strict=True):
        row[:length] = random.choice([i for i in range(VOCAB) if i not in (1, 7)], length)
    return out


@torch.no_grad()
def compute(model):
    """What the original library computes."""
    random = np.random.default_rng(0)
    inputs, outputs = ids(random, (3, 9, 1, 6)), ids(random, (6, 4, 7, 2))
    logits = np.zeros((*outputs.shape, VOCAB), np.float32)
    greedy = np.full((len(inputs), LENGTH), -1)
    for i, (prompt, output) in enumerate(zip(inputs, outputs, strict=True)):
        prompt, output = prompt[prompt >= 0], output[output >= 0]
        whole = torch.from_numpy(np.concatenate([prompt, output]))[None]
        found = model(whole).logits[0].numpy()
        logits[i, : len(output)] = found[len(prompt) - 1 : -1]
        given = torch.from_numpy(prompt)[None]
        said = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=LENGTH,
            do_sample=False,
            use_cache=False,
        )[0, len(prompt) :].numpy()
        greedy[i, : len(said)] = said
    return {"inputs": inputs, "outputs": outputs, "logits": logits, "greedy": greedy}


if __name__ == "__main__":
    main()
