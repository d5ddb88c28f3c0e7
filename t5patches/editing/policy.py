r"""Training towards a score of whole outputs: sample, score, update, near the original model.

A step gives some inputs to the model as it is now, samples several outputs to each and has them
scored. An output's advantage is by how much its score is above those of the other outputs to the
same input,

.. math:: A_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r) + 10^{-4}}

(GRPO; no value head), or each of its tokens has one of its own, by a value head (PPO, see
`t5patches.editing.values`; over a step's tokens they are brought to mean 0 and variance 1). Updates
then raise the probability of tokens with a positive advantage and lower that of the others, by
PPO's clipped loss with the exact divergence from the original, averaged over tokens:

.. math:: \frac{1}{\sum_t w_t} \sum_t w_t
    \left[-\min(\rho_t A, \mathrm{clip}(\rho_t) A) + \beta\, KL(p_t, q_t)\right]

Everything is said of the distributions that are sampled from: at a temperature, both models' logits
are divided by it. Tokens count up to and with the end token.

Shao et al., "DeepSeekMath", 2024, arXiv:2402.03300 (GRPO); Schulman et al., "Proximal Policy
Optimization Algorithms", 2017, arXiv:1707.06347; Ziegler et al., "Fine-Tuning Language Models from
Human Preferences", 2019, arXiv:1909.08593 (the coefficient that keeps to a target); Ouyang et al.,
"Training language models to follow instructions with human feedback", 2022, arXiv:2203.02155
(likelihood of other text beside it).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

from t5patches.editing.annotate import until_end
from t5patches.editing.data import Batch, batch_indices, pad_rows
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
from t5patches.editing.scores import Scorer, ScorerError, score
from t5patches.editing.states import History, States
from t5patches.editing.values import (
    ValueHead,
    explained_variance,
    generalized_advantages,
    value_loss,
    whitened,
)
from t5patches.model.batches import round_up
from t5patches.model.generate import generate
from t5patches.model.lora import Lora, with_trained
from t5patches.model.memory import compiled, give_back
from t5patches.model.protocol import LanguageModel, OutputHead, Params, as_texts
from t5patches.model.teacher_cache import ORIGINAL_HIDDEN
from t5patches.model.tokenizer import Inputs, Tokenizer
from t5patches.runs.claims import claim
from t5patches.runs.fingerprints import fingerprint, json_fingerprint
from t5patches_kernels import (
    linear_cross_entropy_loss,
    linear_policy_gradient_loss,
    linear_token_statistics,
)

LEARNT = ("loss", "clipped", "value_loss", "explained_variance")  # the others are measured first


@dataclasses.dataclass(frozen=True)
class PolicySettings:
    """How to train towards a score.

    Attributes:
        steps: times to sample, score and update.
        inputs_per_step: inputs that are answered in a step.
        samples: outputs to each of them, which are compared with one another; with a value head one
            is enough.
        max_length: tokens that an output may have.
        temperature: that outputs are sampled at.
        batch_size: outputs made at a time.
        update_size: outputs in an update; it divides those of a step.
        epochs: times that a step's outputs are learnt from.
        learning_rate: of Adam, constant.
        clip: how far the ratio of probabilities may go below and above 1, see
            `t5patches_kernels.policy_gradient_loss`.
        kl_coefficient: beta, what a nat of divergence costs; where there is a target, at first.
        target_kl: None keeps `kl_coefficient`. Nats a token: after each step beta is multiplied by
            ``1 + clip(KL / target - 1, -0.2, 0.2)``.
        pretraining_weight: what a token of other text counts, where there is such text.
        value: a head that says what an output is going to score: advantages are by how much more
            comes of a token; None has them within the outputs to an input.
        most_kl: nats a token, above which the model has collapsed.
        most_length_change: a factor; the mean length of outputs, times or divided by it, beyond
            which the model has collapsed.
        lora: trains an adapter and nothing else; None trains all parameters.
        seed: of the inputs' order, of sampling, and of the adapter.
        checkpoint_every: steps between two states to go on from, or back to.
        implementation: of the losses; None takes the best one for the device.
    """

    steps: int = 50
    inputs_per_step: int = 8
    samples: int = 8
    max_length: int = 64
    temperature: float = 1.0
    batch_size: int = 64
    update_size: int = 32
    epochs: int = 1
    learning_rate: float = 3e-4
    clip: tuple[float, float] = (0.2, 0.2)
    kl_coefficient: float = 0.05
    target_kl: float | None = None
    pretraining_weight: float = 1.0
    most_kl: float = 1.0
    most_length_change: float = 4.0
    value: ValueHead | None = None
    lora: Lora | None = Lora(8)  # noqa: RUF009 (it is frozen)
    seed: int = 0
    checkpoint_every: int = 5
    implementation: str | None = None

    def __post_init__(self) -> None:
        """Refuses settings that cannot be trained with."""
        require_ranges(self, _LEAST, _ABOVE_0)
        if self.value is None and self.samples < 2:
            raise ValueError(
                f"samples is {self.samples}: at least 2 is needed, as the outputs to an input are "
                "compared with one another; with a value head (--advantages value) one is enough"
            )
        if self.outputs < 2:
            raise ValueError("a step has 1 output, and nothing to compare it with: give more inputs"
                             " or samples a step")  # fmt: skip
        if not (len(self.clip) == 2 and 0 <= self.clip[0] <= 1 and self.clip[1] >= 0):
            raise ValueError(
                f"clip is {self.clip}: two numbers are needed, from 0 to 1 below and at least 0 "
                "above"
            )
        if self.target_kl is not None and self.kl_coefficient == 0:
            raise ValueError(
                "kl_coefficient is 0 and there is a target_kl: a coefficient is multiplied to keep "
                "to the target, so it must begin above 0"
            )
        if self.outputs % self.update_size:
            raise ValueError(
                f"update_size is {self.update_size} and a step has {self.outputs} outputs "
                f"({self.inputs_per_step} inputs, {self.samples} to each): it must divide them"
            )

    @property
    def outputs(self) -> int:
        """How many outputs a step has."""
        return self.inputs_per_step * self.samples

    @property
    def updates(self) -> int:
        """How many updates a step makes."""
        return self.epochs * self.outputs // self.update_size

    @property
    def together(self) -> int:
        """How many outputs to an input stand in a row, for which the input is read once."""
        return math.gcd(self.samples, self.update_size)


_LEAST = {
    "steps": 1,
    "inputs_per_step": 1,
    "samples": 1,
    "max_length": 1,
    "batch_size": 1,
    "update_size": 1,
    "epochs": 1,
    "kl_coefficient": 0,
    "most_length_change": 1,
    "seed": 0,
    "checkpoint_every": 1,
}
_ABOVE_0 = ("temperature", "learning_rate", "target_kl", "pretraining_weight", "most_kl")


class Stopped(Exception):  # noqa: N818 (the run ends, and what it has is kept)
    """A run that cannot go on as it is; its last state is kept, and it can be resumed."""


class Aligned(NamedTuple):
    """What training made.

    Attributes:
        params: the new parameters; with `PolicySettings.lora` those of the adapter alone.
        steps: how many steps made them.
        history: for every step, of the model before its updates, `score` (mean over outputs),
            `kl` (mean over tokens of the exact divergence from the original, nats), `length`
            (tokens, mean over outputs), `same` (the share of inputs to which all outputs have one
            score, and nothing is learnt from in the group) and `kl_coefficient`; then `loss` and
            `clipped` (the share of tokens that the clip holds), means over its updates. With a
            value head also `deviation` (of the scores of a step's outputs), then `value_loss` and
            `explained_variance` (of what values have become, by the values before). What is
            measured before the updates has one number more: of the model that training made.
        collapse: why training ended early, in words; None where it did not.
    """

    params: Params
    steps: int
    history: History
    collapse: str | None


class How(NamedTuple):
    """What an update is compiled for, beside shapes."""

    learning_rate: float
    temperature: float
    clip: tuple[float, float]
    kl_coefficient: float | None  # None where it is adapted, and given
    pretraining_weight: float
    lora: Lora | None
    implementation: str | None
    value: ValueHead | None = None

    @classmethod
    def of(cls, settings: PolicySettings) -> How:
        """The part of the settings that the compiled update depends on."""
        values = {name: getattr(settings, name) for name in cls._fields}
        return cls(**values | ({} if settings.target_kl is None else {"kl_coefficient": None}))

    def shapes(self, model: LanguageModel) -> tuple[State, Params]:
        """What is trained with its optimizer, and the original, as shapes; nothing is made."""
        headed = with_head(model, self.lora)
        trained = self.below(headed) if self.value is None else headed
        state = state_shapes(trained, self.optimizer)
        return state, on_first_device(dict(model.param_shapes()))

    def below(self, trained: Params) -> Params:
        """Of what is trained, the adapter's or the model's parameters: all but a value head."""
        return trained.get(BELOW, trained)

    def params(self, base: Params, trained: Params) -> Params:
        """The parameters of the model in training, as the network takes them."""
        return with_trained(base, self.below(trained), self.lora)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """What trains it."""
        return optax.adam(self.learning_rate)


class _Sampled(NamedTuple):
    """A step's outputs, those to the same input one after the other."""

    inputs: list[Inputs]  # that each is the answer to
    texts: list[str]
    arrays: Batch  # rows of inputs, outputs, weights, and what `read` finds, but for the KL
    kl: float  # nats, mean over tokens
    length: float  # tokens, mean over outputs


def group_advantages(scores: np.ndarray) -> np.ndarray:
    """By how much each score is above those of its group, in the group's standard deviations.

    Args:
        scores: [inputs, samples].

    Returns:
        [inputs, samples] float32; 0 for a group of equal scores.

    Example:
        >>> group_advantages(np.array([[1.0, 3.0], [0.5, 0.5]])).round(2).tolist()
        [[-1.0, 1.0], [0.0, 0.0]]
    """
    scores = np.asarray(scores, np.float64)
    above = scores - scores.mean(1, keepdims=True)
    # Of equal numbers the mean may differ by rounding, which the deviation would make large.
    above[np.ptp(scores, axis=1) == 0] = 0
    return np.asarray(above / (scores.std(1, keepdims=True) + 1e-4), np.float32)


def align(
    model: LanguageModel,
    params: Params,
    tokenizer: Tokenizer,
    inputs: Sequence[Inputs],
    scorer: Scorer,
    settings: PolicySettings,
    directory: str | os.PathLike[str],
    *,
    pretraining: Batch | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    progress: Progress | None = None,
) -> Aligned:
    """Trains a model towards a score, from the start or from where the same run was killed.

    Args:
        model: the network; it does not drop.
        params: where to start from, and the original to stay close to; not changed.
        tokenizer: the model's.
        inputs: what the model is given, drawn in random order, an epoch after the other.
        scorer: see `t5patches.editing.scores`; the higher, the better.
        settings: how to train.
        directory: where the run lives; made if absent.
        pretraining: `t5patches.editing.data.to_arrays` of other text, whose likelihood is kept;
            None for none.
        prompts: what the tokenizer makes of the inputs, where that is known.
        progress: shows the run, see `t5patches.editing.train.training_progress`; None shows
            nothing.

    Returns:
        The new parameters, and the history of the run. Where the model has collapsed (see
        `PolicySettings.most_kl` and `most_length_change`) they are those of the last checkpoint,
        whose own outputs were within the bounds.

    Raises:
        ValueError: the directory holds another run; all outputs of the first step have one score.
        ScorerError: the scorer fails on the first step's outputs.
        Stopped: it fails later; the state before is kept.
        FloatingPointError: the model collapsed before a state was kept that has learnt something.
    """
    run = Run(model, params, tokenizer, inputs, settings, pretraining, prompts)
    claim(directory, run.described(), may_differ=MAY_DIFFER)
    with States(directory) as states:
        first, history = states.latest, History()
        if first:
            state, history = run.restored(states)
            # What was measured of this very state is measured again.
            history = _before(history, first)
        else:
            state = run.start()
        display = _Display(progress, settings.steps, first)
        give_back()
        for step in range(first, settings.steps + 1):
            sampled = run.sample(state, step)
            collapse = _collapse(sampled, history, settings)
            if collapse is not None:
                break
            try:
                scores = score(scorer, sampled.texts, sampled.inputs)
            except ScorerError as error:
                if step == 0:
                    raise
                states.save(step, state._asdict(), {"history": history})
                raise Stopped(f"step {step}: {error}") from error
            scores = scores.reshape(settings.inputs_per_step, settings.samples)
            if step == 0:
                _require_differences(scores)
            _append(history, _measures(scores, sampled, history, settings))
            display.update(step, history)
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                states.save(step, state._asdict(), {"history": history})
            if step < settings.steps:
                beta = history["kl_coefficient"][-1]
                arrays, metrics = _with_advantages(sampled.arrays, scores, history, settings)
                state, more = run.learn(state, arrays, beta, step)
                _append(history, more | metrics)
        if collapse is None:
            return Aligned(run.below(state), settings.steps, history, None)
        if not states.latest:
            raise FloatingPointError(
                f"{collapse}, and of the steps before no state is kept: lower the learning rate, "
                "raise the KL's coefficient, make checkpoints more often, or widen the bounds"
            )
        state, _ = run.restored(states)
        # That of the checkpoint lacks what was measured of its state where a scorer failed there.
        measured = {name: values for name, values in history.items() if name not in LEARNT}
        history = _before(history, states.latest) | _before(measured, states.latest + 1)
        return Aligned(run.below(state), states.latest, history, collapse)


class Run:
    """What stays the same from step to step, and what a step does."""

    def __init__(
        self,
        model: LanguageModel,
        params: Params,
        tokenizer: Tokenizer,
        inputs: Sequence[Inputs],
        settings: PolicySettings,
        pretraining: Batch | None,
        prompts: Sequence[Sequence[int]] | None,
    ):
        self._model, self._tokenizer = model.replace(dropout_rate=0.0), tokenizer
        self._inputs, self._settings, self._pretraining = inputs, settings, pretraining
        self._prompts = prompts or [tokenizer.encode_prompt(text) for text in inputs]
        self._how = How.of(settings)
        self._base = jax.device_put(dict(params), jax.devices()[0])

    def described(self) -> dict[str, Any]:
        """What makes two runs the same."""
        return {
            "settings": dataclasses.asdict(self._settings),
            "model": as_texts(self._model.config),
            "params": fingerprint(self._base),
            "inputs": json_fingerprint([list(self._inputs), self._prompts]),
            "pretraining": None if self._pretraining is None else fingerprint(self._pretraining),
        }

    def start(self) -> State:
        """The state before the first step."""
        lora, seed = self._settings.lora, self._settings.seed
        like = self._how.shapes(self._model)[0].params
        params = begun(self._model, self._base, lora, seed, like)
        return State(params, jax.jit(self._how.optimizer.init)(params))

    def below(self, state: State) -> Params:
        """What was trained, without a value head."""
        return self._how.below(state.params)

    def restored(self, states: States) -> tuple[State, History]:
        """The latest state there is, and the history up to it."""
        like = self._how.shapes(self._model)[0]
        found = states.restore(like._asdict(), "history")
        return State(found["params"], found["optimizer"]), found["history"]

    def sample(self, state: State, step: int) -> _Sampled:
        """Samples a step's outputs, and reads them by both models."""
        settings, pad_id = self._settings, self._model.config.pad_id
        rows = batch_indices(len(self._inputs), settings.inputs_per_step, step, settings.seed)
        prompts = [self._prompts[i] for i in rows]
        longest = max(map(len, self._prompts))
        inputs = pad_rows(prompts, pad_id, round_up(max(map(len, prompts)), longest))
        generated = generate(
            self._model,
            self._how.params(self._base, state.params),
            inputs,
            max_length=settings.max_length,
            prefixes=np.zeros((len(rows), settings.samples, 0), np.int32),
            temperature=settings.temperature,
            rng=jax.random.fold_in(jax.random.key(settings.seed), step),
            batch_size=settings.batch_size,
        )
        said = until_end(generated.reshape(settings.outputs, -1), self._model.config.end_ids)
        lengths = np.array([len(ids) for ids in said])
        length, together = round_up(int(lengths.max()), settings.max_length), settings.together
        counts = np.arange(length) < lengths[:, None]
        arrays = {
            "inputs": np.repeat(inputs, settings.samples // together, axis=0),
            "outputs": pad_rows(said, pad_id, length).reshape(-1, together, length),
            "weights": np.asarray(counts, np.float32).reshape(-1, together, length),
        }
        parts, size = [], settings.update_size // together
        for start in range(0, len(arrays["inputs"]), size):
            part = {name: x[start : start + size] for name, x in arrays.items()}
            program = compiled_reading(self._model, self._how, rows_of(part))
            found = jax.block_until_ready(program(state.params, self._base, part))
            parts.append(jax.tree.map(np.asarray, found))
        arrays |= {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        kl = arrays.pop("kl")
        return _Sampled(
            inputs=[self._inputs[i] for i in rows for _ in range(settings.samples)],
            texts=[self._tokenizer.decode(ids).text for ids in said],
            arrays=arrays,
            kl=float(kl.sum(dtype=np.float64) / lengths.sum()),
            length=float(lengths.mean()),
        )

    def learn(
        self, state: State, arrays: Batch, beta: float, step: int
    ) -> tuple[State, dict[str, float]]:
        """Makes a step's updates; the memory of the state is given away."""
        settings = self._settings
        order = np.random.default_rng([settings.seed, step])
        found: list[dict[str, Any]] = []
        size = settings.update_size // settings.together
        for rows in np.concatenate(
            [
                order.permutation(len(arrays["inputs"])).reshape(-1, size)
                for _ in range(settings.epochs)
            ]
        ):
            batch = {name: x[rows] for name, x in arrays.items()}
            text = self._other_text(step * settings.updates + len(found))
            program = compiled_update(self._model, self._how, rows_of(batch), rows_of(text))
            state, metrics = program(state, self._base, batch, text, np.float32(beta))
            found.append(jax.block_until_ready(metrics))
        return state, {name: float(np.mean([m[name] for m in found])) for name in found[0]}

    def _other_text(self, number: int) -> Batch:
        """The text beside an update; nothing where there is none."""
        text, settings = self._pretraining, self._settings
        if text is None:
            return {}
        rows = batch_indices(len(text["inputs"]), settings.update_size, number, settings.seed)
        return {name: x[rows] for name, x in text.items()}


def read(
    trained: Params, base: Params, batch: Mapping[str, jax.Array], *, model: LanguageModel, how: How
) -> dict[str, jax.Array]:
    """Reads outputs by the model that said them and by the original, as the update does.

    Args:
        trained: what is trained.
        base: parameters of the original.
        batch: `inputs` [B, S], `outputs` and `weights` [B, K, L], K to each input.
        model: the network.
        how: see `How`.

    Returns:
        `old_log_probs` [B, K, L], of the tokens, and `kl` [B, K, L], the exact divergences
        KL(model, original), 0 where a token does not count; `original_hidden` [B, K, L, D], the
        original's hidden states; with a value head `old_values` [B, K, L].
    """
    params, counts = how.params(base, trained), batch["weights"] > 0
    head, original_hidden = model.head(params), model.hidden(base, batch)
    hidden = model.hidden(params, batch)
    found: Any = linear_token_statistics(
        hidden,
        head.kernel,
        batch["outputs"],
        original_hidden,
        model.head(base).kernel,
        **_at_temperature(head, how.temperature),
        implementation=how.implementation,
    )
    log_prob, kl = (jnp.where(counts, x, 0.0) for x in (found.log_prob, found.kl))
    read_ = {"old_log_probs": log_prob, "kl": kl, ORIGINAL_HIDDEN: original_hidden}
    return read_ if how.value is None else read_ | {"old_values": _values(trained, hidden)}


def policy_loss(
    trained: Params,
    base: Params,
    batch: Mapping[str, jax.Array],
    text: Mapping[str, jax.Array],
    beta: jax.Array,
    *,
    model: LanguageModel,
    how: How,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of an update, see the module.

    Args:
        trained: what is trained.
        base: parameters of the original.
        batch: `inputs` [B, S], `outputs`, `weights` and `old_log_probs` [B, K, L],
            `original_hidden` [B, K, L, D], `advantages` [B, K, 1] or [B, K, L]; with a value head
            `old_values` and `returns` [B, K, L].
        text: other text, `inputs`, `outputs` and `weights`, whose mean cross-entropy is added;
            empty for none.
        beta: what a nat of divergence costs, where that is adapted.
        model: the network.
        how: see `How`.

    Returns:
        The loss, and of it `clipped`, the share of tokens that the clip holds, and with a value
        head `value_loss`.
    """
    params, weights = how.params(base, trained), batch["weights"]
    head, count, hidden = model.head(params), weights.sum(), model.hidden(params, batch)
    tokens: Any = linear_policy_gradient_loss(
        hidden,
        head.kernel,
        batch[ORIGINAL_HIDDEN],
        model.head(base).kernel,
        batch["outputs"],
        weights,
        jnp.broadcast_to(batch["advantages"], weights.shape),
        batch["old_log_probs"],
        clip=how.clip,
        kl_coefficient=how.kl_coefficient or 0.0,
        skip_ignored=True,
        **_at_temperature(head, how.temperature),
        implementation=how.implementation,
    )
    loss = tokens.loss.sum() / count
    metrics = {"clipped": tokens.clipped.sum(dtype=jnp.float32) / count}
    if how.value is not None:
        values, old_values = _values(trained, hidden), batch["old_values"]
        errors = value_loss(values, old_values, batch["returns"], how.value.clip)
        metrics["value_loss"] = jnp.where(weights > 0, errors, 0.0).sum() / count
        loss += how.value.coefficient * metrics["value_loss"]
    if how.kl_coefficient is None:
        loss += beta * jnp.where(weights > 0, tokens.kl, 0.0).sum() / count
    if text:
        likelihood = linear_cross_entropy_loss(
            model.hidden(params, text),
            head.kernel,
            text["outputs"],
            text["weights"],
            skip_ignored=True,
            **head.loss_options(),
            implementation=how.implementation,
        )
        loss += how.pretraining_weight * likelihood.loss.sum() / text["weights"].sum()
    return loss, metrics


def _values(trained: Params, hidden: jax.Array) -> jax.Array:
    """The values of tokens, [B, K, L] float32."""
    return hidden.astype(jnp.float32) @ trained[WEIGHT]


def update(
    state: State,
    base: Params,
    batch: Mapping[str, jax.Array],
    text: Mapping[str, jax.Array],
    beta: jax.Array,
    *,
    model: LanguageModel,
    how: How,
) -> tuple[State, dict[str, jax.Array]]:
    """The arithmetic of an update.

    Args:
        state: before.
        base: see `policy_loss`, and so are the other arguments.
        batch: see there.
        text: see there.
        beta: see there.
        model: the network.
        how: see `How`.

    Returns:
        The state after, with the loss and what `policy_loss` says of it.
    """

    def loss_of(trained: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        return policy_loss(trained, base, batch, text, beta, model=model, how=how)

    state, loss, metrics = updated(loss_of, state, how.optimizer)
    return state, {"loss": loss, **metrics}


def _at_temperature(head: OutputHead, temperature: float) -> dict[str, Any]:
    """A head whose logits are divided by a temperature: of ``c tanh(z / c)`` z and c are."""
    softcap = None if head.softcap is None else head.softcap / temperature
    return {
        "logit_scale": head.logit_scale / temperature,
        "softcap": softcap,
        "transposed": head.transposed,
    }


def largest_rows(
    model: LanguageModel, settings: PolicySettings, input_length: int
) -> tuple[Rows, Rows]:
    """The largest batches that are read, and that an update takes.

    Args:
        model: the network.
        settings: how to train.
        input_length: of the longest prompt.

    Returns:
        For `compiled_reading` and for `compiled_update`.
    """
    outputs = (settings.update_size // settings.together, settings.together)
    tokens = (*outputs, settings.max_length)
    of_tokens = tokens, np.dtype(np.float32)
    read_ = [
        ("inputs", (outputs[0], input_length), np.dtype(np.int32)),
        ("outputs", tokens, np.dtype(np.int32)),
        ("weights", *of_tokens),
    ]
    more = [
        ("advantages", (*outputs, 1), np.dtype(np.float32)),
        ("old_log_probs", *of_tokens),
        (ORIGINAL_HIDDEN, (*tokens, model.config.emb_dim), np.dtype(model.config.dtype)),
    ]
    if settings.value is not None:
        more[0] = ("advantages", *of_tokens)
        more += [("old_values", *of_tokens), ("returns", *of_tokens)]
    return tuple(read_), tuple(sorted(read_ + more))


@functools.lru_cache(maxsize=32)
def compiled_reading(model: LanguageModel, how: How, rows: Rows) -> Any:
    """`read`, compiled for a batch.

    Args:
        model: the network.
        how: see `How`.
        rows: of the batch.

    Returns:
        The program; it says what memory it takes.
    """
    state, base = how.shapes(model)
    program = jax.jit(functools.partial(read, model=model, how=how))
    return compiled(program.lower(state.params, base, batch_shapes(rows)))


@functools.lru_cache(maxsize=32)
def compiled_update(model: LanguageModel, how: How, rows: Rows, text: Rows) -> Any:
    """`update`, compiled for a batch and for other text beside it.

    Args:
        model: the network.
        how: see `How`.
        rows: of the batch.
        text: of the other text; empty for none.

    Returns:
        The program; it says what memory it takes.
    """
    program = jax.jit(functools.partial(update, model=model, how=how), donate_argnums=0)
    beta = jax.ShapeDtypeStruct((), np.float32)
    shapes = how.shapes(model)
    return compiled(program.lower(*shapes, batch_shapes(rows), batch_shapes(text), beta))


def _require_differences(scores: np.ndarray) -> None:
    """Refuses a first step that nothing can be learnt from: a scorer is wrong, or asks too much."""
    # Where each input has one output, all of them are compared.
    of = f"the outputs to each of the first step's {len(scores)} inputs"
    if scores.shape[1] == 1:
        scores, of = scores.T, "the first step's outputs"
    if not np.ptp(scores, axis=1).any():
        raise ValueError(
            f"{of} have one score (such as "
            f"{scores[0, 0]:g} for all {scores.shape[1]}): nothing can be learnt from them. Take "
            "more inputs or samples a step or a higher temperature, inputs to which outputs differ "
            "in score, or another scorer"
        )


def _measures(
    scores: np.ndarray, sampled: _Sampled, history: History, settings: PolicySettings
) -> dict[str, float]:
    beta = settings.kl_coefficient
    if settings.target_kl is not None and "kl_coefficient" in history:
        error = min(0.2, max(-0.2, sampled.kl / settings.target_kl - 1))
        beta = history["kl_coefficient"][-1] * (1 + error)
    measures = {
        "score": float(scores.mean()),
        "kl": sampled.kl,
        "length": sampled.length,
        "same": float((np.ptp(scores, axis=1) == 0).mean()),
        "kl_coefficient": beta,
    }
    return measures if settings.value is None else measures | {"deviation": float(scores.std())}


def _with_advantages(
    arrays: Batch, scores: np.ndarray, history: History, settings: PolicySettings
) -> tuple[Batch, dict[str, float]]:
    """What updates learn from, and what is to be known of it."""
    head, shape = settings.value, arrays["weights"].shape
    if head is None:
        return arrays | {"advantages": group_advantages(scores).reshape(*shape[:2], 1)}, {}
    rewards = (scores.reshape(-1) - history["score"][0]) / history["deviation"][0]
    values, weights = (arrays[name].reshape(-1, shape[-1]) for name in ("old_values", "weights"))
    advantages, returns = generalized_advantages(rewards, values, weights, head.gamma, head.lam)
    more = {
        "advantages": whitened(advantages, weights).reshape(shape),
        "returns": np.asarray(returns, np.float32).reshape(shape),
    }
    return arrays | more, {"explained_variance": explained_variance(values, returns, weights)}


def _collapse(sampled: _Sampled, history: History, settings: PolicySettings) -> str | None:
    """What is beyond the bounds in a step's outputs, and in the updates before it; None if none."""
    step, loss = len(history.get("loss", [])), history.get("loss", [0.0])[-1]
    if not math.isfinite(loss):
        return f"the loss of step {step - 1} is {loss}"
    if not sampled.kl <= settings.most_kl:
        return (
            f"the KL from the original is {sampled.kl:.3g} nats a token after {step} steps, and "
            f"the bound is {settings.most_kl:g}"
        )
    first, most = history.get("length", [sampled.length])[0], settings.most_length_change
    if not first / most <= sampled.length <= first * most:
        return (
            f"outputs have {sampled.length:.1f} tokens after {step} steps and had {first:.1f} at "
            f"first, and the bound is a factor of {most:g}"
        )
    return None


def _before(history: History, step: int) -> History:
    return {name: values[:step] for name, values in history.items() if step}


def _append(history: History, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        history.setdefault(name, []).append(value)


class _Display:
    """Shows a run in a progress bar, after each step's sampling."""

    def __init__(self, progress: Progress | None, steps: int, first: int):
        self._progress = progress
        if progress is not None:
            self._task = progress.add_task("align", total=steps, completed=first, note="compiling")

    def update(self, step: int, history: History) -> None:
        if self._progress is None:
            return
        last = {name: values[-1] for name, values in history.items()}
        note = f"score {last['score']:.3g}, KL {last['kl']:.3g}, length {last['length']:.1f}"
        if "clipped" in last:
            note += f", clipped {100 * last['clipped']:.1f}%"
        if "value_loss" in last:
            note += (
                f", value loss {last['value_loss']:.3g}, explained variance "
                f"{last['explained_variance']:.2f}"
            )
        self._progress.update(self._task, completed=step, note=note)
