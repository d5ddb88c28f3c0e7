r"""The exact KL of `t5patches align` beside its estimates from the sampled token alone.

    python -m bench.kl_estimates                # five seeds; a killed run goes on with --keep DIR

The demo's tiny T5 is trained towards summaries that name no place which the news does not, in the
loop of `t5patches align`, all settings the same but for the divergence in the loss:

* ``exact``: of whole rows, as `align` has it;
* ``k1 in the reward``: ``log p[y] - log q[y]`` taken off the token's advantage, as PPO for
  language models has it. Its gradient is right on average;
* ``k3``: ``q[y] / p[y] - 1 - log(q[y] / p[y])`` in the loss, as GRPO has it. On average its
  gradient is that of KL(q, p), the other way round;
* ``k1``: ``log p[y] - log q[y]`` in the loss. On average its gradient is 0.

The gradient's variance is taken at the state that the exact one reaches, over batches sampled there
anew, each given to all four.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.table import Table

import t5patches_kernels as tk
from bench import common
from t5patches.editing import policy
from t5patches.editing.annotate import find_spans
from t5patches.editing.demo import DemoConfig, prepare_demo
from t5patches.editing.demo_task import places_not_in_source, well_formed
from t5patches.editing.evaluate import ratio
from t5patches.editing.policy import PolicySettings, group_advantages
from t5patches.editing.programs import State
from t5patches.editing.scores import score
from t5patches.model.folder import LoadedModel, load_model
from t5patches.model.lora import Lora

KINDS = ("exact", "k1 in the reward", "k3", "k1")
BATCHES = 32
# Not 4: there all outputs to each of the first step's inputs score alike, which `align` refuses.
SEEDS = (0, 1, 2, 3, 5)
SETTINGS = PolicySettings(
    steps=16,
    inputs_per_step=4,
    samples=8,
    max_length=20,
    update_size=32,
    learning_rate=1e-2,
    kl_coefficient=1.0,
    lora=Lora(8),
    most_kl=1e9,
    most_length_change=1e9,
    checkpoint_every=1000,
)


def clean(outputs: Sequence[str], inputs: Sequence[str]) -> list[float]:
    """1 for a well-formed summary that names no place of its own, 0 for any other."""
    rule = places_not_in_source()
    pairs = zip(inputs, outputs, strict=True)
    return [float(well_formed(said) and not find_spans(rule, news, said)) for news, said in pairs]


def settings_of(kind: str, seed: int = 0) -> PolicySettings:
    """The settings, but for one that counts nothing here: each kind has programs of its own."""
    return dataclasses.replace(SETTINGS, seed=seed, pretraining_weight=1 + KINDS.index(kind))


@contextlib.contextmanager
def measured_by(kind: str) -> Iterator[None]:
    """Has the loop's loss, where it is compiled, measure the divergence in another way."""

    def loss(*given: Any, kl_coefficient: float, **options: Any) -> tk.PolicyLoss:
        if kind != "k1 in the reward":
            return tk.linear_policy_gradient_loss(
                *given, kl=kind, kl_coefficient=kl_coefficient, **options
            )
        found, weights = tk.linear_policy_gradient_loss(*given, kl="k1", **options), given[5]
        paid = kl_coefficient * jax.lax.stop_gradient(found.kl) * found.ratio
        return found._replace(loss=found.loss + weights * paid)

    with mock.patch.object(policy, "linear_policy_gradient_loss", loss):
        yield


@functools.partial(jax.jit, static_argnames=("model", "how"))
def gradient(trained: Any, base: Any, batch: dict, *, model: Any, how: policy.How) -> jax.Array:
    """The gradient of an update's loss, as a vector."""
    loss_of = functools.partial(policy.policy_loss, model=model, how=how)
    found, _ = jax.grad(loss_of, has_aux=True)(trained, base, batch, {}, np.float32(0))
    return ravel_pytree(found)[0]


def gradients(base: LoadedModel, trained: Any, batches: Sequence[dict]) -> dict[str, np.ndarray]:
    """By kind, the gradients of the divergence in an update's loss, ``[batches, parameters]``.

    That of the rest, which is the same for all kinds, is called `rest`.
    """
    found = {}
    for kind in (*KINDS, "rest"):
        how = policy.How.of(settings_of("exact" if kind == "rest" else kind))
        if kind == "rest":
            how, given = how._replace(kl_coefficient=0.0), batches
        else:
            given = [batch | {"advantages": 0 * batch["advantages"]} for batch in batches]
        with measured_by("exact" if kind == "rest" else kind):
            found[kind] = np.array(
                [gradient(trained, base.params, x, model=base.model, how=how) for x in given]
            )
    return found


def of_gradients(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Of gradients ``[batches, parameters]``, and of those by the exact divergence.

    The variance is summed over parameters and in units of the squared length of the exact mean;
    the share is how much of the exact mean is in the mean.
    """
    unit = exact.mean(0)
    square = float(unit @ unit)
    return {
        "variance": float(found.var(0, ddof=1).sum()) / square,
        "share": float(found.mean(0) @ unit) / square,
    }


def one_seed(base: LoadedModel, inputs: Sequence[str], seed: int, keep: pathlib.Path) -> list[dict]:
    """Trains by each kind, and measures gradients where the exact one ends."""
    rows: list[dict[str, Any]] = []
    reached = {}
    for kind in KINDS:
        directory = keep / f"{kind.replace(' ', '-')}-{seed}"
        with measured_by(kind):
            found = policy.align(*base, inputs, clean, settings_of(kind, seed), directory)
        reached[kind] = found.params
        last = {name: float(np.mean(found.history[name][-5:])) for name in ("kl", "score")}
        rows.append({"kind": kind, "seed": seed, "first": found.history["score"][0], **last})
        print(rows[-1], flush=True)
    settings = settings_of("exact", seed)
    run = policy.Run(*base, inputs, settings, None, None)
    state, batches = State(reached["exact"], None), []
    while len(batches) < BATCHES:
        sampled = run.sample(state, settings.steps + 1 + len(batches))  # inputs of its own each
        scores = np.reshape(score(clean, sampled.texts, sampled.inputs), (-1, settings.samples))
        batches.append(sampled.arrays | {"advantages": group_advantages(scores)[..., None]})
    by_kind = gradients(base, state.params, batches)
    exact, rest = by_kind["exact"], by_kind["rest"]
    for row, kind in zip(rows, KINDS, strict=True):
        row["divergence"] = of_gradients(by_kind[kind], exact)
        row["all"] = of_gradients(by_kind[kind] + rest, exact + rest)
    return rows


def summary(rows: Sequence[dict], kind: str) -> dict[str, tuple[float, float]]:
    """The mean of each number over seeds, and its standard error."""
    of = [row for row in rows if row["kind"] == kind]
    numbers = {name: [row[name] for row in of] for name in ("kl", "score")}
    for part in ("divergence", "all"):
        for name in ("variance", "share"):
            numbers[f"{part} {name}"] = [row[part][name] for row in of]
    means = {name: ratio(x) for name, x in numbers.items()}
    return {name: (m.value, m.error if len(of) > 1 else 0.0) for name, m in means.items()}


def main() -> None:
    """Trains, measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument(
        "--keep", metavar="DIR", help="where to work; default: where all is removed"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as passing:
        keep = pathlib.Path(options.keep or passing)
        prepare_demo(DemoConfig(), keep / "demo")
        base = load_model(keep / "demo" / "model")
        base = base._replace(params=jax.device_put(base.params, jax.devices()[0]))
        inputs = (keep / "demo" / "inputs.txt").read_text().splitlines()
        rows = [row for seed in options.seeds for row in one_seed(base, inputs, seed, keep)]
    settings = dataclasses.asdict(SETTINGS) | {"batches": BATCHES}
    path = common.save("kl-estimates", rows, settings=settings, seeds=len(options.seeds))
    table = Table(title=f"{len(options.seeds)} seeds: mean and standard error")
    for name in ("", *summary(rows, "exact")):
        table.add_column(name, justify="right")
    for kind in KINDS:
        cells = (f"{mean:.4g} ± {error:.2g}" for mean, error in summary(rows, kind).values())
        table.add_row(kind, *cells)
    Console(width=180).print(table)
    print(f"stored in {path}")


if __name__ == "__main__":
    main()
