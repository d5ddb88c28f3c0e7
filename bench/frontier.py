r"""What is left of the unwanted against closeness: every method over its own strengths.

    python -m bench.frontier                    # one seed; repeated, it goes on where it was
    python -m bench.frontier --seeds 3          # three models, trained and edited anew

On the task of `make demo`, beside its ceiling: the original decoded under the constraint. A
method's strengths are values of alpha, or numbers of updates where alpha is only a factor on all of
its loss, which Adam does not see. Read off its curve is the least KL with which no more than a
share of the outputs is unwanted, log KL by prevalence between two strengths; no number stands where
the curve does not come so low. Curves on sampled outputs say so, others are on greedy ones.

Of each method the point nearest to 2% left is measured further: how diverse its outputs are, and
what comes back of the habit when the model is fine-tuned or rounded afterwards. The same is done to
the original, which says how much of that is the treatment's own doing.

Standard errors are over held-out inputs, in pairs where two methods are compared, as all of them
answer the same inputs. With several seeds they are over seeds, in pairs too: a seed has a model,
training data and inputs of its own, and the scatter of its differences holds that of all three.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from bench import common
from t5patches.editing.annotate import expand_negatives, speak
from t5patches.editing.batches import example_batches
from t5patches.editing.curves import AT, kl_at, nearest, who_is_closest
from t5patches.editing.data import Batch, Example, to_arrays
from t5patches.editing.demo import LATER, DemoConfig, Edit, Repetition, claim_demo, merged, unmarked
from t5patches.editing.demo_task import ENTITY_FREE, Pair, places_not_in_source
from t5patches.editing.evaluate import (
    Measure,
    diversity,
    kept_divergence,
    over_seeds,
    prevalence,
    ratio,
)
from t5patches.editing.report import Results, show, write_html
from t5patches.editing.train import TARGETED, TrainSettings, training_progress
from t5patches.model.protocol import LanguageModel, Params
from t5patches.model.teacher_cache import ORIGINAL_HIDDEN
from t5patches.runs.files import write_file

UPDATES = (10, 30, 100)
GROUP = 32  # numbers that share a scale


def by_alpha(objective: str, *alphas: float, **options: bool) -> tuple[Edit, ...]:
    """A curve by alpha."""
    return tuple(Edit(objective, alpha, **options) for alpha in alphas)


def by_updates(objective: str, **options: bool) -> tuple[Edit, ...]:
    """A curve by the number of updates."""
    return tuple(Edit(objective, steps=steps, **options) for steps in UPDATES)


CURVES: Mapping[str, Sequence[Edit]] = {
    "TNRF, sets": by_alpha("tnrf", 0.1, 0.3, 1.0, with_sets=True),
    "TNFF, sets": by_alpha("tnff", 1.0, 3.0, 10.0, with_sets=True),
    "TNRR, sets": by_alpha("tnrr", 0.1, 0.3, 1.0, with_sets=True),
    "UL, sets": by_alpha("ul", 0.1, 0.3, 1.0, with_sets=True),
    "UL, sets, sampled": by_alpha("ul", 0.1, 0.3, 1.0, with_sets=True, on_sampled=True),
    "NL, sampled": by_alpha("nl", 0.03, 0.1, 0.3, on_sampled=True),
    "corrective, sampled": by_updates("ce", on_sampled=True),
    "UNDIAL, sets": by_alpha("undial", 0.3, 1.0, 3.0, with_sets=True),
    "CE-U, sets": by_updates("ceu", with_sets=True),
    "Unilogit": by_updates("unilogit"),
    "NPO": by_alpha("npo", 0.1, 0.3, 1.0),
    "DPO": by_updates("dpo"),
    "FTPO, sets": by_updates("ftpo", with_sets=True),
}
EDITS = tuple(edit for edits in CURVES.values() for edit in edits)
MEASURES = (
    "kl",
    "prevalence_sampled",
    "prevalence",
    "exact_match_clean",
    "reference_exact",
    "bleu",
    "malformed",
)


# What is measured further.


def further(repetition: Repetition, name: str, params: Params) -> dict[str, Measure]:
    """Of a model as it is, and of what it becomes: fine-tuned in two ways, and rounded."""
    model, _, tokenizer = repetition.original
    inputs = [example.inputs for example in repetition.outputs]

    def sampled(params: Params) -> list[Example]:
        measuring = repetition.measuring
        rule = places_not_in_source()
        return speak(model, params, inputs, rule, tokenizer, temperature=1.0, **measuring.asks)

    found = {**diversity(sampled(params)), "kl_needed": needed(repetition, params)}
    for treatment, treated in (
        ("relearned", fine_tuned(repetition, f"{name}-relearned", params, stated=False)),
        ("stated", fine_tuned(repetition, f"{name}-stated", params, stated=True)),
        ("int4", rounded(params)),
    ):
        found[f"prevalence_{treatment}"] = prevalence(sampled(treated))["prevalence"]
        found[f"kl_{treatment}"] = kept_divergence(model, treated, repetition.before)
    return found


def unwanted_next(repetition: Repetition) -> list[dict[int, tuple[int, ...]]]:
    """Where the original said nothing unwanted and might have: the tokens that begin such a thing.

    For each held-out output, by position, as `t5patches.editing.annotate.expand_negatives` finds
    them where something was said.
    """
    path = repetition.directory / "unwanted-next.json"
    if not path.exists():
        model, params, tokenizer = repetition.original
        asked = list(repetition.outputs)
        for rows, batch in example_batches(asked, 256, model.config.pad_id):
            unsure = np.asarray(_unsure(params, batch, model)) & (batch["weights"] > 0)
            for row, there in zip(rows, unsure, strict=False):
                count = len(asked[row].output_ids)
                asked[row] = dataclasses.replace(asked[row], marked=tuple(there[:count].tolist()))
        found = expand_negatives(
            asked,
            places_not_in_source(),
            tokenizer,
            model,
            params,
            count=repetition.config.negatives,
            max_length=repetition.config.max_length,
            progress=repetition.progress,
        )
        write_file(path, json.dumps([[*e.negatives.items()] for e in found]))
    return [{at: tuple(ids) for at, ids in row} for row in json.loads(path.read_text())]


@functools.partial(jax.jit, static_argnames="model")
def _unsure(params: Params, batch: Batch, model: LanguageModel) -> jax.Array:
    """Where something else than what was said has more than 1%."""
    p = jax.nn.softmax(model.head(params).logits(model.hidden(params, batch)))
    return jnp.take_along_axis(p, batch["outputs"][..., None], axis=-1)[..., 0] < 0.99


def needed(repetition: Repetition, params: Params) -> Measure:
    r"""The part of an edit's KL that is the removal itself.

    Where the original might have said something unwanted and did not, an edit that removes it
    changes the distribution of an unmarked position. With F the tokens that begin it,
    :math:`KL(q, p) = KL(q_F, p_F) + q_F KL(q | F, p | F) + (1 - q_F) KL(q | F^c, p | F^c)`,
    and this is the first term, of whether a token of F comes; the ceiling, with p_F = 0, would have
    an infinite one. The mean is over the same positions as that of `kl`.
    """
    model, original = repetition.original[0], repetition.before
    sets = unwanted_next(repetition)
    sums, counts = np.zeros((2, len(sets)))
    for rows, batch in original.batches:
        unwanted = np.zeros((*batch["outputs"].shape, model.config.vocab_size), bool)
        for i, row in enumerate(rows):
            for at, ids in sets[row].items():
                unwanted[i, at, [*ids]] = True
        kl = np.asarray(_whether_unwanted(params, original.head, batch, unwanted, model))
        kept = batch["weights"] > 0
        sums[rows] = np.where(kept, kl, 0).sum(-1)[: len(rows)]
        counts[rows] = kept.sum(-1)[: len(rows)]
    return ratio(sums, counts)


@functools.partial(jax.jit, static_argnames="model")
def _whether_unwanted(
    params: Params, original_head: Params, batch: Batch, unwanted: np.ndarray, model: LanguageModel
) -> jax.Array:
    """KL between whether the one and the other say a token of the set, [B, L]."""

    def both(head: Params, hidden: Any) -> tuple[jax.Array, jax.Array]:
        z = model.head(head).logits(hidden)
        inside, outside = (
            jax.nn.logsumexp(z, -1, where=where) - jax.nn.logsumexp(z, -1)
            for where in (unwanted, ~unwanted)
        )
        return inside, outside

    q, no_q = both(original_head, batch[ORIGINAL_HIDDEN])
    p, no_p = both(params, model.hidden(params, batch))
    kl = jnp.exp(q) * (q - p) + jnp.exp(no_q) * (no_q - no_p)
    return jnp.where(unwanted.any(-1), kl, 0)


def where_stated(pairs: Sequence[Pair]) -> list[Pair]:
    """Those whose news say where it happened: their summaries need no invention."""
    rule = places_not_in_source()
    return [p for p in pairs if ENTITY_FREE not in p.summary and not list(rule(*p))]


def fine_tuned(repetition: Repetition, name: str, params: Params, *, stated: bool) -> Params:
    """One epoch of ordinary fine-tuning on other pairs of the task, as many as edits train on.

    They come as they are, habit and all; or, `stated`, all news say where it happened, so that
    nothing shows the habit, nor what to say instead of it.
    """
    model, _, tokenizer = repetition.original
    config = repetition.config
    pairs = repetition.pairs(4 * config.edit_inputs, LATER)
    if stated:
        pairs = where_stated(pairs)
    examples = unmarked(pairs[: config.edit_inputs], tokenizer)
    settings = TrainSettings(
        objective="ce",
        steps=math.ceil(len(examples) / config.edit_batch_size),
        batch_size=config.edit_batch_size,
        learning_rate=1e-4,
        optimizer="adam",
        seed=repetition.seed,
    )
    arrays = to_arrays(examples, pad_id=model.config.pad_id)
    return repetition.train(name, model, params, arrays, settings).params


def rounded(params: Params) -> Params:
    """Every matrix in 4 bits: symmetric, `GROUP` numbers along its input share a scale.

    A number w of a group becomes ``s round(w / s)`` with ``s = max |w| / 7``. Embeddings are
    rounded too, along their width; norms and the biases of positions are not.
    """

    def round_leaf(path: Any, w: Any) -> jax.Array:
        name = path[-1].key
        if name not in ("kernel", "embedding"):
            return jnp.asarray(w)
        axis = 0 if name == "kernel" else 1
        columns = jnp.moveaxis(jnp.asarray(w), axis, -1)
        groups = columns.reshape(*columns.shape[:-1], -1, GROUP)
        scale = jnp.maximum(jnp.abs(groups).max(-1, keepdims=True) / 7, 1e-12)
        levels = jnp.round(groups / scale)
        return jnp.moveaxis((levels * scale).reshape(columns.shape), -1, axis)

    return jax.tree_util.tree_map_with_path(round_leaf, params)


# From edits to a table.


def points(results: Results) -> dict[str, list[Mapping[str, Measure]]]:
    """The measures of each curve, from weak to strong."""
    of = {edit: row.measures for edit, row in zip(EDITS, results.rows, strict=True)}
    return {name: [of[edit] for edit in edits] for name, edits in CURVES.items()}


def near(results: Results) -> dict[str, int]:
    """For each method the row that is measured further: the one nearest to 2% left."""
    return {
        name: EDITS.index(CURVES[name][nearest(curve)]) for name, curve in points(results).items()
    }


def measured(repetitions: Sequence[Repetition]) -> tuple[Results, dict[str, int]]:
    """All edits, named by their curves; those that are measured further, with what was found."""
    began = time.monotonic()
    found = [repetition.measured(ceiling=True) for repetition in repetitions]
    results = merged(repetitions[0].config, found, 0)
    chosen = near(results)

    def mean(name: str, params: Callable[[Repetition], Params]) -> dict[str, Measure]:
        each = [further(repetition, name, params(repetition)) for repetition in repetitions]
        return {key: over_seeds([measures[key] for measures in each]) for key in each[0]}

    curves = {EDITS.index(edit): name for name, edits in CURVES.items() for edit in edits}
    rows = [dataclasses.replace(row, curve=curves[i]) for i, row in enumerate(results.rows)]
    for i in chosen.values():
        more = mean(EDITS[i].folder, lambda repetition, i=i: repetition.edited(EDITS[i]).params)
        rows[i] = dataclasses.replace(rows[i], measures={**rows[i].measures, **more})
    before = {**results.before, **mean("base", lambda repetition: repetition.original.params)}
    settings = {**results.settings, "seconds": round(time.monotonic() - began)}
    return dataclasses.replace(results, rows=rows, before=before, settings=settings), chosen


def stored(measures: Mapping[str, Measure]) -> dict[str, list[float | None]]:
    """Values and errors."""
    return {
        key: [x if math.isfinite(x) else None for x in (measure.value, measure.error)]
        for key, measure in measures.items()
    }


def rows_of(results: Results, chosen: Mapping[str, int]) -> list[dict]:
    """Each curve with its points, what is read off it, and the point that was measured further."""
    rows = []
    for name, curve in points(results).items():
        at, edits = {f"{x:g}": kl_at(curve, x) for x in AT}, CURVES[name]
        rows.append({
            "method": name,
            "at": {x: kl and [kl.value, kl.error] for x, kl in at.items()},
            "points": [
                {"alpha": e.alpha, "updates": e.steps} | {k: stored(m)[k] for k in MEASURES}
                for e, m in zip(edits, curve, strict=True)
            ],
            "near": edits.index(EDITS[chosen[name]]),
            "further": stored(results.rows[chosen[name]].measures),
        })  # fmt: skip
    return rows


def main() -> None:
    """Edits, measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--output", metavar="DIR", default="frontier-report", help="where it works, and reports"
    )
    options = parser.parse_args()
    output, config = pathlib.Path(options.output), DemoConfig(edits=EDITS)
    claim_demo(output, config)
    with training_progress() as progress:
        results, chosen = measured([
            Repetition(config, seed, output / "work" / f"seed-{seed}", progress)
            for seed in range(options.seeds)
        ])  # fmt: skip
    write_html(output / "report.html", results)
    show(results, Console())
    targeted = [name for name, edits in CURVES.items() if edits[0].objective in TARGETED]
    path = common.save(
        "frontier",
        rows_of(results, chosen),
        errors=results.errors,
        settings={k: v for k, v in results.settings.items() if k != "edits"},
        said=who_is_closest(points(results), targeted),
        before=stored(results.before),
        ceiling=stored(results.ceiling),
    )
    print(f"stored in {path}; report: {output / 'report.html'}")


if __name__ == "__main__":
    main()
