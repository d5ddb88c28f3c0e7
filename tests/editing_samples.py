"""Small vocabularies, texts and models for the tests of `t5patches.editing`."""

import functools
import io
from pathlib import Path

import jax
import sentencepiece
from safetensors.numpy import load_file

from t5patches.editing.data import Example, make_example, with_end
from t5patches.model.decoder.model import small_decoder
from t5patches.model.huggingface import save_checkpoint
from t5patches.model.t5.model import T5
from t5patches.model.t5.network import T5Config
from t5patches.model.tokenizer import SentencePieceTokenizer

TEXTS = [
    "a fire closed the library in Paris",
    "a flood hit the bridge in New York",
    "the mayor of Rome sold the theatre",
    "London is near the river, said Ann",
]


@functools.cache
def tokenizer() -> SentencePieceTokenizer:
    """A BPE vocabulary with byte fallback, which spells what it does not know in bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


def example(inputs: str, output: str, *unwanted: str) -> Example:
    """An example with the first occurrence of each of some words marked."""
    spans = [(output.index(word), output.index(word) + len(word)) for word in unwanted]
    return make_example(
        inputs, with_end(tokenizer().encode(output), tokenizer()), spans, tokenizer()
    )


def tiny_model(**changes) -> T5:
    sizes = {
        "vocab_size": tokenizer().vocab_size,
        "emb_dim": 16,
        "num_heads": 2,
        "head_dim": 8,
        "mlp_dim": 16,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "mlp_activations": ("gelu", "linear"),
        "dropout_rate": 0.0,
    }
    return T5(T5Config(**sizes | changes))


@functools.cache
def tiny_params(seed: int = 0, **changes):
    """Parameters of `tiny_model`, the same for every dropout rate; untied logits included."""
    return jax.jit(tiny_model(**changes).init)(jax.random.key(seed))


def logits(model, params, batch):
    """Of given outputs, as the dense losses take them."""
    return model.head(params).logits(model.hidden(params, batch))


def model_folder(path, seed: int = 0, **changes):
    """A folder of `tiny_model` with its tokenizer, as the commands take it."""
    files = {"spiece.model": tokenizer()._processor.serialized_model_proto()}
    save_checkpoint(path, tiny_model(**changes), tiny_params(seed, **changes), files=files)
    return path


def decoder_folder(path, seed: int = 0):
    """The same of a decoder-only model, which has the same ids."""
    model = small_decoder(vocab_size=tokenizer().vocab_size, width=16, layers=1)
    files = {"tokenizer.model": tokenizer()._processor.serialized_model_proto()}
    save_checkpoint(path, model, jax.jit(model.init)(jax.random.key(seed)), files=files)
    return path


# Folders of small models, by kind.
FOLDERS = {"T5": model_folder, "decoder": decoder_folder}


def assert_same_folder(out: Path, original: Path) -> None:
    """Equal files; of weights equal names, types and numbers, bit for bit."""
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in original.iterdir())
    for file in original.iterdir():
        if file.suffix != ".safetensors":
            assert (out / file.name).read_bytes() == file.read_bytes()
            continue
        got, expected = (
            {name: (x.dtype, x.shape, x.tobytes()) for name, x in load_file(path).items()}
            for path in (out / file.name, file)
        )
        assert got == expected
