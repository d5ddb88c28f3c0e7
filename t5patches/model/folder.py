"""A model folder as every command takes it: sizes, parameters and tokenizer, checked together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from t5patches.model.huggingface import load_checkpoint
from t5patches.model.t5.network import T5Config
from t5patches.model.tokenizer import Tokenizer
from t5patches.model.tokenizer_files import load_tokenizer


class Model(NamedTuple):
    """What a Hugging Face T5 folder holds.

    Attributes:
        config: sizes and switches.
        params: float32 numpy arrays, the tree that `t5patches.network.Transformer` takes.
        tokenizer: the folder's own.
    """

    config: T5Config
    params: Mapping[str, Any]
    tokenizer: Tokenizer


def load_model(folder: str | os.PathLike[str]) -> Model:
    """Reads a T5 1.0, T5 1.1, Flan-T5 or mT5 folder with its tokenizer.

    Args:
        folder: `config.json`, safetensors in one or several shards, and `spiece.model` or
            `tokenizer.json`.

    Returns:
        The model.

    Raises:
        ValueError: naming everything that is wrong with the weights or the tokenizer, or saying
            that they are not of one model.
    """
    tokenizer = load_tokenizer(folder)
    config, params = load_checkpoint(folder)
    check_tokenizer(tokenizer, config, folder)
    return Model(config, params, tokenizer)


def check_tokenizer(tokenizer: Tokenizer, config: T5Config, folder: str | os.PathLike[str]) -> None:
    """Refuses a tokenizer that is not the model's.

    A model may have more rows in its embedding than the tokenizer has ids, as T5 has 32128 for
    32100. No text leads to the rows beyond; they stay part of the softmax, as in training.

    Args:
        tokenizer: to judge.
        config: of the model.
        folder: named in the error.

    Raises:
        ValueError: the tokenizer has ids that the model lacks, or other padding or end ids.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids and the model's embedding "
            f"{config.vocab_size} rows: the tokenizer is of another model"
        )
    if (tokenizer.pad_id, tokenizer.eos_id) != (0, 1):
        raise ValueError(
            f"{folder}: the tokenizer has pad id {tokenizer.pad_id} and end id {tokenizer.eos_id}; "
            "T5's are 0 and 1: the tokenizer is of another model"
        )
