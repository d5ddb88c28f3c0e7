"""The model on a batch: what training, annotation and evaluation all begin with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from t5patches.model.t5.network import T5Config, Transformer


def forward(
    model: T5Config,
    params: Mapping[str, Any],
    batch: Mapping[str, Any],
    *,
    dropout_key: jax.Array | None = None,
    return_hidden: bool = False,
) -> jax.Array:
    """Runs the T5 on given outputs (teacher forcing).

    Args:
        model: the sizes of the T5.
        params: its parameters.
        batch: `encoder_input_tokens` [B, S], `decoder_input_tokens` and `decoder_target_tokens`
            [B, L].
        dropout_key: for dropout; None for none.
        return_hidden: stop before the logits.

    Returns:
        Logits [B, L, V], or hidden states [B, L, D].
    """
    out: Any = Transformer(model).apply(
        {"params": params},
        batch["encoder_input_tokens"],
        batch["decoder_input_tokens"],
        batch["decoder_target_tokens"],
        enable_dropout=dropout_key is not None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        return_hidden=return_hidden,
    )
    return out
