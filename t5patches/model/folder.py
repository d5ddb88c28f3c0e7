"""A model folder as every command takes it: sizes, parameters and tokenizer, checked together."""

from __future__ import annotations

import os
from typing import NamedTuple

from t5patches.model.huggingface import load_checkpoint
from t5patches.model.protocol import LanguageModel, ModelConfig, Params
from t5patches.model.tokenizer import Tokenizer
from t5patches.model.tokenizer_files import load_tokenizer


class LoadedModel(NamedTuple):
    """What a Hugging Face model folder holds.

    Attributes:
        model: the network.
        params: its parameters, float32.
        tokenizer: the folder's own.
    """

    model: LanguageModel
    params: Params
    tokenizer: Tokenizer


def load_model(folder: str | os.PathLike[str], *, chat: str = "auto") -> LoadedModel:
    """Reads a model folder with its tokenizer.

    Args:
        folder: `config.json`, safetensors in one or several shards, and a tokenizer.
        chat: "on", "off" or "auto", see `t5patches.model.tokenizer_files.load_tokenizer`.

    Returns:
        The model.

    Raises:
        ValueError: naming everything that is wrong with the weights or the tokenizer, or saying
            that they are not of one model.
    """
    tokenizer = load_tokenizer(folder, chat=chat)
    model, params = load_checkpoint(folder)
    check_tokenizer(tokenizer, model.config, folder)
    return LoadedModel(model, params, tokenizer)


def check_tokenizer(
    tokenizer: Tokenizer, config: ModelConfig, folder: str | os.PathLike[str]
) -> None:
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
    if (tokenizer.pad_id, tokenizer.end_ids) != (config.pad_id, config.end_ids):
        raise ValueError(
            f"{folder}: the tokenizer has pad id {tokenizer.pad_id} and end id "
            f"{_listed(tokenizer.end_ids)}; the model's are {config.pad_id} and "
            f"{_listed(config.end_ids)}: the tokenizer is of another model"
        )


def _listed(ids: tuple[int, ...]) -> str:
    return " or ".join(map(str, ids))
