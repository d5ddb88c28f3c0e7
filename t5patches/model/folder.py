"""A model folder as every command takes it: sizes, parameters and tokenizer, checked together."""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple

from t5patches.model.huggingface import inspect_checkpoint, load_checkpoint
from t5patches.model.lora import is_adapter, load_adapter, merged, whole_model
from t5patches.model.protocol import LanguageModel, ModelConfig, Params, dtype_named
from t5patches.model.t5.model import small_t5
from t5patches.model.tokenizer import Tokenizer
from t5patches.model.tokenizer_files import load_tokenizer

__all__ = [
    "LoadedModel",
    "check_tokenizer",
    "inspect_model",
    "load_model",
    "small_model",
    "whole_model",
]


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


def small_model(*, vocab_size: int, width: int, layers: int) -> LanguageModel:
    """A model of any size, to train from nothing.

    Args:
        vocab_size: number of ids.
        width: of the model, a multiple of 4.
        layers: of each of its stacks.

    Returns:
        A T5.
    """
    return small_t5(vocab_size=vocab_size, width=width, layers=layers)


def load_model(
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    chat: str = "auto",
    dtype: str = "float32",
) -> LoadedModel:
    """Reads a model folder with its tokenizer.

    Args:
        folder: `config.json`, safetensors in one or several shards, and a tokenizer; or that of an
            adapter, see `t5patches.model.lora`.
        base: the model folder that an adapter lies beside; a whole model needs none.
        chat: "on", "off" or "auto", see `t5patches.model.tokenizer_files.load_tokenizer`.
        dtype: of activations and of the cache, "float32" or "bfloat16".

    Returns:
        The model, an adapter added to its kernels.

    Raises:
        ValueError: naming everything that is wrong with the weights or the tokenizer, or saying
            that they are not of one model; an adapter has no base or another one; there is no
            such type.
    """
    of_activations = dtype_named(dtype)
    whole = whole_model(folder, base)
    tokenizer = load_tokenizer(whole, chat=chat)
    model, params = load_checkpoint(whole)
    check_tokenizer(tokenizer, model.config, whole)
    warn_of_few_ids(tokenizer, model.config, whole)
    if is_adapter(folder):
        adapter = load_adapter(folder, whole)
        params = merged(params, adapter.params, adapter.lora)
    return LoadedModel(model.replace(dtype=of_activations), params, tokenizer)


def inspect_model(
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    chat: str = "auto",
) -> tuple[LanguageModel, Tokenizer]:
    """Checks a model folder with its tokenizer; the weights of a whole model are not read.

    Args:
        folder: see `load_model`.
        base: see `load_model`.
        chat: see `load_model`.

    Returns:
        The network and the tokenizer.

    Raises:
        ValueError: as `load_model`, all but what only the weights' values show.
    """
    whole = whole_model(folder, base)
    model, tokenizer = inspect_checkpoint(whole), load_tokenizer(whole, chat=chat)
    check_tokenizer(tokenizer, model.config, whole)
    warn_of_few_ids(tokenizer, model.config, whole)
    if is_adapter(folder):
        load_adapter(folder, whole)
    return model, tokenizer


def check_tokenizer(
    tokenizer: Tokenizer, config: ModelConfig, folder: str | os.PathLike[str]
) -> None:
    """Refuses a tokenizer that is not the model's.

    A model may have more rows in its embedding than the tokenizer has ids, as T5 has 32128 for
    32100. No text leads to the rows beyond; they stay part of the softmax, as in training. Another
    model's tokenizer of about the same size and with the same special ids cannot be told from it.

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


_LEAST_SHARE = 0.9  # of the rows; T5's, Pythia's and Qwen's tokenizers have ids for 0.998 of them


def warn_of_few_ids(
    tokenizer: Tokenizer, config: ModelConfig, folder: str | os.PathLike[str]
) -> None:
    """Tells of a tokenizer that fits, and yet has ids for few of the model's rows.

    Args:
        tokenizer: that `check_tokenizer` took.
        config: of the model.
        folder: named in the warning.
    """
    if tokenizer.vocab_size < _LEAST_SHARE * config.vocab_size:
        # At this place, so that it is told once however often the folder is read.
        warnings.warn(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids and the model's embedding "
            f"{config.vocab_size} rows, far more than it needs: make sure that the tokenizer is "
            "this model's",
            stacklevel=1,
        )


def _listed(ids: tuple[int, ...]) -> str:
    return " or ".join(map(str, ids))
