"""Trains a model folder towards a score: checked, planned, resumed, a folder like it out.

The output has `align.json` (what was done, for machines) and a section in README.md (for people).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from t5patches.editing.data import Batch, to_arrays
from t5patches.editing.edit import model_to_train
from t5patches.editing.fim import FillInTheMiddle
from t5patches.editing.other_text import read_other_text
from t5patches.editing.outputs import (
    ALIGN_RECORD,
    CARD,
    HEADINGS,
    Output,
    card_with,
    lies,
    named,
    record_in,
    recorded,
    require_adapter_to_merge,
    require_unchanged,
    result,
    room_for,
    save_result,
)
from t5patches.editing.plan import MemoryPlan, bfloat16_is_smaller, require_room, show_plan
from t5patches.editing.policy import (
    How,
    PolicySettings,
    align,
    compiled_reading,
    compiled_update,
    largest_rows,
)
from t5patches.editing.programs import MAY_DIFFER, on_first_device, rows_of
from t5patches.editing.records import read_rounds
from t5patches.editing.reward import load_scorer, reward_fingerprint
from t5patches.editing.scores import Scorer
from t5patches.editing.train import training_progress
from t5patches.model import generate, memory
from t5patches.model.batches import by_length
from t5patches.model.huggingface import load_checkpoint
from t5patches.model.protocol import LanguageModel, dtype_named, require_positions
from t5patches.model.tokenizer import Inputs, Tokenizer
from t5patches.model.tokenizer_files import load_tokenizer
from t5patches.runs.files import PathLike
from t5patches.runs.fingerprints import file_fingerprint, json_fingerprint


@dataclasses.dataclass(frozen=True)
class Job:
    """An alignment: what of, towards what, to where.

    Attributes:
        model: the folder to begin with.
        inputs: what it is given.
        output: the folder to make.
        settings: how to train.
        scorer: "module:function" that scores outputs, see `t5patches.editing.scores`; None where a
            reward model does.
        reward: the folder of one, see `t5patches.editing.reward`; None where a function scores.
        pretraining: a file of other text, see `t5patches.editing.other_text`; None for none.
        pretraining_length: tokens of it that are taken of each line.
        fim: which of its texts are told with their middle last; None for none.
        chat: whether inputs are put into the folder's chat template, "on", "off" or "auto".
        dtype: of activations; parameters, sums and the optimizer are float32.
        remat: whether an update runs each layer again in its backward pass instead of holding what
            is inside it.
        merge: whether an adapter (`settings.lora`) is added to the model's kernels and `output` is
            a whole folder; else it is a folder of the adapter alone, to lie beside the model.
    """

    model: PathLike
    inputs: Sequence[Inputs]
    output: PathLike
    settings: PolicySettings
    scorer: str | None = None
    reward: PathLike | None = None
    pretraining: PathLike | None = None
    pretraining_length: int = 256
    fim: FillInTheMiddle | None = None
    chat: str = "auto"
    dtype: str = "float32"
    remat: bool = False
    merge: bool = False


class _Read(NamedTuple):
    """What a job begins with."""

    model: LanguageModel
    tokenizer: Tokenizer
    prompts: list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Checked:
    """A job of which all is known to be right but the weights, and the memory it will take.

    Attributes:
        model: as it is trained.
        scorer: tried on a sample.
        pretraining: arrays of other text; None for none.
        plan: the memory.
        notes: what is going to be done.
    """

    model: LanguageModel
    scorer: Scorer
    pretraining: Batch | None
    plan: MemoryPlan
    notes: Sequence[str]


def align_folder(
    job: Job, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Trains a model folder towards a score.

    Args:
        job: what to do.
        resume: go on with the same job where it was killed, or begin it; checkpoints at other
            steps are no other job.
        console: where progress is shown; None shows nothing.

    Returns:
        The record that the output holds: `history` as `t5patches.editing.policy.Aligned` has it,
        `steps` that made the output, and `collapse`, why there are no more of them, or None.

    Raises:
        ValueError: whatever is wrong with the folder, the data, the scorer or the settings, or does
            not fit into memory, before training; another or an unfinished run is there; the first
            outputs cannot be scored, or all have one score.
        t5patches.editing.policy.Stopped: the scorer fails later; what was reached is kept.
        FloatingPointError: the model collapsed before it learnt anything.
        OSError: the disk is full; what was reached is kept.
    """
    console = console or Console(quiet=True)
    output, read = _output(job), _read(job)
    described = _described(job, read)
    record = output.finished(described, resume=resume)
    if record is not None:
        return record
    checked, lora = _checked(job, read), job.settings.lora
    show_plan(console, checked.notes, checked.plan)

    def write() -> None:
        began = time.monotonic()
        # What was read is not held beside it.
        params = jax.device_put(load_checkpoint(job.model)[1], jax.devices()[0])
        with training_progress(console) as progress:
            aligned = align(
                checked.model,
                params,
                read.tokenizer,
                job.inputs,
                checked.scorer,
                job.settings,
                output.work / "run",
                pretraining=checked.pretraining,
                prompts=read.prompts,
                progress=progress,
            )
        record = recorded(
            described,
            steps=aligned.steps,
            collapse=aligned.collapse,
            history=aligned.history,
            edits=len(read_rounds(job.model)),  # before it
            seconds=round(time.monotonic() - began, 1),
            device=jax.devices()[0].device_kind,
        )
        files = {ALIGN_RECORD: json.dumps(record, indent=1), CARD: _card(job, record)}
        require_unchanged(job.model, described["model"], named(job.model))
        made = result(job.model, aligned.params, lora, merge=job.merge)
        save_result(output.made, checked.model, made, job.model, files)

    state, _ = How.of(job.settings).shapes(checked.model)
    room = room_for(job.model, state, whole=lora is None or job.merge)
    return output.make(described, room, write, MAY_DIFFER)


def plan(job: Job, *, resume: bool = False) -> Checked:
    """Says what `align_folder` would do, and refuses what it would refuse before weights are read.

    Args:
        job: what is to be done.
        resume: see `align_folder`.

    Returns:
        What was read and planned.

    Raises:
        ValueError: naming what is wrong.
    """
    read = _read(job)
    _output(job).finished(_described(job, read), resume=resume)
    return _checked(job, read)


def _output(job: Job) -> Output:
    return Output(job.output, record_in(ALIGN_RECORD), "alignment")


def _read(job: Job) -> _Read:
    require_adapter_to_merge(job.merge, job.settings.lora)
    dtype = dtype_named(job.dtype)
    model, tokenizer = model_to_train(job.model, job.chat)
    model = model.replace(dropout_rate=0.0, dtype=dtype, remat=job.remat)
    return _Read(model, tokenizer, [tokenizer.encode_prompt(text) for text in job.inputs])


def _checked(job: Job, read: _Read) -> Checked:
    settings, model = job.settings, read.model
    pretraining = _other_text(job, read.tokenizer, model)
    scorer = load_scorer(job.scorer, job.reward, job.inputs, settings.max_length)
    notes = [
        f"{settings.steps} steps of {settings.inputs_per_step} of {len(job.inputs)} inputs, "
        f"{settings.samples} outputs to each: "
        f"{(settings.steps + 1) * settings.outputs} outputs of at most {settings.max_length} "
        f"tokens to sample and score, {settings.steps * settings.updates} updates of "
        f"{settings.update_size} outputs"
    ]
    if settings.value is not None:
        notes.append(
            f"advantages against a value head (gamma {settings.value.gamma:g}, lambda "
            f"{settings.value.lam:g})"
        )
    if pretraining is not None:
        notes.append(f"beside each update {settings.update_size} of "
                     f"{len(pretraining['inputs'])} other texts")  # fmt: skip
    plan = _planned(settings, model, [*map(len, read.prompts)], pretraining)
    return Checked(model, scorer, pretraining, plan, notes)


def _other_text(job: Job, tokenizer: Tokenizer, model: LanguageModel) -> Batch | None:
    if job.pretraining is None:
        if job.fim is not None:
            raise ValueError("fim transforms other text, and there is none (--pretraining)")
        return None
    plain = load_tokenizer(job.model, chat="off") if tokenizer.chat else tokenizer
    examples = read_other_text(
        job.pretraining, tokenizer, plain, job.pretraining_length, job.fim, job.settings.seed
    )
    largest = max(max(example.output_ids) for example in examples)
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"{job.pretraining}: a text has the token {largest} and the model "
            f"{model.config.vocab_size} ids: a sentinel is none of its own"
        )
    lengths = np.array([(len(example.input_ids), len(example.output_ids)) for example in examples])
    require_positions(model.config, *lengths.T)
    return to_arrays(examples, pad_id=model.config.pad_id)


def _planned(
    settings: PolicySettings,
    model: LanguageModel,
    lengths: Sequence[int],
    pretraining: Batch | None,
) -> MemoryPlan:
    """The memory, of the programs themselves; what does not fit is refused."""
    how = How.of(settings)
    state, base = how.shapes(model)
    held = memory.held((state, base))
    require_positions(model.config, np.array(lengths), settings.max_length)
    longest = max(lengths)
    at_a_time = max(1, settings.batch_size // settings.samples)
    rows = len(by_length([longest] * settings.inputs_per_step, at_a_time)[0].filled)
    sampling = generate.working_memory(
        model,
        rows=rows,
        input_length=longest,
        max_length=settings.max_length,
        streams=settings.samples,
        sample=True,
        params=on_first_device(jax.eval_shape(how.params, base, state.params)),
    )
    count = rows * settings.samples
    what = f"{count} outputs at a time, to inputs of {longest} tokens"
    require_room(what, sampling, held, count, least=settings.samples)
    read, learnt = largest_rows(model, settings, longest)
    text = () if pretraining is None else rows_of(pretraining, settings.update_size)
    working = max(
        memory.beside((state.params, base), compiled_reading(model, how, read)),
        memory.beside((state, base), compiled_update(model, how, learnt, text)),
    )
    what = f"updates of {settings.update_size} outputs, to inputs of {longest} tokens,"
    less = ["--max-length", "--truncate-inputs", "--skip-longer", "--remat"]
    less += ["--dtype bfloat16"] * bfloat16_is_smaller()
    require_room(
        what,
        working,
        held,
        settings.update_size,
        least=settings.update_size,
        less=(*less, "a smaller --update-size"),
    )
    return MemoryPlan(
        device=jax.devices()[0].device_kind,
        count=1,
        parameters=memory.held((state.params, base if settings.lora else None)),
        optimizer=memory.held(state.optimizer),
        original=memory.held(base if settings.lora is None else None),
        working=max(working, sampling),
        available=None,
    )


def _described(job: Job, read: _Read) -> dict[str, Any]:
    """What makes two jobs the same: files by their content."""
    settings = dataclasses.asdict(job.settings)
    del settings["checkpoint_every"]
    given = list(zip(job.inputs, read.prompts, strict=True))
    return {
        "model": named(job.model),
        "inputs": {"count": len(job.inputs), "sha256": json_fingerprint(given)},
        "scorer": job.scorer,
        "reward": None if job.reward is None else reward_fingerprint(job.reward),
        "pretraining": None if job.pretraining is None else file_fingerprint(job.pretraining),
        "pretraining_length": job.pretraining_length,
        "fim": None if job.fim is None else dataclasses.asdict(job.fim),
        "chat": read.tokenizer.chat,
        "dtype": job.dtype,
        "merge": job.merge,
        "settings": settings,
    }


def _card(job: Job, record: Mapping[str, Any]) -> str:
    """The model card with a section on this at its end."""
    settings, history, job_ = job.settings, record["history"], record["job"]
    lora = settings.lora
    trained = "All parameters were trained"
    if lora is not None:
        where = lies(job.merge, job_["model"]["name"])
        trained = f"An adapter (LoRA) of rank {lora.rank} was trained, {where}"
    kept = f"coefficient {settings.kl_coefficient:g}"
    if settings.target_kl is not None:
        kept += f" at first, adapted towards {settings.target_kl:g} nats a token"
    against = "the other outputs to the same input"
    if settings.value is not None:
        against = f"a value head (explained variance {history['explained_variance'][-1]:.2f})"
    collapse = f"- It ended early: {record['collapse']}.\n" if record["collapse"] else ""
    return card_with(
        job.model,
        f"{HEADINGS[ALIGN_RECORD]}\n\n"
        f"On {record['date']} `t5patches align` trained `{job_['model']['name']}` towards "
        f"`{job.scorer or Path(job.reward or '').name}`.\n\n"
        f"- {trained}: {record['steps']} steps of {settings.inputs_per_step} inputs with "
        f"{settings.samples} outputs each at temperature {settings.temperature:g}, Adam, learning "
        f"rate {settings.learning_rate:g}, seed {settings.seed}.\n"
        f"- Advantages against {against}.\n"
        f"- Kept close to the model it was made from by the exact KL, {kept}.\n"
        f"- Score {history['score'][0]:.4g} at first, {history['score'][-1]:.4g} at last; KL "
        f"{history['kl'][-1]:.4g} nats a token; outputs of {history['length'][0]:.1f} tokens at "
        f"first, {history['length'][-1]:.1f} at last.\n"
        f"{collapse}"
        f"- All settings and the course of the score: `{ALIGN_RECORD}`.\n\n"
        "What else it changed was not measured here: `t5patches evaluate` does.\n",
    )
