"""Trains on marked outputs with the fused losses, and survives being killed.

A run lives in a directory: `run.json` says what it is (settings, and fingerprints of the data, the
starting parameters and the original), `checkpoints/` holds the latest state. Training into
a directory that holds the same run, unfinished or of fewer steps than are asked for, goes on from
there; a finished one is loaded, and anything else is refused.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import operator
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, SingleDeviceSharding
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from t5patches.editing.data import (
    CHOSEN,
    CHOSEN_WEIGHTS,
    Batch,
    batch_indices,
    said_is_pushed_down,
)
from t5patches.editing.held_out import CHECK_EVERY, HeldOut, Look, verdict
from t5patches.editing.programs import (
    MAY_DIFFER,
    Rows,
    State,
    batch_shapes,
    begun,
    require_ranges,
    rows_of,
    updated,
)
from t5patches.editing.rivals import RIVALS, Chosen, Given
from t5patches.editing.states import History, States
from t5patches.model import placement
from t5patches.model.batches import round_up, row_lengths
from t5patches.model.lora import Lora, adapter_axes, trained_shapes, with_trained
from t5patches.model.memory import compiled, give_back
from t5patches.model.protocol import (
    DTYPES,
    LanguageModel,
    Params,
    as_texts,
    require_positions,
)
from t5patches.model.teacher_cache import (
    ORIGINAL_HIDDEN,
    CacheSize,
    TeacherCache,
    states_of,
    write_cache,
)
from t5patches.runs import hosts
from t5patches.runs.claims import claim
from t5patches.runs.files import read_object
from t5patches.runs.fingerprints import fingerprint
from t5patches_kernels import (
    TARGETED_NEGATIVE,
    TRAINING_OBJECTIVES,
    Edits,
    TokenLoss,
    linear_cross_entropy_loss,
    linear_negative_likelihood_loss,
    linear_targeted_negative_loss,
    linear_unlikelihood_loss,
)
from t5patches_kernels.linear_losses import tokens_per_chunk

TARGETED, OBJECTIVES = TARGETED_NEGATIVE, (*TRAINING_OBJECTIVES, *RIVALS)
WITH_ORIGINAL = (*TARGETED, *(name for name, rival in RIVALS.items() if rival.original))
KEEPING = tuple(name for name in OBJECTIVES if name not in RIVALS or RIVALS[name].keeps)
NO_SETS = ("nl", "ce", *(name for name, rival in RIVALS.items() if not rival.sets))
OPTIMIZERS = ("adafactor", "adam")
SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        objective: one of `OBJECTIVES`: targeted negative training (`tnff tnrr tnrf tnfll tnrll`),
            unlikelihood (`ul`), negative likelihood (`nl`), cross-entropy (`ce`), and the methods
            of `t5patches.editing.rivals`.
        beta: of `undial`, `npo` and `dpo`; None is their own default.
        alpha: factor on the loss of pushed-down tokens; `ce` has none.
        negatives: 0 pushes down the token that was said, K > 0 a set of at most K ids.
        steps: updates to make.
        batch_size: examples in an update.
        learning_rate: after the warm-up. The default keeps a pretrained model close; a tiny one,
            and an adapter, want ten times as much with Adafactor.
        warmup_steps: the rate rises linearly over them.
        schedule: one of `SCHEDULES`, of the rate after the warm-up: it stays, or falls to 0, which
            it would reach with the update after the last (Loshchilov and Hutter 2017 for the
            cosine). Where it falls, `steps` is a fact of the run, which gets no more later.
        average: 0, or the decay of an exponential average of what is trained, which then is what
            training makes (Polyak and Juditsky 1992). With a decay d it reaches over about
            1 / (1 - d) updates.
        until: stops training, see `t5patches.editing.held_out.verdict`, by what every tenth update
            has left of the unwanted in the part of the data that is held out; None makes all
            steps.
        optimizer: one of `OPTIMIZERS`.
        z_loss: coefficient of the squared log-normaliser.
        label_smoothing: `ce` only.
        spread: of `tnrr tnrf tnrll`, whose smoothing is `spread / V`: about this share of the
            target's mass lies on all ids alike, of kept tokens too. It keeps the reverse divergence
            finite. (T5Patches' smoothing, 1e-6, spreads 0.05 where V is 50,000, 0.2 at 260,000.)
        threshold: `nl` stops pushing a token whose log-probability is below it.
        seed: of the order of the data and of dropout.
        checkpoint_every: updates between two checkpoints; the last one always makes one.
        implementation: of the losses; None takes the best one for the device.
        lora: trains an adapter and nothing else; None trains all parameters. The original is then
            the same parameters without the adapter, held once.
        param_dtype: of the parameters that are not trained, float32 or bfloat16; what is trained
            is float32.
        chunk_bytes: of the losses (`t5patches_kernels.linear_losses`): how much of the logits a
            device makes at a time. None is their own choice; `t5patches.editing.plan` has another
            where there is room. It changes rounding alone and is no fact of a run.
    """

    objective: str = "tnff"
    beta: float | None = None
    alpha: float = 1.0
    negatives: int = 0
    steps: int = 100
    batch_size: int = 32
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: str = "constant"
    average: float = 0.0
    until: float | None = None
    optimizer: str = "adafactor"
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    spread: float = 1e-3
    threshold: float = -10.3
    seed: int = 0
    checkpoint_every: int = 100
    implementation: str | None = None
    lora: Lora | None = None
    param_dtype: str = "float32"
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuses settings that cannot be trained with."""
        for name, known in _ONE_OF.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: one of {known} is needed")
        require_ranges(self, _LEAST, above_0=("learning_rate", "spread"))
        if self.steps == 1 and self.warmup_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} and steps 1: the first update has a rate of "
                "0, and would change nothing; make more steps, or leave the warm-up out"
            )
        if self.schedule != "constant" and self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} and steps {self.steps}: nothing is left for "
                f"the {self.schedule} schedule; make more steps, or warm up over fewer"
            )
        if self.seed >= 2**31:  # on a device it is an int32
            raise ValueError(f"seed is {self.seed}: at most {2**31 - 1} is possible")
        if not 0 <= self.average < 1:
            raise ValueError(
                f"average is {self.average}: a decay from 0 (none) to below 1 is needed, such as "
                "0.95"
            )
        if self.until is not None and not 0 < self.until < 1:
            raise ValueError(
                f"until is {self.until}: a probability above 0 and below 1 is needed, such as 0.1"
            )
        if self.until is not None and self.steps % CHECK_EVERY:
            raise ValueError(
                f"steps is {self.steps}, and until looks at every {CHECK_EVERY}th update: give a "
                f"multiple of {CHECK_EVERY}"
            )
        if self.negatives and self.objective in NO_SETS:
            takers = tuple(name for name in OBJECTIVES if name not in NO_SETS)
            raise NotImplementedError(
                f"{self.objective} pushes down one token a position, and negatives is "
                f"{self.negatives}: use 0, or one of {takers}"
            )
        if self.objective == "ce" and self.alpha != 1:
            raise ValueError(
                f"alpha is {self.alpha} and the objective ce, which pushes nothing down: leave "
                "alpha out"
            )
        if self.label_smoothing and self.objective != "ce":
            raise ValueError(
                f"label_smoothing is {self.label_smoothing} and the objective {self.objective}: it "
                "is of ce alone; leave it out"
            )
        rival = RIVALS.get(self.objective)
        takes_beta = rival is not None and rival.beta is not None
        if self.beta is not None and not (takes_beta and 0 < self.beta < math.inf):
            takers = tuple(name for name, other in RIVALS.items() if other.beta is not None)
            raise ValueError(
                f"beta is {self.beta} and the objective {self.objective}: it is above 0 and "
                f"finite, and of {takers} alone"
            )
        if self.z_loss and rival is not None and not rival.z_loss:
            raise NotImplementedError(
                f"{self.objective} has no z-loss, and z_loss is {self.z_loss}"
            )
        frozen = self.lora is not None or self.objective in WITH_ORIGINAL
        if self.param_dtype != "float32" and not frozen:
            raise ValueError(
                f"param_dtype is {self.param_dtype} and there are no frozen parameters: "
                f"{self.objective} without an adapter trains all there are, which is done in "
                "float32. Leave it out, or train an adapter (--lora)"
            )


_ONE_OF = {
    "objective": OBJECTIVES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "param_dtype": tuple(DTYPES),
}
_LEAST = {
    "alpha": 0,
    "negatives": 0,
    "steps": 1,
    "batch_size": 1,
    "warmup_steps": 0,
    "seed": 0,
    "checkpoint_every": 1,
}


def may_differ(settings: TrainSettings) -> dict[str, Callable[[Any, Any], bool]]:
    """In what a run that goes on may differ from what it was.

    It may get more steps where the rate does not fall towards its last one.

    Args:
        settings: how to train now.

    Returns:
        By name, whether the value there may become the one asked for, as `claim` takes it.
    """
    constant = settings.schedule == "constant"
    return {**MAY_DIFFER, **({"steps": operator.le} if constant else {})}


class Trained(NamedTuple):
    """What training made.

    Attributes:
        params: the new parameters, or their average where `TrainSettings.average` asks for it,
            or the best of either where `TrainSettings.until` does;
            with `TrainSettings.lora` those of the adapter alone.
        history: for every step `loss` (mean over the tokens that count), `marked` (how many
            tokens of the batch are themselves pushed down) and `said` (for how many of them the
            model, given what comes before, still finds no token likelier).
        looks: with `TrainSettings.until`, what was measured on what is held out.
    """

    params: Params
    history: History
    looks: Sequence[Look] = ()


class _State(NamedTuple):
    params: Params  # what is trained: the model's, or the adapter's
    optimizer: optax.OptState
    average: Params | None = None  # of what is trained, over the updates

    @property
    def result(self) -> Params:
        """What training makes, should it end here."""
        return self.params if self.average is None else self.average


class Frozen(NamedTuple):
    """What an update reads and does not change.

    Attributes:
        base: the model beneath an adapter; None where there is no adapter.
        original: the model to stay close to; None where the objective stays close to none, or
            where it is the base. Its head alone where nothing asks for more of it.
    """

    base: Params | None
    original: Params | None


def train(
    model: LanguageModel,
    params: Params,
    arrays: Batch,
    settings: TrainSettings,
    directory: str | os.PathLike[str],
    *,
    original: Params | None = None,
    order: np.ndarray | None = None,
    mesh: Mesh | None = None,
    teacher: TeacherCache | None = None,
    held_out: Batch | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Trains a model, from the start or from where the same run was killed; or loads what it made.

    Args:
        model: the network. With a `dropout_rate` above 0 the model being trained drops,
            the original never does.
        params: where to start from; not changed.
        arrays: `t5patches.editing.data.to_arrays`; `edit_ids` where `settings.negatives` is not 0.
        settings: how to train.
        directory: where the run lives; made if absent.
        original: the model whose distribution the targeted objectives keep; default
            `params`.
        order: [steps * batch_size], the row of `arrays` that each place of each batch takes
            (`t5patches.editing.mixing.mixture_order`); default, every epoch a fresh permutation.
        mesh: of `t5patches.model.placement.make_mesh`: batches and large matrices are divided over
            its devices; None is the first device alone. The sums differ by rounding.
        teacher: of `original` on `arrays` (`cache_teacher`): read instead of running `original`,
            of which only the head is then needed.
        held_out: with `TrainSettings.until`, arrays like `arrays` of other inputs, with something
            that was said pushed down; their sets may be of another size.
        progress: shows the run, see `training_progress`; None shows nothing.

    Returns:
        The new parameters and the history of the whole run.

    Raises:
        ValueError: the directory holds another run; the arrays lack edits; cross-entropy is asked
            for on marked tokens; the order is too short; the mesh does not divide the sizes; an
            example is longer than the model's positions; the teacher's cache is of other data or
            another original.
        FloatingPointError: the loss, or what is left on `held_out`, stops being a number; no
            checkpoint holds what came of it.
    """
    _check_arrays(arrays, settings, order)
    _check_held_out(held_out, settings)
    for part, name in ((arrays, "outputs"), (arrays, CHOSEN), (held_out or {}, "outputs")):
        if name in part:
            lengths = (row_lengths(part[x], model.config.pad_id) for x in ("inputs", name))
            require_positions(model.config, *lengths)
    cached = None if teacher is None else str(teacher.dtype)
    own = original is not None and original is not params
    step_of = Step(model, settings, arrays, mesh, cached=cached, own_original=own)
    directory = Path(directory).absolute()
    original = params if original is None else original
    described = _describe(model, params, original, arrays, settings, order, cached, held_out)
    if teacher is not None:
        about = states_of(described["original"], model.config)
        teacher.check(arrays, about, width=model.config.emb_dim)

    def claimed() -> None:
        claim(
            directory,
            described,
            may_differ=may_differ(settings) | _longer(directory, order, settings),
        )

    hosts.once(claimed)
    finished = finished_run(directory, step_of.state.params)
    if finished is not None:
        return finished
    watch = None
    if held_out is not None and settings.until is not None:
        watch = HeldOut(
            model,
            held_out,
            cache_teacher(
                directory / "held_out",
                model,
                original,
                held_out,
                batch_size=settings.batch_size,
                dtype=jnp.dtype(model.config.dtype).name,
                mesh=mesh,
            ),
            until=settings.until,
            batch_size=settings.batch_size,
            lora=settings.lora,
            implementation=settings.implementation,
            mesh=mesh,
        )
    with States(directory) as states:
        first, history = states.latest, dict[str, list[Any]]()
        if first:
            best = {} if watch is None else {"best": step_of.state.params}
            names = ("history",) if watch is None else ("history", "looks")
            found = states.restore(step_of.state._asdict() | best, *names)
            state = _State(found["params"], found["optimizer"], found.get("average"))
            history = found["history"]
            if watch is not None:
                watch.restored(found["looks"], found["best"])
        else:
            state = step_of.start(params)
        frozen = step_of.place(params, original)

        def look(done: int, trained: Params) -> str | None:
            """Why to stop, where what is held out says so."""
            close_to = frozen.base if frozen.original is None else frozen.original
            if watch is None or close_to is None or done % CHECK_EVERY:
                return None
            watch.look(done, trained, frozen.base, close_to)
            return watch.why

        if watch is not None and not first and look(0, state.params):
            raise ValueError(
                f"{watch.looks[0].left:.3g} is left before any update, and until is "
                f"{settings.until}: ask for less"
            )
        display = _Display(progress, settings, directory.name, first)
        batches = Batches(arrays, settings, model.config.pad_id, order)
        give_back()
        for step in range(first, settings.steps):
            batch = batches.at(step)
            if teacher is not None:
                batch[ORIGINAL_HIDDEN] = teacher.read(batch)
            state, metrics = step_of(state, frozen, batch, step)
            for name, value in metrics.items():
                history.setdefault(name, []).append(value)
            display.update(step + 1, history)
            stop = look(step + 1, state.result)
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps or stop:
                history = _fetch(history)
                _require_finite(history)
                kept = {"best": watch.best} if watch else {}
                numbers = {"history": history, "looks": watch.looks if watch else None}
                states.save(step + 1, state._asdict() | kept, numbers)
            if stop:
                break
    if watch is None or watch.best is None:
        return Trained(state.result, history)
    return Trained(watch.best, history, watch.looks)


def finished_run(directory: str | os.PathLike[str], params: Params) -> Trained | None:
    """Loads what `train` made in a directory.

    Args:
        directory: of the run.
        params: parameters of the same shapes, such as those that the run started from.

    Returns:
        The trained parameters and their history; None where there is no run or an unfinished one.
    """
    directory = Path(directory).absolute()
    # A run that another process is already beginning is none that was there.
    steps = hosts.first_says(lambda: _steps(directory) or 0)
    if not steps:
        return None
    settings = _settings(directory)
    watched = settings.get("until") is not None
    made = "best" if watched else "average" if settings.get("average") else "params"
    looks: Sequence[Look] = ()
    with States(directory) as states:
        if watched and states.latest:
            looks = [Look(*look) for look in states.restore({}, "looks")["looks"]]
            if verdict(looks, settings["until"]).why:
                steps = states.latest
        if states.latest != steps:
            return None
        found = states.restore({made: params}, "history")
    return Trained(found[made], found["history"], looks)


def training_progress(console: Console | None = None) -> Progress:
    """A bar that shows each run with its loss, marked tokens still likeliest, and speed.

    Args:
        console: where to draw; default the terminal's standard error.

    Returns:
        A `rich.progress.Progress` to pass to `train`, for use in a `with` statement.
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )


_SKIP_IGNORED = True


def token_loss(
    model: LanguageModel,
    params: Params,
    original: Params | None,
    batch: Mapping[str, Any],
    settings: TrainSettings,
    dropout_key: jax.Array | None = None,
) -> TokenLoss:
    """The loss of every token of a batch, without its [batch, length, vocabulary] logits.

    Args:
        model: the network.
        params: of the model being trained.
        original: parameters of the original; the objectives of `WITH_ORIGINAL` need them, of
            a cached one (`original_hidden` in `batch`) the head's alone.
        batch: [B, ...] arrays named as by `t5patches.editing.data.to_arrays`.
        settings: the objective and its numbers.
        dropout_key: for dropout; None for none.

    Returns:
        A `TokenLoss` of [B, L] arrays; of ignored tokens all of it is 0 and False.
    """
    targets, weights = batch["outputs"], batch["weights"]
    hidden = model.hidden(params, batch, dropout_key=dropout_key)
    head = model.head(params)
    common: dict[str, Any] = {
        **head.loss_options(),
        "z_loss": settings.z_loss,
        "implementation": settings.implementation,
        "chunk_bytes": settings.chunk_bytes,
        "skip_ignored": _SKIP_IGNORED,
    }
    edits = Edits(batch["edit_ids"], batch["edit_factors"]) if settings.negatives else None
    alone: dict[str, tuple[Callable[..., TokenLoss], dict[str, Any]]] = {
        "ce": (linear_cross_entropy_loss, {"label_smoothing": settings.label_smoothing}),
        "nl": (
            linear_negative_likelihood_loss,
            {"alpha": settings.alpha, "threshold": settings.threshold},
        ),
        "ul": (linear_unlikelihood_loss, {"alpha": settings.alpha, "edits": edits}),
    }
    if settings.objective in alone:
        loss, options = alone[settings.objective]
        return loss(hidden, head.kernel, targets, weights, **options, **common)
    # What stays close to no original may be given itself for one.
    original_hidden, original_head = hidden, head
    if settings.objective in WITH_ORIGINAL:
        if original is None:
            raise ValueError(f"{settings.objective} needs the parameters of the original model")
        original_head = model.head(original)
        if ORIGINAL_HIDDEN in batch:
            original_hidden = batch[ORIGINAL_HIDDEN].astype(hidden.dtype)
        else:
            original_hidden = model.hidden(original, batch)
    if settings.objective in TARGETED:
        return linear_targeted_negative_loss(
            hidden,
            head.kernel,
            original_hidden,
            original_head.kernel,
            targets,
            weights,
            objective=settings.objective,
            alpha=settings.alpha,
            smoothing=settings.spread / model.config.vocab_size,
            edits=edits,
            **common,
        )
    chosen = None
    if CHOSEN in batch and original is not None:
        pair = {"inputs": batch["inputs"], "outputs": batch[CHOSEN]}
        chosen = Chosen(
            batch[CHOSEN],
            batch[CHOSEN_WEIGHTS],
            model.hidden(params, pair, dropout_key=dropout_key),
            model.hidden(original, pair),
        )
    rival = RIVALS[settings.objective]
    return rival.loss(
        Given(
            hidden=hidden,
            head=head,
            original_hidden=original_hidden,
            original_head=original_head,
            targets=targets,
            weights=weights,
            edits=edits,
            alpha=settings.alpha,
            beta=settings.beta or rival.beta or 0.0,
            options=common,
            chosen=chosen,
        )
    )


class Batches:
    """The batch of each step: its rows, and padding to a length that few batches differ in.

    Which rows come when depends on the settings alone, and the padding on the rows: a run that is
    resumed takes equal batches in equal order.
    """

    def __init__(
        self, arrays: Batch, settings: TrainSettings, pad_id: int, order: np.ndarray | None = None
    ):
        """Measures the rows.

        Args:
            arrays: the data.
            settings: batch size, seed and number of steps.
            pad_id: the model's.
            order: see `train`.
        """
        self._arrays, self._settings, self._order = arrays, settings, order
        said = (arrays["outputs"] != pad_id) | (arrays["weights"] != 0)
        if CHOSEN in arrays:
            said |= arrays[CHOSEN_WEIGHTS] != 0
        self._input_lengths = row_lengths(arrays["inputs"], pad_id)
        self._output_lengths = row_lengths(said, False)

    def at(self, step: int) -> Batch:
        """The arrays of a step.

        Args:
            step: its number.

        Returns:
            Arrays named as those of the data.
        """
        rows = self._rows(step)
        inputs, outputs = self._shape(rows)
        return {
            name: array[rows, : inputs if name == "inputs" else outputs]
            for name, array in self._arrays.items()
        }

    def shapes(self) -> dict[tuple[int, int], int]:
        """In how many of the steps batches have which lengths of inputs and outputs."""
        steps = range(self._settings.steps)
        return collections.Counter(self._shape(self._rows(step)) for step in steps)

    def _rows(self, step: int) -> np.ndarray:
        size = self._settings.batch_size
        if self._order is None:
            return batch_indices(len(self._arrays["inputs"]), size, step, self._settings.seed)
        return self._order[step * size : (step + 1) * size]

    def _shape(self, rows: np.ndarray) -> tuple[int, int]:
        return (
            _padded(self._input_lengths[rows].max(), self._arrays["inputs"].shape[1]),
            _padded(self._output_lengths[rows].max(), self._arrays["outputs"].shape[1]),
        )


def _padded(length: int, longest: int) -> int:
    """What a batch is padded to: less than the longest only where that halves it.

    Every other length is one more program to compile.
    """
    size = round_up(int(length), longest)
    return size if 2 * size <= longest else longest


class Step:
    """One update, which can be compiled before anything large is made.

    Attributes:
        arguments: of `update`, as shapes and where they lie.
        state: the first of them, what the update changes.
        frozen: the second, what it does not change.
        cached: dtype of the original's cached states; None where it runs itself.
        head_only: whether no more of the original is held than its head, as nothing runs it.
    """

    def __init__(
        self,
        model: LanguageModel,
        settings: TrainSettings,
        arrays: Batch,
        mesh: Mesh | None = None,
        *,
        cached: str | None = None,
        own_original: bool = False,
    ):
        """Lays the update out; nothing is compiled yet.

        Args:
            model: the network.
            settings: how to train.
            arrays: the data, of which only names, types and lengths count here.
            mesh: see `train`.
            cached: dtype of the original's cached states; None where it runs itself.
            own_original: whether the original is another model than the one that an adapter is
                trained beside. Without an adapter it always has its own place.

        Raises:
            ValueError: the mesh does not divide the sizes; cached states are of no use; the model
                cannot have such an adapter.
        """
        self._model, self._arrays, self.cached = model, arrays, cached
        self._own_original = own_original
        self._mesh, self._settings, self._init = mesh, settings, _optimizer(settings).init
        if mesh is not None:
            placement.check_mesh(mesh, model, settings.batch_size)
        batch: dict[str, Any] = dict(arrays)
        if cached is not None:
            if settings.objective not in WITH_ORIGINAL:
                raise ValueError(
                    f"{settings.objective} keeps to no original model, so there is nothing to "
                    f"cache: leave the cache out, or use one of {WITH_ORIGINAL}"
                )
            if settings.objective == "dpo":
                raise NotImplementedError(
                    "dpo runs the original on the corrections too, and a cache is of the outputs: "
                    "leave the cache out"
                )
            states = (*arrays["outputs"].shape, model.config.emb_dim)
            batch[ORIGINAL_HIDDEN] = jax.ShapeDtypeStruct(states, jnp.dtype(cached))
        own_original = own_original and settings.lora is not None
        rows = rows_of(batch, settings.batch_size)
        self._key = (model, _compiled_with(settings), rows, mesh, own_original)
        self.arguments, _ = _program(*self._key)
        self.state, self.frozen, *_ = self.arguments
        runs_it = cached is None and settings.objective in WITH_ORIGINAL
        self.head_only = self.frozen.original is not None and not runs_it

    def of_all(self) -> Step:
        """The update that trains all parameters where this one trains an adapter, to compare."""
        return self.with_settings(
            dataclasses.replace(self._settings, lora=None, param_dtype="float32")
        )

    def with_settings(self, settings: TrainSettings) -> Step:
        """The update of the same model and data with other settings.

        Args:
            settings: how to train.

        Returns:
            Another step; nothing is compiled yet.
        """
        own = self._own_original
        return Step(
            self._model, settings, self._arrays, self._mesh, cached=self.cached, own_original=own
        )

    def logits_at_a_time(self, chunk_bytes: int | None) -> tuple[int, int]:
        """How much of the longest batch's logits an update makes at a time on each device.

        Args:
            chunk_bytes: see `TrainSettings`.

        Returns:
            Tokens, and the bytes of one model's float32 logits of them.
        """
        examples, length = self.arguments[2]["outputs"].shape
        columns, device = self._model.config.vocab_size, jax.devices()[0]
        if self._mesh is not None:
            examples //= self._mesh.shape[placement.DATA]
            columns //= self._mesh.shape[placement.MODEL]
            device = self._mesh.devices.flat[0]
        tokens = tokens_per_chunk(
            examples * length,
            columns,
            platform=device.platform,
            chunk_bytes=chunk_bytes,
            skip_ignored=_SKIP_IGNORED,
        )
        return tokens, 4 * columns * tokens

    @property
    def compiled(self) -> Any:
        """The program for the longest batch, compiled; it says what memory it takes."""
        return _compiled(*self._key)

    def start(self, params: Params) -> _State:
        """Copies parameters to where they lie, with a fresh optimizer.

        Args:
            params: to start from; beside an adapter they stay as they are, and it starts afresh.

        Returns:
            The state before the first update.
        """
        lora, seed = self._settings.lora, self._settings.seed
        placed = begun(self._model, params, lora, seed, self.state.params)
        shardings = jax.tree.map(lambda x: x.sharding, self.state.optimizer)
        optimizer = jax.jit(self._init, out_shardings=shardings)(placed)
        # The first update puts its own in the place of the zeros.
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), placed)
        return _State(placed, optimizer, zeros if self._settings.average else None)

    def place(self, params: Params, original: Params) -> Frozen:
        """Puts what is frozen where it lies, once and not at every update.

        Args:
            params: that training starts from.
            original: its parameters.

        Returns:
            As much of them as the update needs, in the dtype in which it is held.
        """

        def placed(tree: Params, like: Any) -> Any:
            held = in_dtype(tree, self._settings.param_dtype)
            return jax.tree.map(lambda x, y: hosts.place(x, y.sharding), dict(held), like)

        if self.head_only:
            original = self._model.head_params(original)
        return Frozen(
            None if self.frozen.base is None else placed(params, self.frozen.base),
            None if self.frozen.original is None else placed(original, self.frozen.original),
        )

    def __call__(
        self, state: _State, frozen: Frozen, batch: Batch, step: int
    ) -> tuple[_State, dict[str, jax.Array]]:
        """Makes an update.

        Args:
            state: before; its memory is given away.
            frozen: of `place`.
            batch: rows of the arrays, as long as they are or shorter.
            step: its number.

        Returns:
            The state after, and what goes into the history.
        """
        placed: Mapping[str, Any] = batch
        if self._mesh is not None:
            split = placement.batch_sharding(self._mesh)
            placed = {name: hosts.place(x, split) for name, x in batch.items()}
        model, settings, _, *more = self._key
        program = _compiled(model, settings, rows_of(batch), *more)
        return program(state, frozen, placed, np.int32(self._settings.seed), np.int32(step))


def in_dtype(params: Params, dtype: str) -> Params:
    """Parameters as they are held where they are not trained.

    Args:
        params: in float32.
        dtype: to hold them in.

    Returns:
        The same in that dtype; `params` themselves where they have it.
    """
    if all(x.dtype == dtype for x in jax.tree.leaves(params)):
        return params
    return jax.tree.map(lambda x: x.astype(dtype), dict(params))


@functools.lru_cache(maxsize=32)
def _compiled(
    model: LanguageModel,
    settings: TrainSettings,
    rows: Rows,
    mesh: Mesh | None,
    own_original: bool,
) -> Any:
    arguments, program = _program(model, settings, rows, mesh, own_original)
    with placement.over(mesh):
        return compiled(program.lower(*arguments))


@functools.lru_cache(maxsize=32)
def _program(
    model: LanguageModel,
    settings: TrainSettings,
    rows: Rows,
    mesh: Mesh | None,
    own_original: bool,
) -> tuple[tuple, Any]:
    """What the update takes, as shapes and where they lie, and the update to be compiled."""
    optimizer, lora = _optimizer(settings), settings.lora
    shapes = model.param_shapes()
    trained = trained_shapes(model, lora)
    inner = jax.eval_shape(optimizer.init, trained)
    of_batch: jax.sharding.Sharding
    if mesh is None:
        first = SingleDeviceSharding(jax.devices()[0])
        of_shapes, of_trained, of_inner = (
            jax.tree.map(lambda _: first, x) for x in (shapes, trained, inner)
        )
        of_batch = first
    else:
        of_shapes = of_trained = placement.param_shardings(mesh, model)
        if lora is not None:
            of_trained = placement.shardings_by_axes(mesh, model, adapter_axes(model, lora))
        of_inner = placement.state_shardings(mesh, of_trained, trained, inner, optimizer)
        of_batch = placement.batch_sharding(mesh)

    def placed(x: Any, sharding: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)

    of_state = _State(of_trained, of_inner, of_trained if settings.average else None)
    state = jax.tree.map(
        placed, _State(trained, inner, trained if settings.average else None), of_state
    )
    held = functools.partial(placed, dtype=jnp.dtype(settings.param_dtype))
    params: Any = jax.tree.map(held, shapes, of_shapes)
    batch = batch_shapes(rows, of_batch)
    original = None
    if lora is None or own_original:
        if settings.objective in WITH_ORIGINAL and ORIGINAL_HIDDEN not in batch:
            original = params
        elif settings.objective in WITH_ORIGINAL or settings.until is not None:
            original = model.head_params(params)
    frozen = Frozen(None if lora is None else params, original)
    number = jax.ShapeDtypeStruct((), np.int32)
    program = jax.jit(
        functools.partial(update, model=model, settings=settings),
        donate_argnums=0,
        out_shardings=(of_state, None),
    )
    return (state, frozen, batch, number, number), program


def update(
    state: _State,
    frozen: Frozen,
    batch: Mapping[str, jax.Array],
    seed: jax.Array,
    step: jax.Array,
    *,
    model: LanguageModel,
    settings: TrainSettings,
) -> tuple[_State, dict[str, jax.Array]]:
    """The arithmetic of an update, which `Step` compiles.

    Args:
        state: before.
        frozen: what is read and stays as it is.
        batch: see `token_loss`.
        seed: of dropout.
        step: its number.
        model: the network.
        settings: how to train.

    Returns:
        The state after, and what goes into the history.
    """
    key = jax.random.fold_in(jax.random.key(seed), step) if model.config.dropout_rate else None
    weights = batch["weights"]
    # Without its adapter the model is the original.
    original = frozen.base if frozen.original is None else frozen.original

    def mean_loss(trained: Params) -> tuple[jax.Array, TokenLoss]:
        params = with_trained(frozen.base, trained, settings.lora)
        tokens = token_loss(model, params, original, batch, settings, key)
        counted = jnp.sum(weights != 0, dtype=jnp.float32)
        return tokens.loss.sum() / jnp.maximum(counted, 1), tokens

    before = State(state.params, state.optimizer)
    (params, optimizer), loss, tokens = updated(mean_loss, before, _optimizer(settings))
    average = state.average
    if average is not None:
        # The first update of a warm-up has rate 0: what it leaves is where training began.
        earlier = jnp.maximum(step - min(settings.warmup_steps, 1), 0)
        share = _share_of_newest(settings.average, earlier)
        average = jax.tree.map(lambda old, new: old + share * (new - old), average, params)
    marked = said_is_pushed_down(batch)
    metrics = {"loss": loss, "marked": marked.sum(), "said": (marked & tokens.correct).sum()}
    return _State(params, optimizer, average), metrics


def _share_of_newest(decay: float, step: jax.Array) -> jax.Array:
    """``1 / (1 + d + ... + d**step)``: 1 at first, so that where training began counts nothing.

    An average that began there would stay closer to the original by not having been trained.
    """
    log = np.float32(np.log(decay))
    return jnp.expm1(log) / jnp.expm1(log * (jnp.asarray(step, jnp.float32) + 1))


def _compiled_with(settings: TrainSettings) -> TrainSettings:
    """What the compiled update depends on: runs that differ in the rest share it."""
    return dataclasses.replace(
        settings,
        seed=0,
        steps=CHECK_EVERY if settings.schedule == "constant" else settings.steps,
        until=None if settings.until is None else 0.5,
        batch_size=1,
        checkpoint_every=1,
    )


def _optimizer(settings: TrainSettings) -> optax.GradientTransformation:
    rate = _rate(settings)
    if settings.optimizer == "adam":
        return optax.adam(rate)
    # An adapter begins with a matrix of zeros: steps in proportion to it would lead nowhere.
    return optax.adafactor(rate, multiply_by_parameter_scale=settings.lora is None)


def _rate(settings: TrainSettings) -> optax.ScalarOrSchedule:
    """The learning rate by the number of updates before."""
    rate, warmup = settings.learning_rate, settings.warmup_steps
    falling = settings.steps - warmup
    match settings.schedule:
        case "linear":
            after: optax.ScalarOrSchedule = optax.linear_schedule(rate, 0.0, falling)
        case "cosine":
            after = optax.cosine_decay_schedule(rate, falling)
        case _:
            return optax.linear_schedule(0.0, rate, warmup) if warmup else rate
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup])


def _check_arrays(arrays: Batch, settings: TrainSettings, order: np.ndarray | None) -> None:
    edits = arrays.get("edit_ids")
    size = 0 if edits is None else edits.shape[-1]
    if size != settings.negatives:
        raise ValueError(
            f"settings.negatives is {settings.negatives} and the arrays have sets of {size} ids: "
            f"make them with to_arrays(examples, pad_id=..., negatives={settings.negatives})"
        )
    odd = np.argwhere(~np.isfinite(arrays["weights"]))
    if len(odd):
        raise ValueError(
            f"weights holds {len(odd)} that are not finite, the first at {odd[0].tolist()}: "
            "1 keeps a token, -1 pushes it down, 0 leaves it out"
        )
    if settings.objective == "ce" and (arrays["weights"] < 0).any():
        raise ValueError(
            "cross-entropy learns every token, and some are marked to be pushed down: train on "
            "`corrected_examples`, or choose another objective"
        )
    if settings.objective == "dpo" and CHOSEN not in arrays:
        raise ValueError(
            "dpo compares with corrections, and the arrays have none: make them with pair_arrays"
        )
    places, rows = settings.steps * settings.batch_size, len(arrays["inputs"])
    if order is not None and (len(order) < places or not 0 <= order.min() <= order.max() < rows):
        raise ValueError(
            f"order has {len(order)} places from row {order.min()} to {order.max()}: needed are "
            f"{places} (steps times batch size), within the {rows} rows of the arrays"
        )


def _check_held_out(held_out: Batch | None, settings: TrainSettings) -> None:
    if (held_out is None) != (settings.until is None):
        raise ValueError(
            "until and held_out go together: the one says when to stop, the other by what data"
        )
    if held_out is not None and not said_is_pushed_down(held_out).any():
        raise ValueError(
            "in held_out nothing that was said is pushed down, so nothing of it can be left"
        )
    if held_out is not None and jax.process_count() > 1:
        raise NotImplementedError(
            "several processes do not look at what is held out: leave until out"
        )


def cache_teacher(
    directory: str | os.PathLike[str],
    model: LanguageModel,
    original: Params,
    arrays: Batch,
    *,
    batch_size: int = 32,
    dtype: str = "bfloat16",
    about: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    tell: Callable[[CacheSize | str], None] | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> TeacherCache:
    """Runs the original model over the data once, for all of training.

    Args:
        directory: of the cache; one that a killed pass left is finished, a finished one is opened.
        model: the network.
        original: parameters of the original.
        arrays: as for `train`.
        batch_size: examples at a time.
        dtype: of what is kept; bfloat16 takes half the room of float32.
        about: what else the cache is of, such as a fingerprint of the tokenizer.
        mesh: see `train`.
        tell: see `write_cache`.
        advance: see `write_cache`.

    Returns:
        The cache, for `train`.

    Raises:
        ValueError: the directory holds the cache of another model or of other data.
        OSError: the disk has too little room.
    """
    count = len(arrays["inputs"])
    if mesh is None:
        hidden_of = jax.jit(model.hidden)
        placed = jax.device_put(dict(original), jax.devices()[0])
    else:
        split = placement.batch_sharding(mesh)
        shardings = placement.param_shardings(mesh, model)
        hidden_of = jax.jit(model.hidden, in_shardings=(shardings, split), out_shardings=split)
        placed = jax.device_put(dict(original), shardings)

    def batches() -> Iterator[Batch]:
        for start in range(0, count, batch_size):
            # The last batch is filled up from the first rows: one program for all.
            rows = np.arange(start, start + batch_size) % count
            # Weights tell the id of padding that was said at an output's end from padding.
            yield {name: arrays[name][rows] for name in ("inputs", "outputs", "weights")}

    return write_cache(
        directory,
        batches,
        functools.partial(hidden_of, placed),
        {**states_of(fingerprint(original), model.config), **(about or {})},
        width=model.config.emb_dim,
        dtype=dtype,
        pad_id=model.config.pad_id,
        tell=tell,
        advance=advance,
    )


def _describe(
    model: LanguageModel,
    params: Params,
    original: Params,
    arrays: Batch,
    settings: TrainSettings,
    order: np.ndarray | None,
    cached: str | None,
    held_out: Batch | None,
) -> dict[str, Any]:
    start, facts = fingerprint(params), dataclasses.asdict(settings)
    del facts["chunk_bytes"]
    return {
        "settings": facts,
        "model": as_texts(model.config),
        "data": fingerprint(arrays),
        **({} if order is None else {"order": fingerprint(order)}),
        **({} if cached is None else {"cached": cached}),
        **({} if held_out is None else {"held_out": fingerprint(held_out)}),
        "params": start,
        "original": start if original is params else fingerprint(original),
    }


def _longer(
    directory: Path, order: np.ndarray | None, settings: TrainSettings
) -> dict[str, Callable[[Any, Any], bool]]:
    """The order of more steps may differ from the one there behind what that one has."""
    steps = _steps(directory)
    if order is None or steps is None:
        return {}
    before = order[: steps * settings.batch_size]
    return {"order": lambda there, asked: there == fingerprint(before)}


def _settings(directory: Path) -> dict[str, Any]:
    """The settings of the run in a directory."""
    run = directory / "run.json"
    settings = read_object(run).get("settings")
    if not isinstance(settings, dict) or type(settings.get("steps")) is not int:
        raise ValueError(f"{run} says nothing of steps: it is of no training; remove {directory}")
    return settings


def _steps(directory: Path) -> int | None:
    """How many steps the run in a directory is to have; None where there is no run."""
    return _settings(directory)["steps"] if (directory / "run.json").exists() else None


def _require_finite(history: History) -> None:
    finite = np.isfinite(history["loss"])
    if not finite.all():
        raise FloatingPointError(
            f"the loss is {history['loss'][finite.argmin()]} at step {finite.argmin()}: lower "
            "learning_rate or alpha, and check that all token ids are in the vocabulary; the last "
            "checkpoint, if any, is from before"
        )


def _fetch(history: Mapping[str, list[Any]]) -> History:
    """Numbers for the arrays of a history, which are left on the device until they are needed."""
    return {name: [float(value) for value in values] for name, values in history.items()}


class _Display:
    """Shows a run in a progress bar, a few times a second at most."""

    def __init__(self, progress: Progress | None, settings: TrainSettings, name: str, step: int):
        self._progress = progress
        self._batch_size, self._steps = settings.batch_size, settings.steps
        self._first, self._began, self._shown = step, time.monotonic(), 0.0
        if progress is not None:
            self._task = progress.add_task(
                name, total=settings.steps, completed=step, note="compiling"
            )

    def update(self, done: int, history: History) -> None:
        now = time.monotonic()
        last = done == self._steps
        if self._progress is None or (now - self._shown < 0.25 and not last):
            return
        self._shown = now
        recent = {name: float(np.sum(_fetch({name: v[-20:]})[name])) for name, v in history.items()}
        parts = [f"loss {recent['loss'] / min(20, len(history['loss'])):.4f}"]
        if recent["marked"]:
            parts.append(f"still likeliest {100 * recent['said'] / recent['marked']:.0f}%")
        rate = (done - self._first) * self._batch_size / (now - self._began)
        parts.append(f"{rate:.{0 if rate >= 10 else 1}f} examples/s")
        self._progress.update(self._task, completed=done, note=", ".join(parts))
