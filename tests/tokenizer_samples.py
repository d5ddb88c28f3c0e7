"""Small tokenizers of every kind, as `tokenizer.json` and as `tokenizer.model`."""

import functools
import io
import json

import sentencepiece
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "a fire closed the library in Paris",
    "the mayor of Rome sold the  theatre",
    "l'été à café, naïve",
    "def f(x):\n    return x",
] * 5
CONTROLS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
"""Their ids are 0 to 3 in each."""


def _trained(tokenizer, trainer):
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_level(*, prefix=False, nfc=False):
    """As of GPT-2, Llama 3, Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=CONTROLS, initial_alphabet=alphabet, show_progress=False
        ),
    )


def byte_fallback(scheme):
    """As of Llama 2 and Mistral (`prepend`, or Metaspace's `first`) and Gemma (`never`)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if scheme == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        replace = normalizers.Replace(" ", "▁")
        steps = [normalizers.Prepend("▁"), replace] if scheme == "prepend" else [replace]
        tokenizer.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = [*CONTROLS, "<unk>"]
    spaced = "▁" if scheme == "first" else ""
    trainer = trainers.BpeTrainer(
        vocab_size=100, special_tokens=special, initial_alphabet=[*spaced], show_progress=False
    )
    found = json.loads(_trained(tokenizer, trainer).to_str())
    # The trainer would make the bytes special tokens.
    vocabulary = found["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    found["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(found))


def word_piece():
    """As of BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = [*CONTROLS, "<unk>"]
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    return _trained(tokenizer, trainer)


def unigram():
    """As of XLNet."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = [*CONTROLS, "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    return _trained(tokenizer, trainer)


def word_ends():
    """As of the first GPT: a piece says that its word ends."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder()
    special = [*CONTROLS, "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
    )
    return _trained(tokenizer, trainer)


def undecoded():
    """Its file says nothing of decoding."""
    tokenizer = word_piece()
    tokenizer.decoder = None
    return tokenizer


def repeated():
    """A decoder that reads a token otherwise beside the same one."""
    tokenizer = word_piece()
    tokenizer.decoder = decoders.CTC()
    return tokenizer


KINDS = {
    "byte-level": byte_level,
    "byte-level with a space in front": functools.partial(byte_level, prefix=True),
    "byte-level, NFC": functools.partial(byte_level, nfc=True),
    "bytes, prepended": functools.partial(byte_fallback, "prepend"),
    "bytes, first": functools.partial(byte_fallback, "first"),
    "bytes, as it is": functools.partial(byte_fallback, "never"),
    "words": word_piece,
    "unigram": unigram,
    "word ends": word_ends,
    "undecoded": undecoded,
    "repeated": repeated,
}


@functools.cache
def tokenizer_json(kind):
    """The content of a `tokenizer.json`."""
    return KINDS[kind]().to_str().encode()


@functools.cache
def tokenizer_model(**changes):
    """The content of a `tokenizer.model`, as of Llama 2; unknown, `<s>` and `</s>` are 0 to 2."""
    model = io.BytesIO()
    options = {
        "vocab_size": 330,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4), model_writer=model, **(options | changes)
    )
    return model.getvalue()


def gpt2_files():
    """`tokenizer_json("byte-level")` as GPT-2's own two files."""
    model = json.loads(tokenizer_json("byte-level"))["model"]
    merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
    return {"vocab.json": json.dumps(model["vocab"]), "merges.txt": f"#version: 0.2\n{merges}"}
