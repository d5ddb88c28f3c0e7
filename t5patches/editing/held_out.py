"""When to stop: what is left of the unwanted, and closeness, on inputs that are not trained on."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t5patches.editing.data import Batch, Example, said_is_pushed_down
from t5patches.model import placement
from t5patches.model.lora import Lora, with_trained
from t5patches.model.protocol import LanguageModel, Params
from t5patches.model.teacher_cache import ORIGINAL_HIDDEN, TeacherCache
from t5patches.model.tokenizer import Message, messages_of
from t5patches.runs import hosts
from t5patches_kernels import Edits, linear_token_statistics, linear_unlikelihood_loss

CHECK_EVERY = 10
"""Updates between two looks at what is held out."""

_SHARE = 0.1
_MOST_INPUTS = 64  # with something marked, and as many without: a look costs what few updates do
_MOST_EXAMPLES = 256
# On the demo's task (TNFF, 64 marked inputs) what is left moves by 0.03 from look to look, and
# three looks without less were followed by a quarter less.
_PATIENCE = 5


def held_out_inputs(examples: Sequence[Example], seed: int) -> list[tuple[Message, ...]]:
    """Chooses what is not trained on: a tenth of the inputs, those with marks and those without.

    By input, and not by example, as several outputs to an input are much alike; nor by prompt, as
    a chat template that holds the date makes several of an input.

    Args:
        examples: all of the data.
        seed: of the choice.

    Returns:
        The inputs as `messages_of` has them, at most 64 with something marked in an output and 64
        without.

    Raises:
        ValueError: fewer than two inputs have something marked.
    """
    by_prompt = sorted(examples, key=lambda example: example.input_ids)
    every = dict.fromkeys(messages_of(example.inputs) for example in by_prompt)
    with_marks = {messages_of(example.inputs) for example in examples if any(example.marked)}
    marked = [inputs for inputs in every if inputs in with_marks]
    clean = [inputs for inputs in every if inputs not in with_marks]
    if len(marked) < 2:
        raise ValueError(
            f"until holds out a part of the inputs that have something marked, and there are "
            f"{len(marked)}: give more data, or leave until out"
        )
    rng, chosen = np.random.default_rng([seed, len(marked), len(clean)]), []
    for inputs, least in ((marked, 1), (clean, 0)):
        count = min(_MOST_INPUTS, max(least, int(_SHARE * len(inputs))))
        chosen += [inputs[i] for i in rng.permutation(len(inputs))[:count]]
    return chosen


def held_out_examples(
    examples: Sequence[Example], inputs: Iterable[tuple[Message, ...]]
) -> list[Example]:
    """The examples to look at.

    Args:
        examples: all of the data.
        inputs: of `held_out_inputs`.

    Returns:
        Those to these inputs, in their order, at most 256: then the first to each input, the
        second, and so on, where those with something marked come first.
    """
    found: dict[tuple[Message, ...], list[int]] = {given: [] for given in inputs}
    # What is left is of what is marked, which may be rare among the outputs to an input.
    for number in sorted(range(len(examples)), key=lambda i: not any(examples[i].marked)):
        given = messages_of(examples[number].inputs)
        if given in found:
            found[given].append(number)
    places = sorted(place for numbers in found.values() for place in enumerate(numbers))
    return [examples[number] for number in sorted(n for _, n in places[:_MOST_EXAMPLES])]


class Look(NamedTuple):
    """What is measured at a time, on what is held out.

    Attributes:
        step: updates made by then.
        left: the model's probability of the set that a pushed-down token names (its own, and its
            negatives), under teacher forcing; the mean over these tokens.
        kl: KL(original, model) in nats, the mean over the kept tokens.
    """

    step: int
    left: float
    kl: float


class Verdict(NamedTuple):
    """What follows from the looks so far.

    Attributes:
        best: the number of the best of them.
        why: "reached" or "closeness" where training is to stop; None where it goes on.
    """

    best: int
    why: str | None


def verdict(looks: Sequence[Look], until: float) -> Verdict:
    """Says whether to stop, and which state to keep.

    The best state is the one with least left. Training stops as soon as that is `until` or less;
    or when closeness turns: for five looks there has been no less left, and the model was farther
    from the original in all of them than in the best. More updates then cost and bring nothing.

    What is left is no prevalence: it is of places where the original has said it already. Of both,
    as shares of what they were, the prevalence of sampled outputs falls faster: on the demo's task
    to 18, 12 and 6% where 22, 17 and 13% are left.

    Args:
        looks: the first one from before any update.
        until: how much may be left.

    Returns:
        The verdict.

    Example:
        >>> looks = [Look(0, 0.5, 0.0), Look(10, 0.2, 0.1), Look(20, 0.25, 0.2)]
        >>> verdict(looks, 0.1)
        Verdict(best=1, why=None)
        >>> verdict([*looks, *(Look(step, 0.3, 0.3) for step in (30, 40, 50, 60))], 0.1)
        Verdict(best=1, why='closeness')
        >>> verdict([*looks, Look(30, 0.05, 0.3)], 0.1)
        Verdict(best=3, why='reached')
    """
    best = min(range(len(looks)), key=lambda i: looks[i].left)
    if looks[best].left <= until:
        return Verdict(best, "reached")
    since = looks[best + 1 :][-_PATIENCE:]
    turned = len(since) == _PATIENCE and all(look.kl > looks[best].kl for look in since)
    return Verdict(best, "closeness" if turned else None)


class HeldOut:
    """The looks of a run at what is held out, and the best state so far."""

    def __init__(
        self,
        model: LanguageModel,
        arrays: Batch,
        teacher: TeacherCache,
        *,
        until: float,
        batch_size: int,
        lora: Lora | None = None,
        implementation: str | None = None,
        mesh: Mesh | None = None,
    ):
        """Takes what is held out; nothing is measured yet.

        Args:
            model: the network.
            arrays: of `t5patches.editing.data.to_arrays`, with the sets that the data names.
            teacher: the original's states on them.
            until: see `verdict`.
            batch_size: examples at a time.
            lora: what is trained, where that is an adapter.
            implementation: of the losses.
            mesh: of the devices; None for one.
        """
        # What is trained and looked at never drops.
        model = model.replace(dropout_rate=0.0)
        self._sums = functools.partial(_sums, model=model, lora=lora, implementation=implementation)
        self._arrays, self._teacher, self._mesh = arrays, teacher, mesh
        self._until, self._batch_size = until, batch_size
        self.looks: list[Look] = []
        self.best: Params | None = None

    @property
    def why(self) -> str | None:
        """Why training stops here; None where it does not."""
        return verdict(self.looks, self._until).why if self.looks else None

    def look(self, step: int, trained: Params, base: Params | None, original: Params) -> None:
        """Measures a state, and keeps it where it is the best.

        Args:
            step: updates made.
            trained: parameters of the model, or of its adapter.
            base: of the model beneath an adapter.
            original: of the original, of which the head counts.

        Raises:
            FloatingPointError: what is left is no number.
        """
        totals = np.zeros(4)
        with placement.over(self._mesh):
            for batch in self._batches():
                totals += np.asarray(self._sums(trained, base, original, batch), np.float64)
        left, pushed, kl, kept = totals
        if not np.isfinite(left / pushed):  # it compares with no other look
            raise FloatingPointError(
                f"after {step} updates {left / pushed} is left on inputs held out: lower "
                "learning_rate or alpha, and check that all token ids are in the vocabulary"
            )
        self.looks.append(Look(step, float(left / pushed), float(kl / max(kept, 1))))
        if verdict(self.looks, self._until).best == len(self.looks) - 1:
            self.best = jax.device_get(trained)

    def restored(self, looks: Sequence[Sequence[float]], best: Params) -> None:
        """Goes on from what a checkpoint holds.

        Args:
            looks: made by then.
            best: the state kept by then.
        """
        self.looks = [Look(int(step), left, kl) for step, left, kl in looks]
        self.best = jax.device_get(best)

    def _batches(self) -> Iterator[Mapping[str, Any]]:
        count = len(self._arrays["inputs"])
        for start in range(0, count, self._batch_size):
            # The last batch is filled up from the first rows, which do not count again.
            rows = np.arange(start, start + self._batch_size)
            batch: dict[str, Any] = {name: x[rows % count] for name, x in self._arrays.items()}
            batch[ORIGINAL_HIDDEN] = self._teacher.read(batch)
            batch["weights"] = np.where(rows[:, None] < count, batch["weights"], np.float32(0))
            if self._mesh is not None:
                split = placement.batch_sharding(self._mesh)
                batch = {name: hosts.place(x, split) for name, x in batch.items()}
            yield batch


@functools.partial(jax.jit, static_argnames=("model", "lora", "implementation"))
def _sums(
    trained: Params,
    base: Params | None,
    original: Params,
    batch: Mapping[str, Any],
    *,
    model: LanguageModel,
    lora: Lora | None,
    implementation: str | None,
) -> jax.Array:
    """Of a batch: what is left and over how many tokens, the divergence and over how many."""
    params = with_trained(base, trained, lora)
    hidden, head = model.hidden(params, batch), model.head(params)
    targets, weights = batch["outputs"], batch["weights"]
    how: dict[str, Any] = {**head.loss_options(), "implementation": implementation}
    edits = Edits(batch["edit_ids"], batch["edit_factors"]) if "edit_ids" in batch else None
    unlikelihood = linear_unlikelihood_loss(
        hidden, head.kernel, targets, weights, alpha=1.0, edits=edits, **how
    ).loss
    kl: Any = linear_token_statistics(
        batch[ORIGINAL_HIDDEN].astype(hidden.dtype),
        model.head(original).kernel,
        targets,
        hidden,
        head.kernel,
        **how,
    ).kl
    pushed, kept = said_is_pushed_down(batch), weights > 0
    # It is -log(1 - p[N]), right to the last digit where p[N] is near 1.
    left = jnp.where(pushed, -jnp.expm1(-unlikelihood), 0.0)
    parts = (left, pushed, jnp.where(kept, kl, 0.0), kept)
    return jnp.stack([x.sum(dtype=jnp.float32) for x in parts])
