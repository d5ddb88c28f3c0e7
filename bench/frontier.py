r"""What is left of the unwanted against closeness: every method over its own strengths.

    python -m bench.frontier                    # one seed; repeated, it goes on where it was
    python -m bench.frontier --seeds 3          # three models, trained and edited anew

On the task of `make demo`, beside its ceiling: the original decoded under the constraint. A
method's strengths are values of alpha, or numbers of updates where alpha is only a factor on all of
its loss, which Adam does not see. Read off its curve is the least KL with which no more than a
share of the outputs is unwanted, log KL by prevalence between two strengths; no number stands where
the curve does not come so low. Curves on sampled outputs say so, others are on greedy ones.

The KL is told twice: at all unmarked positions, and elsewhere, at those where the original was
hardly about to say something unwanted. A few others hold most of the first: there the original
names a place that the rule lets pass, as the news names it for something else, or would have named
one had it drawn another token, and what an edit changes is what it is for.

Of each method the point nearest to 2% left is measured further: how diverse its outputs are, and
what comes back of the habit when the model is fine-tuned or rounded afterwards. The same is done to
the original, which says how much of that is the treatment's own doing.

Standard errors are over held-out inputs, in pairs where two methods are compared, as all of them
answer the same inputs. With several seeds they are over seeds, in pairs too: a seed has a model,
training data and inputs of its own, and the scatter of its differences holds that of all three.
"""

from __future__ import annotations

import abc
import argparse
import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from bench import common
from t5patches.editing.annotate import speak
from t5patches.editing.curves import AT, kl_at, nearest, who_is_closest
from t5patches.editing.data import Batch, Example, to_arrays
from t5patches.editing.demo import KEPT, LATER, DemoConfig, Repetition, claim_demo, unmarked
from t5patches.editing.demo_task import ENTITY_FREE, Pair, places_not_in_source
from t5patches.editing.evaluate import (
    Measure,
    diversity,
    kept_divergence,
    over_inputs,
    over_seeds,
    prevalence,
)
from t5patches.editing.experiment import Edit, Experiment, merged
from t5patches.editing.report import Results, show, write_html
from t5patches.editing.train import TARGETED, training_progress
from t5patches.model.protocol import LanguageModel, Params
from t5patches.model.teacher_cache import ORIGINAL_HIDDEN

UPDATES = (10, 30, 100)
GROUP = 32  # numbers that share a scale
# By the names of methods: their strengths, from weak to strong.
Curves = Mapping[str, Sequence[Edit]]


def by_alpha(
    objective: str, *alphas: float, steps: int | None = None, **options: bool
) -> tuple[Edit, ...]:
    """A curve by alpha."""
    return tuple(Edit(objective, alpha, steps=steps, **options) for alpha in alphas)


def by_updates(
    objective: str, *numbers: int, alpha: float = 1.0, **options: Any
) -> tuple[Edit, ...]:
    """A curve by the number of updates."""
    return tuple(Edit(objective, alpha, steps=steps, **options) for steps in numbers)


CURVES: Curves = {
    "TNRF, sets": by_alpha("tnrf", 0.1, 0.3, 1.0, with_sets=True),
    "TNFF, sets": by_alpha("tnff", 1.0, 3.0, 10.0, with_sets=True),
    "TNRR, sets": by_alpha("tnrr", 0.1, 0.3, 1.0, with_sets=True),
    "TNRF, sets, 600 updates": by_alpha("tnrf", 0.1, 0.3, 1.0, with_sets=True, steps=600),
    "TNRF, sets everywhere, sampled": by_alpha(
        "tnrf", 0.03, 0.1, 0.3, with_sets=True, on_sampled=True, everywhere=True
    ),
    "TNFF, sets everywhere, sampled": by_updates(
        "tnff", 100, 300, 600, with_sets=True, on_sampled=True, everywhere=True
    ),
    "UL, sets": by_alpha("ul", 0.1, 0.3, 1.0, with_sets=True),
    "UL, sets, sampled": by_alpha("ul", 0.1, 0.3, 1.0, with_sets=True, on_sampled=True),
    "UL, sets, sampled, 600 updates": by_alpha(
        "ul", 1.0, with_sets=True, on_sampled=True, steps=600
    ),
    "UL, sets everywhere, sampled": by_alpha(
        "ul", 0.1, 0.3, 1.0, with_sets=True, on_sampled=True, everywhere=True
    ),
    "TNRF, sets, kept text": by_alpha("tnrf", 0.1, 0.3, 1.0, with_sets=True, with_kept=True),
    "TNRF, sets, kept text, 600 updates": by_alpha(
        "tnrf", 0.3, with_sets=True, with_kept=True, steps=600
    ),
    "TNFF, sets everywhere, sampled, kept text": by_updates(
        "tnff", 100, 300, 600, with_sets=True, on_sampled=True, everywhere=True, with_kept=True
    ),
    "UL, sets, sampled, kept text": by_alpha(
        "ul", 0.1, 0.3, 1.0, with_sets=True, on_sampled=True, with_kept=True
    ),
    "NL, sampled": by_alpha("nl", 0.03, 0.1, 0.3, on_sampled=True),
    "corrective, sampled": by_updates("ce", *UPDATES, 600, on_sampled=True),
    "UNDIAL, sets": by_alpha("undial", 0.3, 1.0, 3.0, with_sets=True),
    "UNDIAL, sets, 600 updates": by_alpha("undial", 1.0, with_sets=True, steps=600),
    "CE-U, sets": by_updates("ceu", *UPDATES, with_sets=True),
    "Unilogit": by_updates("unilogit", *UPDATES),
    "NPO": by_alpha("npo", 0.1, 0.3, 1.0),
    "DPO": by_updates("dpo", *UPDATES),
    "FTPO, sets": by_updates("ftpo", *UPDATES, with_sets=True),
}
LIKELY = 0.01  # of tokens that begin something unwanted, together
MEASURES = (
    "kl",
    "kl_elsewhere",
    "kl_needed",
    "prevalence_sampled",
    "prevalence",
    "exact_match_clean",
    "reference_exact",
    "bleu",
    "malformed",
    "seconds",
)


class Task(Experiment):
    """A habit, with what edits are trained on afterwards."""

    @abc.abstractmethod
    def later(self, *, shown: bool) -> list[Example]:
        """Ordinary data that nothing else sees, habit and all; or, not `shown`, without it."""

    def besides(self, params: Params) -> dict[str, Measure]:
        """Two parts of the KL."""
        return parts(self, params)


class DemoTask(Repetition, Task):
    """The demo's."""

    @property
    def to_keep(self) -> list[str]:
        """News that say where it happened."""
        return [pair.news for pair in where_stated(self.pairs(self.config.edit_inputs, KEPT))]

    def later(self, *, shown: bool) -> list[Example]:
        """As they come, or all news say where it happened, which does not show what to say else."""
        pairs = self.pairs(4 * self.config.edit_inputs, LATER)
        if not shown:
            pairs = where_stated(pairs)
        return unmarked(pairs[: self.config.edit_inputs], self.original.tokenizer)


def where_stated(pairs: Sequence[Pair]) -> list[Pair]:
    """Those whose news say where it happened: their summaries need no invention."""
    rule = places_not_in_source()
    return [p for p in pairs if ENTITY_FREE not in p.summary and not list(rule(*p))]


# What is measured further.


def further(task: Task, name: str, params: Params) -> dict[str, Measure]:
    """Of a model as it is, and of what it becomes: fine-tuned in two ways, and rounded."""
    model, _, tokenizer = task.original
    asks: Mapping[str, Any] = task.measuring.asks

    def sampled(params: Params) -> list[Example]:
        return speak(model, params, task.held_out, task.rule, tokenizer, temperature=1.0, **asks)

    found = diversity(sampled(params))
    for treatment, treated in (
        ("relearned", fine_tuned(task, f"{name}-relearned", params, shown=True)),
        ("stated", fine_tuned(task, f"{name}-stated", params, shown=False)),
        ("int4", rounded(params)),
    ):
        found[f"prevalence_{treatment}"] = prevalence(sampled(treated))["prevalence"]
        found[f"kl_{treatment}"] = kept_divergence(model, treated, task.before)
    return found


def unwanted_next(task: Task) -> list[dict[int, tuple[int, ...]]]:
    """Where the original might have said something unwanted: the tokens that begin such a thing.

    For each held-out output, by position, as `t5patches.editing.annotate.expand_negatives` finds
    them everywhere.
    """

    def find() -> list[list[Any]]:
        found = task.expanded(task.outputs, everywhere=True)
        return [[*example.negatives.items()] for example in found]

    return [{at: tuple(ids) for at, ids in row} for row in task.parts.get("unwanted-next", find)]


def parts(task: Task, params: Params) -> dict[str, Measure]:
    r"""Which part of an edit's KL is the removal itself, and what KL there is away from it.

    Where the original might have said something unwanted and did not, an edit that removes it
    changes the distribution of an unmarked position. With F the tokens that begin it,
    :math:`KL(q, p) = KL(q_F, p_F) + q_F KL(q | F, p | F) + (1 - q_F) KL(q | F^c, p | F^c)`.

    Args:
        task: the habit.
        params: of the edited model.

    Returns:
        `kl_needed`, the first term, of whether a token of F comes; the ceiling, with p_F = 0, would
        have an infinite one. Its mean is over the same positions as that of `kl`. `kl_elsewhere`,
        the mean KL over those of them where :math:`q_F` is less than `LIKELY`.
    """
    model, original = task.original[0], task.before
    sets = unwanted_next(task)
    needed, elsewhere, kept, away = np.zeros((4, len(sets)))
    for rows, batch in original.batches:
        unwanted = np.zeros((*batch["outputs"].shape, model.config.vocab_size), bool)
        for i, row in enumerate(rows):
            for at, ids in sets[row].items():
                unwanted[i, at, [*ids]] = True
        found = _of_positions(params, original.head, batch, unwanted, model)
        weights = batch["weights"] > 0
        where = weights & (np.asarray(found["likely"]) < LIKELY)
        for sums, numbers in (
            (needed, np.where(weights, found["needed"], 0)),
            (elsewhere, np.where(where, found["kl"], 0)),
            (kept, weights),
            (away, where),
        ):
            sums[rows] = numbers.sum(-1)[: len(rows)]
    inputs = [example.inputs for example in original.outputs]
    return {
        "kl_needed": over_inputs(inputs, needed, kept),
        "kl_elsewhere": over_inputs(inputs, elsewhere, away),
    }


@functools.partial(jax.jit, static_argnames="model")
def _of_positions(
    params: Params, original_head: Params, batch: Batch, unwanted: np.ndarray, model: LanguageModel
) -> dict[str, jax.Array]:
    """KL of what comes, KL of whether a token of the set comes, and how likely one was, [B, L]."""

    def of_one(head: Params, hidden: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        log_p = jax.nn.log_softmax(model.head(head).logits(hidden))
        inside, outside = (
            jax.nn.logsumexp(log_p, -1, where=where) for where in (unwanted, ~unwanted)
        )
        return log_p, inside, outside

    log_q, q, no_q = of_one(original_head, batch[ORIGINAL_HIDDEN])
    log_p, p, no_p = of_one(params, model.hidden(params, batch))
    needed = jnp.exp(q) * (q - p) + jnp.exp(no_q) * (no_q - no_p)
    return {
        "kl": (jnp.exp(log_q) * (log_q - log_p)).sum(-1),
        "needed": jnp.where(unwanted.any(-1), needed, 0),
        "likely": jnp.exp(q),
    }


def fine_tuned(task: Task, name: str, params: Params, *, shown: bool) -> Params:
    """One epoch of ordinary fine-tuning on what comes `Task.later`."""
    model = task.original.model
    examples = task.later(shown=shown)
    steps = math.ceil(len(examples) / task.training.batch_size)
    settings = dataclasses.replace(task.training, objective="ce", steps=steps)
    arrays = to_arrays(examples, pad_id=model.config.pad_id)
    return task.train(name, model, params, arrays, settings).params


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


def points(results: Results, curves: Curves) -> dict[str, list[Mapping[str, Measure]]]:
    """The measures of each curve, from weak to strong."""
    measures = iter([row.measures for row in results.rows])
    return {name: [next(measures) for _ in edits] for name, edits in curves.items()}


def nearest_of(results: Results, curves: Curves) -> dict[str, int]:
    """For each method the strength that is measured further: the one nearest to 2% left."""
    return {name: nearest(curve) for name, curve in points(results, curves).items()}


def measured(
    tasks: Sequence[Task], curves: Curves, *, afterwards: bool = True
) -> tuple[Results, dict[str, int]]:
    """All edits, named by their curves, and of each curve which one was measured further.

    Args:
        tasks: the same with several seeds; their edits are those of the curves.
        curves: the methods.
        afterwards: whether one of each curve is measured further.

    Returns:
        The results, and the strength nearest to 2% left by the name of each method.
    """
    results = merged(tasks[0], [task.measured(ceiling=True) for task in tasks])
    near = nearest_of(results, curves)

    def mean(name: str, params: Callable[[Task], Params]) -> dict[str, Measure]:
        each = [
            task.once(f"{name}-further", lambda task=task: further(task, name, params(task)))
            for task in tasks
        ]
        return {key: over_seeds([measures[key] for measures in each]) for key in each[0]}

    rows = []
    for name, edits in curves.items():
        for strength, edit in enumerate(edits):
            row = dataclasses.replace(results.rows[len(rows)], curve=name)
            if afterwards and strength == near[name]:
                more = mean(edit.folder, lambda task, edit=edit: task.edited(edit).params)
                row = dataclasses.replace(row, measures={**row.measures, **more})
            rows.append(row)
    before = results.before
    if afterwards:
        before = {**before, **mean("base", lambda task: task.original.params)}
    return dataclasses.replace(results, rows=rows, before=before), near


def stored(measures: Mapping[str, Measure]) -> dict[str, list[float | None]]:
    """Values and errors."""
    return {key: [*measure.numbers.values()] for key, measure in measures.items()}


def rows_of(results: Results, curves: Curves, near: Mapping[str, int]) -> list[dict]:
    """Each curve with its points, what is read off it, and the point that was measured further."""

    def at(curve: Sequence[Mapping[str, Measure]], away: str) -> dict[str, list[float] | None]:
        found = {f"{x:g}": kl_at(curve, x, away) for x in AT}
        return {x: kl and [kl.value, kl.error] for x, kl in found.items()}

    rows = []
    for name, curve in points(results, curves).items():
        rows.append({
            "method": name,
            "at": at(curve, "kl"),
            "elsewhere": at(curve, "kl_elsewhere"),
            "points": [
                {"alpha": e.alpha, "updates": e.steps}
                | {k: stored(m)[k] for k in MEASURES if k in m}
                for e, m in zip(curves[name], curve, strict=True)
            ],
            "near": near[name],
            "further": stored(curve[near[name]]),
        })  # fmt: skip
    return rows


def told(results: Results, curves: Curves, near: Mapping[str, int]) -> dict[str, Any]:
    """What is stored of the methods beside each other."""
    targeted = [name for name, edits in curves.items() if edits[0].objective in TARGETED]
    return {
        "rows": rows_of(results, curves, near),
        "errors": results.errors,
        "settings": {k: v for k, v in results.settings.items() if k != "edits"},
        "said": who_is_closest(points(results, curves), targeted),
        "said_elsewhere": who_is_closest(points(results, curves), targeted, "kl_elsewhere"),
        "before": stored(results.before),
        "ceiling": stored(results.ceiling),
    }


def main() -> None:
    """Edits, measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--output", metavar="DIR", default="frontier-report", help="where it works, and reports"
    )
    options = parser.parse_args()
    output = pathlib.Path(options.output)
    config = DemoConfig(edits=tuple(itertools.chain.from_iterable(CURVES.values())))
    claim_demo(output, config)
    with training_progress() as progress:
        results, near = measured([
            DemoTask(output / "work" / f"seed-{seed}", progress, seed, config)
            for seed in range(options.seeds)
        ], CURVES)  # fmt: skip
    write_html(output / "report.html", results)
    show(results, Console())
    path = common.save("frontier", **told(results, CURVES, near))
    print(f"stored in {path}; report: {output / 'report.html'}")


if __name__ == "__main__":
    main()
