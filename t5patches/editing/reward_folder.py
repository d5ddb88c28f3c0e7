"""Trains a reward model from a model folder: checked, planned, resumed, a folder like it out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from t5patches.editing.data import Batch
from t5patches.editing.edit import model_to_train
from t5patches.editing.evaluate import over_inputs
from t5patches.editing.outputs import (
    CARD,
    HEADINGS,
    REWARD_RECORD,
    Output,
    card_with,
    named,
    record_in,
    recorded,
    require_unchanged,
    result,
    room_for,
    save_result,
)
from t5patches.editing.plan import MemoryPlan, require_room, show_plan
from t5patches.editing.programs import BELOW, MAY_DIFFER, WEIGHT, rows_of
from t5patches.editing.reward import (
    How,
    Pair,
    Reward,
    RewardSettings,
    compiled_update,
    pair_arrays,
    read_pairs,
    record_text,
    repeats,
    split,
    train_reward,
)
from t5patches.editing.train import training_progress
from t5patches.model import memory
from t5patches.model.huggingface import load_checkpoint
from t5patches.model.lora import weights_fingerprint
from t5patches.model.protocol import LanguageModel, require_positions
from t5patches.model.tokenizer import Tokenizer
from t5patches.runs.claims import remove
from t5patches.runs.files import PathLike, write_file
from t5patches.runs.fingerprints import file_fingerprint


@dataclasses.dataclass(frozen=True)
class Job:
    """A reward model: of what, from which preferences, to where.

    Attributes:
        model: the folder to begin with.
        preferences: a file of pairs, see `t5patches.editing.reward.read_pairs`.
        output: the folder to make.
        settings: how to train.
        chat: whether inputs are put into the folder's chat template, "on", "off" or "auto".
    """

    model: PathLike
    preferences: PathLike
    output: PathLike
    settings: RewardSettings
    chat: str = "auto"


@dataclasses.dataclass(frozen=True)
class Checked:
    """A job of which all is known to be right but the weights, and the memory it will take.

    Attributes:
        model: as it is trained.
        pairs: to train on.
        held_out: the others.
        plan: the memory.
        notes: what is there more than once, or both ways.
    """

    model: LanguageModel
    pairs: Batch
    held_out: Sequence[Pair]
    plan: MemoryPlan
    notes: Sequence[str]


def reward_folder(
    job: Job, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Trains a reward model from a folder.

    Args:
        job: what to do.
        resume: go on with the same job where it was killed, or begin it; checkpoints at other
            steps are no other job.
        console: where progress is shown; None shows nothing.

    Returns:
        The record that the output holds, with `accuracy`: the share of held-out pairs whose chosen
        output has the higher reward, as the folder that was written gives it, with its standard
        error over their inputs; None where none are held out.

    Raises:
        ValueError: whatever is wrong with the folder, the pairs or the settings, or does not fit
            into memory, before training; another or an unfinished run is there.
        FloatingPointError: the loss stopped being a number.
        OSError: the disk is full; what was reached is kept.
    """
    console = console or Console(quiet=True)
    output = _output(job)
    model, tokenizer = model_to_train(job.model, job.chat)
    described = _described(job, tokenizer)
    record = output.finished(described, resume=resume)
    if record is not None:
        return record
    checked = _checked(job, model, tokenizer)
    show_plan(console, checked.notes, checked.plan)

    def write() -> None:
        began = time.monotonic()
        # What was read is not held beside it.
        params = jax.device_put(load_checkpoint(job.model)[1], jax.devices()[0])
        with training_progress(console) as progress:
            trained = train_reward(
                checked.model,
                params,
                checked.pairs,
                job.settings,
                output.work / "run",
                progress=progress,
            )
        record = recorded(
            described,
            pairs=len(checked.pairs["inputs"]),
            held_out=len(checked.held_out),
            history=trained.history,
            device=jax.devices()[0].device_kind,
        )
        weight = np.asarray(trained.params[WEIGHT])
        written = output.work / "written"
        if written.exists():
            remove(written)  # of a run that was killed as it measured
        require_unchanged(job.model, described["model"], named(job.model))
        made = result(job.model, trained.params[BELOW], job.settings.lora, merge=True)
        save_result(written, checked.model, made, job.model, {})
        beneath = weights_fingerprint(written)
        write_file(written / REWARD_RECORD, record_text(record, weight, beneath))
        # By the folder itself: its numbers may be rounded to the model's own type.
        accuracy = _accuracy(Reward(written, batch_size=job.settings.batch_size), checked.held_out)
        record |= {"accuracy": accuracy, "seconds": round(time.monotonic() - began, 1)}
        write_file(written / CARD, _card(job, record))
        write_file(written / REWARD_RECORD, record_text(record, weight, beneath))
        written.rename(output.made)

    state, _ = How(job.settings.learning_rate, job.settings.lora).shapes(checked.model)
    return output.make(described, room_for(job.model, state, whole=True), write, MAY_DIFFER)


def plan(job: Job, *, resume: bool = False) -> Checked:
    """Says what `reward_folder` would do, and refuses what it would refuse before weights are read.

    Args:
        job: what is to be done.
        resume: see `reward_folder`.

    Returns:
        What was read and planned.

    Raises:
        ValueError: naming what is wrong.
    """
    model, tokenizer = model_to_train(job.model, job.chat)
    _output(job).finished(_described(job, tokenizer), resume=resume)
    return _checked(job, model, tokenizer)


def _output(job: Job) -> Output:
    return Output(job.output, record_in(REWARD_RECORD), "reward model")


def _checked(job: Job, model: LanguageModel, tokenizer: Tokenizer) -> Checked:
    model = model.replace(dropout_rate=0.0)
    pairs = read_pairs(job.preferences, tokenizer)
    lengths = [(len(e.input_ids), len(e.output_ids)) for pair in pairs for e in pair]
    require_positions(model.config, *np.array(lengths).T)
    again, both = repeats(pairs)
    trained_on, held_out = split(pairs, job.settings.held_out, job.settings.seed)
    notes = [f"{len(trained_on)} pairs to train on, {len(held_out)} held out"]
    if again:
        notes.append(f"{again} pairs repeat another one, and count each time")
    if both:
        notes.append(f"{both} pairs are there both ways, and cancel one another")
    arrays = pair_arrays(trained_on, model.config.pad_id)
    return Checked(model, arrays, held_out, _planned(job.settings, model, arrays), notes)


def _planned(settings: RewardSettings, model: LanguageModel, pairs: Batch) -> MemoryPlan:
    """The memory, of the program itself; what does not fit is refused."""
    how = How(settings.learning_rate, settings.lora)
    state, base = how.shapes(model)
    program = compiled_update(model, how, rows_of(pairs, settings.batch_size))
    working, held = memory.beside((state, base), program), memory.held((state, base))
    longest = pairs["inputs"].shape[1]
    what = f"updates of {settings.batch_size} pairs of outputs, to inputs of {longest} tokens,"
    less = ("of the preferences",)
    require_room(what, working, held, settings.batch_size, less=less)
    return MemoryPlan(
        device=jax.devices()[0].device_kind,
        count=1,
        # What it starts from is held too, where all of it is trained.
        parameters=memory.held((state.params, base)),
        optimizer=memory.held(state.optimizer),
        original=0,
        working=working,
        available=None,
    )


def _accuracy(reward: Reward, pairs: Sequence[Pair]) -> dict[str, Any] | None:
    """How often the chosen one of two has the higher reward."""
    if not pairs:
        return None
    inputs = [chosen.inputs for chosen, _ in pairs]
    chosen, rejected = (reward([pair[i].outputs for pair in pairs], inputs) for i in (0, 1))
    return over_inputs(inputs, chosen > rejected).numbers


def _described(job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    """What makes two jobs the same: files by their content."""
    settings = dataclasses.asdict(job.settings)
    del settings["checkpoint_every"]
    return {
        "model": named(job.model),
        "preferences": file_fingerprint(job.preferences),
        "chat": tokenizer.chat,
        "settings": settings,
    }


def accuracy_text(accuracy: Mapping[str, Any] | None) -> str:
    """The accuracy for people.

    Args:
        accuracy: of a record.

    Returns:
        A few words.
    """
    if accuracy is None:
        return "no pairs held out"
    value, error = accuracy["value"], accuracy["error"]
    about = "" if error is None else f" ± {100 * error:.1f}"
    return f"{100 * value:.1f}%{about} of the held-out pairs"


def _card(job: Job, record: Mapping[str, Any]) -> str:
    """The model card with a section on this at its end."""
    settings, history = job.settings, record["history"]
    return card_with(
        job.model,
        f"{HEADINGS[REWARD_RECORD]}\n\n"
        f"On {record['date']} `t5patches reward` made this of `{record['job']['model']['name']}`: "
        f"a scalar head, in `{REWARD_RECORD}`, on the state that predicts an output's end.\n\n"
        f"- {record['pairs']} pairs, {settings.epochs} epochs, Adam, learning rate "
        f"{settings.learning_rate:g}, seed {settings.seed}; loss {history['loss'][0]:.4g} at the "
        f"first, {history['loss'][-1]:.4g} at the last update.\n"
        f"- In the order that people gave: {accuracy_text(record['accuracy'])}.\n"
        "- Only differences between outputs to the same input mean something.\n",
    )
