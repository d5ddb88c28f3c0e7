r"""A reward model: a scalar head on a language model, trained on pairs of which one is preferred.

The reward of an output is :math:`r = w \cdot h`, where h is the last hidden state that has read the
input and the whole output: the one that predicts its end token. Training lowers the mean of

.. math:: -\log \sigma(r_\mathrm{chosen} - r_\mathrm{rejected})

over pairs, so only differences between outputs to the same input mean something. w starts at zero,
with an adapter on the layers below it.

A model of this kind is a folder like any other, with `reward.json` in it: what was done, how well
it tells the pairs apart that it was not trained on, and w. It scores texts, which it splits with
its own tokenizer: those of a model with another one as well.

Stiennon et al., "Learning to summarize from human feedback", 2020, arXiv:2009.01325; Ouyang et al.,
"Training language models to follow instructions with human feedback", 2022, arXiv:2203.02155.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

from t5patches.editing.batches import example_batches
from t5patches.editing.data import (
    Batch,
    Example,
    batch_indices,
    fields_of,
    inputs_of,
    make_example,
    names_of,
    pad_rows,
    read_lines,
    text_of,
    with_end,
)
from t5patches.editing.outputs import REWARD_RECORD
from t5patches.editing.programs import (
    BELOW,
    MAY_DIFFER,
    WEIGHT,
    Rows,
    State,
    batch_shapes,
    begun,
    on_first_device,
    require_ranges,
    rows_of,
    state_shapes,
    updated,
    with_head,
)
from t5patches.editing.rules import load_callable
from t5patches.editing.scores import Scorer, try_out
from t5patches.editing.states import History, States
from t5patches.model.batches import round_up
from t5patches.model.folder import load_model
from t5patches.model.lora import Lora, weights_fingerprint, with_trained
from t5patches.model.memory import compiled, give_back
from t5patches.model.protocol import LanguageModel, Params, as_texts, require_positions
from t5patches.model.tokenizer import Inputs, Tokenizer
from t5patches.runs.claims import claim
from t5patches.runs.files import read_regular, require_own_file
from t5patches.runs.fingerprints import file_fingerprint, fingerprint, json_fingerprint
from t5patches_kernels import pairwise_reward_loss

BENEATH = "weights"  # in the record: the fingerprint of the model that the head was trained on


class Pair(NamedTuple):
    """Two outputs to an input, of which one is preferred."""

    chosen: Example
    rejected: Example


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """How to train a reward model.

    Attributes:
        epochs: times that each pair is learnt from; more than one tends to learn them by heart.
        batch_size: pairs in an update.
        learning_rate: of Adam, constant.
        held_out: the share of the pairs that is not trained on, by whole inputs; 0 for none.
        lora: trains an adapter below the head; None trains all parameters.
        seed: of which pairs are held out, of the others' order, and of the adapter.
        checkpoint_every: updates between two states to go on from.
    """

    epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 3e-4
    held_out: float = 0.1
    lora: Lora | None = Lora(8)  # noqa: RUF009 (it is frozen)
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        """Refuses settings that cannot be trained with."""
        least = dict.fromkeys(("epochs", "batch_size", "checkpoint_every"), 1)
        require_ranges(self, least, above_0=("learning_rate",))
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}: a share from 0 to below 1 is needed")

    def steps(self, pairs: int) -> int:
        """How many updates there are.

        Args:
            pairs: to train on.

        Returns:
            The number.
        """
        return math.ceil(self.epochs * pairs / self.batch_size)


# --- Pairs ----------------------------------------------------------------------------------------


def read_pairs(path: str | os.PathLike[str], tokenizer: Tokenizer) -> list[Pair]:
    """Reads preferences.

    Args:
        path: a file with {"inputs": "...", "chosen": "...", "rejected": "..."} a line; `messages`
            may stand for `inputs`, and one of the outputs may be empty.
        tokenizer: the model's.

    Returns:
        The pairs in the order of the file.

    Raises:
        ValueError: some lines are bad, ties among them (the first are named, by number and
            reason), or there are none.
    """

    def parse(line: str) -> Pair:
        fields = fields_of(line)
        if names_of(fields) != {"inputs", "chosen", "rejected"}:
            raise ValueError(
                f"got the fields {sorted(names_of(fields))}; needed are 'inputs' (or 'messages'), "
                "'chosen' and 'rejected'; other things go under 'meta'"
            )
        inputs = inputs_of(fields)
        texts = [text_of(fields, name, may_be_empty=True) for name in ("chosen", "rejected")]
        pair = Pair(*(whole_output(inputs, text, tokenizer) for text in texts))
        if pair.chosen.output_ids == pair.rejected.output_ids:
            raise ValueError(
                "'chosen' and 'rejected' are the same to the model: a tie prefers nothing; leave "
                "the line out"
            )
        return pair

    return read_lines(path, parse, "preferences: write one JSON object a line")


def whole_output(inputs: Inputs, text: str, tokenizer: Tokenizer) -> Example:
    """An output as a reward model reads it: with its end token, whether it was said or not.

    Args:
        inputs: that it answers.
        text: the output.
        tokenizer: the reward model's.

    Returns:
        An example with nothing marked.
    """
    return make_example(inputs, with_end(tokenizer.encode(text), tokenizer), [], tokenizer)


def repeats(pairs: Sequence[Pair]) -> tuple[int, int]:
    """Counts what pairs say more than once, or both ways.

    Args:
        pairs: preferences.

    Returns:
        How many of them repeat another one, and how many are also there the other way round: these
        cancel one another.
    """
    said = collections.Counter(
        (pair.chosen.input_ids, pair.chosen.output_ids, pair.rejected.output_ids) for pair in pairs
    )
    both = sum(n for (x, a, b), n in said.items() if (x, b, a) in said)
    return len(pairs) - len(said), both


def split(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Holds out pairs, all of an input or none: so a repeated one is not on both sides.

    Args:
        pairs: preferences.
        share: of the pairs, about; at least those of one input where it is above 0.
        seed: of the choice.

    Returns:
        The pairs to train on, and those held out.

    Raises:
        ValueError: nothing is left to train on.
    """
    by_input: dict[tuple[int, ...], list[Pair]] = {}
    for pair in pairs:
        by_input.setdefault(pair.chosen.input_ids, []).append(pair)
    groups = list(by_input.values())
    held: list[Pair] = []
    order = np.random.default_rng(seed).permutation(len(groups))
    count = 0
    while len(held) < share * len(pairs):
        held += groups[order[count]]
        count += 1
    if count == len(groups):
        raise ValueError(
            f"{len(pairs)} pairs are of {len(groups)} input{'s' * (len(groups) > 1)}, and with "
            f"{share:g} of them held out none are left to train on: give pairs of more inputs, or "
            "hold out fewer (--held-out)"
        )
    return [pair for i in order[count:] for pair in groups[i]], held


def pair_arrays(pairs: Sequence[Pair], pad_id: int) -> Batch:
    """Pads pairs to arrays.

    Args:
        pairs: N of them.
        pad_id: the model's; fills the ends.

    Returns:
        `inputs` [N, S], `chosen` and `rejected` [N, L], and `ends` [N, 2]: the place of the end
        token in each of the two; all int32.
    """
    longest = max(len(example.output_ids) for pair in pairs for example in pair)
    chosen, rejected = (
        pad_rows([pair[i].output_ids for pair in pairs], pad_id, longest) for i in (0, 1)
    )
    ends = [[len(example.output_ids) - 1 for example in pair] for pair in pairs]
    return {
        "inputs": pad_rows([pair.chosen.input_ids for pair in pairs], pad_id),
        "chosen": chosen,
        "rejected": rejected,
        "ends": np.array(ends, np.int32),
    }


# --- Training -------------------------------------------------------------------------------------


class How(NamedTuple):
    """What an update is compiled for, beside shapes."""

    learning_rate: float
    lora: Lora | None

    def shapes(self, model: LanguageModel) -> tuple[State, Params]:
        """What is trained with its optimizer, and what it starts from, as shapes."""
        state = state_shapes(with_head(model, self.lora), self.optimizer)
        return state, on_first_device(dict(model.param_shapes()))

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """What trains it."""
        return optax.adam(self.learning_rate)


class Trained(NamedTuple):
    """What training made.

    Attributes:
        params: `weight` [D], and `below` it the adapter's parameters, or all.
        history: for every update `loss` (mean over its pairs) and `accuracy` (the share of them
            whose chosen output had the higher reward, before the update).
    """

    params: dict[str, Any]
    history: History


def train_reward(
    model: LanguageModel,
    params: Params,
    pairs: Batch,
    settings: RewardSettings,
    directory: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> Trained:
    """Trains a head and what is below it, from the start or from where the same run was killed.

    Args:
        model: the network; it does not drop.
        params: where to start from; not changed.
        pairs: of `pair_arrays`.
        settings: how to train.
        directory: where the run lives; made if absent.
        progress: shows the run, see `t5patches.editing.train.training_progress`; None shows
            nothing.

    Returns:
        The new parameters, and the history of the run.

    Raises:
        ValueError: the directory holds another run.
        FloatingPointError: the loss stops being a number; no checkpoint holds what came of it.
    """
    model, how = model.replace(dropout_rate=0.0), How(settings.learning_rate, settings.lora)
    base = jax.device_put(dict(params), jax.devices()[0])
    count = len(pairs["inputs"])
    steps = settings.steps(count)
    claim(directory, _describe(model, base, pairs, settings), may_differ=MAY_DIFFER)
    like = how.shapes(model)[0]
    with States(directory) as states:
        first, history = states.latest, History()
        if first:
            found = states.restore(like._asdict(), "history")
            state, history = State(found["params"], found["optimizer"]), found["history"]
        else:
            trained = begun(model, base, settings.lora, settings.seed, like.params)
            state = State(trained, jax.jit(how.optimizer.init)(trained))
        task = (
            progress.add_task("reward", total=steps, completed=first, note="compiling")
            if progress
            else None
        )
        give_back()
        for step in range(first, steps):
            batch = _batch(pairs, batch_indices(count, settings.batch_size, step, settings.seed))
            state, metrics = compiled_update(model, how, rows_of(batch))(state, base, batch)
            for name, value in metrics.items():
                history.setdefault(name, []).append(float(value))
            if not math.isfinite(history["loss"][-1]):
                raise FloatingPointError(
                    f"the loss is {history['loss'][-1]} at step {step}: lower the learning rate"
                )
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == steps:
                states.save(step + 1, state._asdict(), {"history": history})
            if progress is not None and task is not None:
                recent = {name: np.mean(values[-20:]) for name, values in history.items()}
                note = f"loss {recent['loss']:.4f}, accuracy {100 * recent['accuracy']:.0f}%"
                progress.update(task, completed=step + 1, note=note)
    return Trained(state.params, history)


def rewards(
    weight: jax.Array,
    params: Params,
    inputs: jax.Array,
    outputs: jax.Array,
    ends: jax.Array,
    *,
    model: LanguageModel,
) -> jax.Array:
    """Rewards of outputs, see the module.

    Args:
        weight: [D], of the head.
        params: of the model below it.
        inputs: [B, S], the prompts.
        outputs: [B, L], or [B, K, L] where each prompt has several.
        ends: [B] or [B, K], the place of the end token in each.
        model: the network.

    Returns:
        [B] or [B, K] float32.
    """
    hidden = model.hidden(params, {"inputs": inputs, "outputs": outputs})
    last = jnp.take_along_axis(hidden, ends[..., None, None], axis=-2)[..., 0, :]
    return last.astype(jnp.float32) @ weight


def pair_loss(
    trained: Params, base: Params, batch: Mapping[str, jax.Array], *, model: LanguageModel, how: How
) -> tuple[jax.Array, jax.Array]:
    """The loss of an update.

    Args:
        trained: `weight` and `below`.
        base: parameters that it was started from.
        batch: of `pair_arrays`.
        model: the network.
        how: see `How`.

    Returns:
        The mean loss, and the share of pairs that the rewards order as they should.
    """
    found = rewards(
        trained[WEIGHT],
        with_trained(base, trained[BELOW], how.lora),
        batch["inputs"],
        jnp.stack([batch["chosen"], batch["rejected"]], axis=1),
        batch["ends"],
        model=model,
    )
    chosen, rejected = found[:, 0], found[:, 1]
    right = jnp.mean(chosen > rejected, dtype=jnp.float32)
    return pairwise_reward_loss(chosen, rejected).mean(), right


def update(
    state: State,
    base: Params,
    batch: Mapping[str, jax.Array],
    *,
    model: LanguageModel,
    how: How,
) -> tuple[State, dict[str, jax.Array]]:
    """The arithmetic of an update.

    Args:
        state: before.
        base: see `pair_loss`, and so are the other arguments.
        batch: see there.
        model: the network.
        how: see `How`.

    Returns:
        The state after, and what goes into the history.
    """

    def loss_of(trained: Params) -> tuple[jax.Array, jax.Array]:
        return pair_loss(trained, base, batch, model=model, how=how)

    state, loss, right = updated(loss_of, state, how.optimizer)
    return state, {"loss": loss, "accuracy": right}


@functools.lru_cache(maxsize=32)
def compiled_update(model: LanguageModel, how: How, rows: Rows) -> Any:
    """`update`, compiled for a batch.

    Args:
        model: the network.
        how: see `How`.
        rows: of the batch.

    Returns:
        The program; it says what memory it takes.
    """
    program = jax.jit(functools.partial(update, model=model, how=how), donate_argnums=0)
    return compiled(program.lower(*how.shapes(model), batch_shapes(rows)))


def _batch(pairs: Batch, rows: np.ndarray) -> Batch:
    """Rows of the pairs, as long as they need, in few lengths."""
    batch = {name: x[rows] for name, x in pairs.items()}
    length = round_up(int(batch["ends"].max()) + 1, pairs["chosen"].shape[1])
    return batch | {name: batch[name][:, :length] for name in ("chosen", "rejected")}


def _describe(
    model: LanguageModel, base: Params, pairs: Batch, settings: RewardSettings
) -> dict[str, Any]:
    return {
        "settings": dataclasses.asdict(settings),
        "model": as_texts(model.config),
        "params": fingerprint(base),
        "pairs": fingerprint(pairs),
    }


# --- Scoring --------------------------------------------------------------------------------------


class Reward:
    """A reward model as a scorer, see `t5patches.editing.scores`."""

    def __init__(self, folder: str | os.PathLike[str], *, batch_size: int = 32):
        """Reads a folder that `t5patches reward` has made.

        Args:
            folder: of the reward model.
            batch_size: outputs read at a time.

        Raises:
            ValueError: it is none, or cannot be read.
        """
        weight, chat = _read_head(Path(folder))
        model, params, self._tokenizer = load_model(folder, chat=chat)
        self._model = model.replace(dropout_rate=0.0)
        if weight.shape != (model.config.emb_dim,) or not np.isfinite(weight).all():
            raise ValueError(
                f"{Path(folder) / REWARD_RECORD}: {model.config.emb_dim} finite numbers are needed "
                f"as the weight of the head, got {weight.size}: it is of another model"
            )
        self._folder, self._batch_size = folder, batch_size
        self._weight, self._params = jax.device_put((weight, dict(params)), jax.devices()[0])

    def __call__(self, outputs: Sequence[str], inputs: Sequence[Inputs]) -> np.ndarray:
        """Rewards of outputs.

        Args:
            outputs: N texts. One that has more tokens to this model than it has positions, as
                another model's tokens may be longer, is read as far as these go, with a warning.
            inputs: that each answers.

        Returns:
            [N] float32.

        Raises:
            ValueError: an input is longer than the model's positions.
        """
        pairs = zip(inputs, outputs, strict=True)
        whole = [whole_output(text, output, self._tokenizer) for text, output in pairs]
        examples = [self._as_far_as_it_can(example) for example in whole]
        lengths = np.array([(len(e.input_ids), len(e.output_ids)) for e in examples])
        require_positions(self._model.config, *lengths.T)
        if examples != whole:
            warnings.warn(
                f"some outputs have more tokens to the reward model in {self._folder} than it has "
                f"positions ({self._model.config.max_positions}): they are scored without their "
                "last words",
                stacklevel=2,
            )
        found = np.zeros(len(examples), np.float32)
        pad_id = self._model.config.pad_id
        for rows, batch in example_batches(examples, self._batch_size, pad_id):
            ends = np.asarray(batch["weights"].sum(1), np.int32) - 1
            given = (self._weight, self._params, batch["inputs"], batch["outputs"], ends)
            found[rows] = np.asarray(_rewards(*given, model=self._model))[: len(rows)]
        return found

    def _as_far_as_it_can(self, example: Example) -> Example:
        """An output that this model has positions for."""
        positions = self._model.config.max_positions
        if positions is None:
            return example
        # Of the last token the state before it is read: it needs no position of its own.
        room = max(1, positions - len(example.input_ids) + 1)
        ids, marked = example.output_ids[:room], example.marked[:room]
        return dataclasses.replace(example, output_ids=ids, marked=marked)

    def require_inputs(self, inputs: Sequence[Inputs], max_length: int) -> None:
        """Refuses inputs that this model cannot be given, before outputs to them are made.

        Args:
            inputs: all there are.
            max_length: tokens that an output to them may have, as if this model counted them.

        Raises:
            ValueError: one cannot be put into this model's template, or it and an output are
                longer than its positions.
        """
        for number, text in enumerate(inputs, start=1):
            try:
                length = len(self._tokenizer.encode_prompt(text))
                # An output that was cut off is given an end token too.
                require_positions(self._model.config, np.array([length]), max_length + 1)
            except ValueError as error:
                raise ValueError(
                    f"the reward model in {self._folder} cannot be given input {number}: {error}"
                ) from error


def load_scorer(
    function: str | None,
    reward: str | os.PathLike[str] | None,
    inputs: Sequence[Inputs],
    max_length: int,
) -> Scorer:
    """A scorer of either kind, tried on a sample.

    Args:
        function: "module:function", see `t5patches.editing.scores`.
        reward: the folder of a reward model.
        inputs: that outputs will answer.
        max_length: tokens that these may have.

    Returns:
        The scorer.

    Raises:
        ValueError: both or none are given; it cannot be found or read, fails on a sample, or
            cannot be given these inputs.
    """
    if (function is None) == (reward is None):
        raise ValueError("one scorer is needed: a function (--scorer) or a reward model (--reward)")
    if function is not None:
        scorer: Scorer = load_callable(function)
        try_out(scorer, f"--scorer {function}")
        return scorer
    model = Reward(reward or "")
    model.require_inputs(inputs, max_length)
    try_out(model, f"--reward {os.fspath(reward or '')}")
    return model


def reward_fingerprint(folder: str | os.PathLike[str]) -> str:
    """What tells two reward models apart.

    Args:
        folder: of one.

    Returns:
        64 hexadecimal digits, of its weights and its head.

    Raises:
        ValueError: it is none.
    """
    _read_head(Path(folder))
    return json_fingerprint(
        [weights_fingerprint(folder), file_fingerprint(Path(folder) / REWARD_RECORD)]
    )


_rewards = jax.jit(rewards, static_argnames="model")


def _read_head(folder: Path) -> tuple[np.ndarray, str]:
    """The weight, and whether the model was given inputs in its chat template."""
    path = folder / REWARD_RECORD
    if not path.is_file():
        raise ValueError(
            f"{folder} is no reward model, as it has no {REWARD_RECORD}: make one with `t5patches "
            "reward`"
        )
    try:
        require_own_file(path)
        found = json.loads(read_regular(path))
        chat = {None: "auto", True: "on", False: "off"}[found["job"]["chat"]]
        weight, of = np.array(found[WEIGHT], np.float32).reshape(-1), found[BENEATH]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    # What edits or aligns a folder copies such files of it: its head would score nonsense.
    if of != weights_fingerprint(folder):
        raise ValueError(
            f"{folder} is no reward model, though {REWARD_RECORD} is in it: the head there was "
            "trained on other weights, and the model has been changed since"
        )
    return weight, chat


def record_text(record: Mapping[str, Any], weight: np.ndarray, beneath: str) -> str:
    """What `reward.json` holds.

    Args:
        record: what was done.
        weight: [D], of the head.
        beneath: `t5patches.model.lora.weights_fingerprint` of the folder that it lies in.

    Returns:
        A JSON object; float32 numbers survive it.
    """
    head = {BENEATH: beneath, WEIGHT: np.asarray(weight, np.float64).tolist()}
    return json.dumps({**record, **head}, indent=1)
