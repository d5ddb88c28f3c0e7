"""The ceiling of an edit: the original, decoded so that what the rule marks is never said.

No weight changes. Where an output holds something unwanted, decoding goes back to the first token
of it, takes another one there and goes on from there, until nothing is found: the sampler of Paech
et al. 2025 ("Antislop", arXiv 2510.15061) with a factor of 0. It is exact and needs no list of
tokens, since the rule itself is asked; it costs several outputs for each, and the rule at hand
wherever the model is used. An edit is to do as well without either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5patches.editing.annotate import Rule, annotate, speak, until_end
from t5patches.editing.batches import example_batches
from t5patches.editing.data import Batch, Example, pad_rows
from t5patches.editing.evaluate import (
    Evaluation,
    Measuring,
    malformed,
    over_inputs,
    prevalence,
    quality,
    similarity,
)
from t5patches.model.generate import generate
from t5patches.model.protocol import LanguageModel, Params
from t5patches.model.tokenizer import Inputs, Tokenizer

ATTEMPTS = 100  # that an output goes back at the most


def speak_constrained(
    model: LanguageModel,
    params: Params,
    inputs: Sequence[Inputs],
    rule: Rule,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 256,
) -> list[Example]:
    r"""What a model says where it cannot say what a rule marks.

    With a set :math:`F` of tokens that were tried after the same beginning of an output and found
    to begin something unwanted, the next token is the likeliest other one, or is drawn from
    :math:`p'_v \propto p_v^{1 / \tau} [v \notin F]`.

    Args:
        model: the network.
        params: its parameters.
        inputs: the source texts, or conversations.
        rule: says what is unwanted.
        tokenizer: the model's.
        max_length: tokens that an output may have.
        temperature: 0 for greedy decoding.
        seed: of the sampling.
        batch_size: outputs made at a time.

    Returns:
        An example for each input; nothing is marked but where `ATTEMPTS` were not enough. An end
        token has no characters that a rule could mark, so there is always something to say.
    """
    options: dict[str, Any] = {"max_length": max_length, "batch_size": batch_size}
    options["temperature"] = temperature
    params = jax.tree.map(jnp.asarray, params)
    outputs = speak(model, params, inputs, rule, tokenizer, seed=seed, **options)
    # By output and its first tokens: what may not come next.
    forbidden: list[dict[tuple[int, ...], set[int]]] = [{} for _ in outputs]
    for attempt in range(ATTEMPTS):
        left = [number for number, example in enumerate(outputs) if any(example.marked)]
        if not left:
            break
        # Draws of their own: those that made an output have to do with its being given up.
        rng = jax.random.fold_in(jax.random.key(seed), len(outputs) + attempt)
        again = [outputs[number] for number in left]
        at = np.array([example.marked.index(True) for example in again])
        barred = np.zeros((len(left), model.config.vocab_size), bool)
        barred[:, tokenizer.vocab_size :] = True
        if model.config.pad_id >= 0:  # else padding is no token, and -1 would be the last one
            barred[:, model.config.pad_id] = True
        for row, number in enumerate(left):
            begun = again[row].output_ids[: at[row]]
            tried = forbidden[number].setdefault(begun, set())
            tried.add(again[row].output_ids[at[row]])
            barred[row, [*tried]] = True
        prefixes = np.full((len(left), max_length), model.config.pad_id, np.int32)
        for rows, batch in example_batches(again, batch_size, model.config.pad_id):
            filled = np.resize(rows, len(batch["outputs"]))
            keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, np.array(left)[filled])
            others = _others(params, batch, at[filled], barred[filled], keys, temperature, model)
            for row, other in zip(rows, np.asarray(others), strict=False):
                prefixes[row, : at[row]] = again[row].output_ids[: at[row]]
                prefixes[row, at[row]] = other
        prompts = [example.input_ids for example in again]
        said = generate(
            model,
            params,
            pad_rows(prompts, model.config.pad_id, max(len(e.input_ids) for e in outputs)),
            prefixes=prefixes,
            rng=rng,
            numbers=np.array(left),
            **options,
        )
        made = annotate(
            [example.inputs for example in again],
            until_end(said, model.config.end_ids),
            tokenizer,
            rule,
            prompts=prompts,
        )
        for number, example in zip(left, made, strict=True):
            outputs[number] = example
    return outputs


@jax.jit(static_argnames="model")
def _others(
    params: Params,
    batch: Batch,
    at: np.ndarray,
    barred: np.ndarray,
    keys: jax.Array,
    temperature: float,
    model: LanguageModel,
) -> jax.Array:
    """For each output the token to take at a position instead, [rows]."""
    hidden = jnp.take_along_axis(model.hidden(params, batch), at[:, None, None], axis=1)[:, 0]
    logits = jnp.where(barred, -jnp.inf, model.head(params).logits(hidden))
    drawn = jax.vmap(jax.random.categorical)(keys, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))


def evaluate_constrained(
    model: LanguageModel,
    original: Params,
    before: Sequence[Example],
    tokenizer: Tokenizer,
    measuring: Measuring,
) -> Evaluation:
    """Measures the original under the constraint as `evaluate` measures an edit.

    Args:
        model: the network.
        original: its parameters.
        before: what it says to the held-out inputs without the constraint, marked by the rule.
        tokenizer: the model's.
        measuring: what to ask; its rule is the constraint, its meter is not asked.

    Returns:
        The measures of `evaluate`, and the outputs of greedy decoding. `kl` is 0 by definition:
        the weights are the original's, and nothing is barred where nothing was found.

    Raises:
        ValueError: there is no rule.
    """
    rule = measuring.rule
    if rule is None:
        raise ValueError("there is no rule, and so no constraint: give Measuring a rule")

    inputs = [example.inputs for example in before]

    def say(temperature: float) -> list[Example]:
        return speak_constrained(
            model,
            original,
            inputs,
            rule,
            tokenizer,
            temperature=temperature,
            **measuring.asks,
        )

    greedy = say(0.0)
    measures = {"kl": over_inputs(inputs, np.zeros(len(before))), **prevalence(greedy)}
    measures["prevalence_sampled"] = prevalence(say(1.0))["prevalence"]
    if measuring.references is not None:
        measures |= quality(greedy, measuring.references)
    measures |= similarity(greedy, before)
    measures["malformed"] = malformed(greedy, tokenizer, measuring.well_formed)
    return Evaluation(measures, greedy)
