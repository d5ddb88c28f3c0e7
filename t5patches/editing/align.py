"""Trains a model folder towards a score: checked, planned, resumed, a folder like it out.

The output has `align.json` (what was done, for machines) and a section in README.md (for people).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from t5patches.editing.data import Batch, to_arrays
from t5patches.editing.edit import (
    ALIGN_RECORD,
    CARD,
    card_before_edits,
    check_chat,
    read_rounds,
)
from t5patches.editing.fim import FillInTheMiddle
from t5patches.editing.other_text import read_other_text
from t5patches.editing.outputs import Output
from t5patches.editing.plan import MemoryPlan, require_room
from t5patches.editing.policy import (
    Aligned,
    How,
    PolicySettings,
    align,
    compiled_reading,
    compiled_update,
    largest_rows,
    state_shapes,
)
from t5patches.editing.programs import rows_of, size, working_memory
from t5patches.editing.reward import load_scorer, reward_fingerprint
from t5patches.editing.scores import Scorer
from t5patches.editing.train import training_progress
from t5patches.model import generate
from t5patches.model.batches import by_length
from t5patches.model.folder import inspect_model
from t5patches.model.huggingface import load_checkpoint, save_checkpoint
from t5patches.model.lora import is_adapter, merged, save_adapter, weights_fingerprint
from t5patches.model.protocol import LanguageModel, require_positions
from t5patches.model.tokenizer import Inputs, Tokenizer
from t5patches.model.tokenizer_files import load_tokenizer
from t5patches.runs.fingerprints import file_fingerprint, json_fingerprint

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

PathLike = str | os.PathLike[str]


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


@dataclasses.dataclass(frozen=True)
class Checked:
    """A job of which all is known to be right but the weights, and the memory it will take.

    Attributes:
        model: as it is trained.
        tokenizer: its own.
        scorer: tried on a sample.
        pretraining: arrays of other text; None for none.
        plan: the memory.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    scorer: Scorer
    pretraining: Batch | None
    plan: MemoryPlan


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
    output, described = Output(job.output, ALIGN_RECORD, "an alignment"), _described(job)
    record = output.finished(described, resume=resume)
    if record is not None:
        return record
    checked = check(job)
    for line in plan_lines(job, checked):
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    def write() -> None:
        began = time.monotonic()
        params = load_checkpoint(job.model)[1]
        try:
            with training_progress(console) as progress:
                aligned = align(
                    checked.model,
                    params,
                    checked.tokenizer,
                    job.inputs,
                    checked.scorer,
                    job.settings,
                    output.work / "run",
                    pretraining=checked.pretraining,
                    progress=progress,
                )
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error}. To try other settings remove {output.work}, which holds this run, or "
                "give another --output"
            ) from error
        record = _record(described, job, aligned, round(time.monotonic() - began, 1))
        files = {ALIGN_RECORD: json.dumps(record, indent=1), CARD: _card(job, record)}
        lora = job.settings.lora
        if lora is None or job.merge:
            made = aligned.params if lora is None else merged(params, aligned.params, lora)
            save_checkpoint(output.made, checked.model, made, like=job.model, files=files)
        else:
            save_adapter(
                output.made, checked.model, aligned.params, lora, base=job.model, files=files
            )

    return output.make(described, _disk_space(job, checked), write)


def check(job: Job) -> Checked:
    """Checks a job and plans its memory; no weights are read.

    Args:
        job: what is to be done.

    Returns:
        What was read and planned.

    Raises:
        ValueError: naming what is wrong.
    """
    if job.merge and job.settings.lora is None:
        raise ValueError("merge adds an adapter to the model, and there is none (--lora)")
    if job.dtype not in _DTYPES:
        raise ValueError(f"dtype is {job.dtype!r}: one of {tuple(_DTYPES)} is needed")
    if is_adapter(job.model):
        raise ValueError(
            f"{job.model} is an adapter and no whole model: align the model that it lies beside, "
            "or one that it was merged with (--merge where it was made)"
        )
    model, tokenizer = inspect_model(job.model, chat=job.chat)
    model = model.replace(dropout_rate=0.0, dtype=_DTYPES[job.dtype], remat=job.remat)
    # Both are read again at the end, when it would be late.
    read_rounds(job.model)
    card_before_edits(job.model)
    check_chat(job.model, job.chat)
    pretraining = _other_text(job, tokenizer, model)
    scorer = load_scorer(job.scorer, job.reward, job.inputs, job.settings.max_length)
    plan = _planned(job, model, tokenizer, pretraining)
    return Checked(model, tokenizer, scorer, pretraining, plan)


def plan_lines(job: Job, checked: Checked) -> list[str]:
    """What is going to be done, for people.

    Args:
        job: what is to be done.
        checked: of `check`.

    Returns:
        Lines.
    """
    settings = job.settings
    lines = [
        f"{settings.steps} steps of {settings.inputs_per_step} of {len(job.inputs)} inputs, "
        f"{settings.samples} outputs to each: "
        f"{(settings.steps + 1) * settings.outputs} outputs of at most {settings.max_length} "
        f"tokens to sample and score, {settings.steps * settings.updates} updates of "
        f"{settings.update_size} outputs"
    ]
    if checked.pretraining is not None:
        lines.append(f"beside each update {settings.update_size} of "
                     f"{len(checked.pretraining['inputs'])} other texts")  # fmt: skip
    return [*lines, checked.plan.text()]


def _other_text(job: Job, tokenizer: Tokenizer, model: LanguageModel) -> Batch | None:
    if job.pretraining is None:
        if job.fim is not None:
            raise ValueError("fim transforms other text, and there is none (--pretraining)")
        return None
    plain = load_tokenizer(job.model, chat="off")
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
    job: Job, model: LanguageModel, tokenizer: Tokenizer, pretraining: Batch | None
) -> MemoryPlan:
    """The memory, of the programs themselves; what does not fit is refused."""
    settings, how = job.settings, How.of(job.settings)
    state, base = state_shapes(model, how)
    held = sum(map(size, (base, state)))
    lengths = [len(tokenizer.encode_prompt(text)) for text in job.inputs]
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
    )
    count = rows * settings.samples
    what = f"{count} outputs at a time, to inputs of {longest} tokens"
    require_room(what, sampling, held, count, least=settings.samples)
    read, learnt = largest_rows(model, settings, longest)
    text = () if pretraining is None else rows_of(pretraining, settings.update_size)
    working = max(
        working_memory(compiled_reading(model, how, read), (state.params, base)),
        working_memory(compiled_update(model, how, learnt, text), (state, base)),
    )
    what = f"updates of {settings.update_size} outputs, to inputs of {longest} tokens,"
    less = ("--max-length", "--truncate-inputs", "--skip-longer", "--remat", "--dtype bfloat16")
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
        parameters=size(state.params) + (0 if settings.lora is None else size(base)),
        optimizer=size(state.optimizer),
        original=size(base) if settings.lora is None else 0,
        working=max(working, sampling),
        available=None,
    )


def _disk_space(job: Job, checked: Checked) -> int:
    """Room for the folder, and for two checkpoints of the run: the last and the next."""
    state = size(state_shapes(checked.model, How.of(job.settings))[0])
    folder = sum(f.stat().st_size for f in Path(job.model).iterdir() if f.is_file())
    whole = job.settings.lora is None or job.merge
    return 2 * state + (folder if whole else state)


def _described(job: Job) -> dict[str, Any]:
    """What makes two jobs the same: files by their content."""
    settings = dataclasses.asdict(job.settings)
    del settings["checkpoint_every"]
    tokenizer = inspect_model(job.model, chat=job.chat)[1]
    given = [(text, tokenizer.encode_prompt(text)) for text in job.inputs]
    described = {
        "model": {"name": Path(job.model).name, "sha256": weights_fingerprint(job.model)},
        "inputs": {
            "count": len(job.inputs),
            "sha256": json_fingerprint(given),
        },
        "scorer": job.scorer,
        "reward": None if job.reward is None else reward_fingerprint(job.reward),
        "pretraining": None if job.pretraining is None else file_fingerprint(job.pretraining),
        "pretraining_length": job.pretraining_length,
        "fim": None if job.fim is None else dataclasses.asdict(job.fim),
        "chat": tokenizer.chat,
        "dtype": job.dtype,
        "merge": job.merge,
        "settings": settings,
    }
    return json.loads(json.dumps(described))


def _record(
    described: Mapping[str, Any], job: Job, aligned: Aligned, seconds: float
) -> dict[str, Any]:
    return {
        "job": described,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "steps": aligned.steps,
        "collapse": aligned.collapse,
        "history": aligned.history,
        "seconds": seconds,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def _card(job: Job, record: Mapping[str, Any]) -> str:
    """The model card with a section on this at its end."""
    path = Path(job.model) / CARD
    before = path.read_text(encoding="utf-8").rstrip() + "\n\n" if path.exists() else ""
    settings, history, job_ = job.settings, record["history"], record["job"]
    lora = settings.lora
    trained = "All parameters were trained"
    if lora is not None:
        left = "added to its kernels" if job.merge else f"to lie beside `{job_['model']['name']}`"
        trained = f"An adapter (LoRA) of rank {lora.rank} was trained, {left}"
    kept = f"coefficient {settings.kl_coefficient:g}"
    if settings.target_kl is not None:
        kept += f" at first, adapted towards {settings.target_kl:g} nats a token"
    collapse = f"- It ended early: {record['collapse']}.\n" if record["collapse"] else ""
    return (
        f"{before}## Aligned with a score\n\n"
        f"On {record['date']} `t5patches align` trained `{job_['model']['name']}` towards "
        f"`{job.scorer or Path(job.reward or '').name}`.\n\n"
        f"- {trained}: {record['steps']} steps of {settings.inputs_per_step} inputs with "
        f"{settings.samples} outputs each at temperature {settings.temperature:g}, Adam, learning "
        f"rate {settings.learning_rate:g}, seed {settings.seed}.\n"
        f"- Kept close to the model it was made from by the exact KL, {kept}.\n"
        f"- Score {history['score'][0]:.4g} at first, {history['score'][-1]:.4g} at last; KL "
        f"{history['kl'][-1]:.4g} nats a token; outputs of {history['length'][0]:.1f} tokens at "
        f"first, {history['length'][-1]:.1f} at last.\n"
        f"{collapse}"
        f"- All settings and the course of the score: `{ALIGN_RECORD}`.\n\n"
        "What else it changed was not measured here: `t5patches evaluate` does.\n"
    )
