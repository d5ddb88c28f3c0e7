"""Edits a model folder: checks everything, plans the memory, trains, writes a folder like it.

A run lives in OUTPUT.unfinished beside the folder that it will make. OUTPUT appears by a rename,
whole, with `t5patches.json` (what was done, for machines) and a section in README.md (for people).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from t5patches.editing.annotate import mark_nothing, require_room_to_speak, speak
from t5patches.editing.data import (
    Batch,
    Example,
    Limits,
    Source,
    corrected_examples,
    largest_set,
    read_examples,
    read_kept,
    said_is_pushed_down,
    to_arrays,
    training_arrays,
    within,
)
from t5patches.editing.held_out import held_out_examples, held_out_inputs
from t5patches.editing.mixing import mixing_rates, mixture_order, with_share
from t5patches.editing.outputs import (
    CARD,
    RECORD,
    Output,
    require_adapter_to_merge,
    require_unchanged,
    result,
    room_for,
    save_result,
)
from t5patches.editing.plan import (
    MemoryPlan,
    plan_memory,
    require_memory,
    show_plan,
    with_larger_chunks,
)
from t5patches.editing.records import (
    card_before_edits,
    card_of,
    check_chat,
    read_rounds,
    record_of,
)
from t5patches.editing.templates import read_templates, template_items
from t5patches.editing.train import (
    KEEPING,
    NO_SETS,
    WITH_ORIGINAL,
    Batches,
    Params,
    Step,
    Trained,
    TrainSettings,
    cache_teacher,
    in_dtype,
    may_differ,
    train,
    training_progress,
)
from t5patches.model.folder import inspect_model
from t5patches.model.huggingface import inspect_checkpoint, load_checkpoint
from t5patches.model.lora import require_whole, weight_fingerprints
from t5patches.model.memory import size
from t5patches.model.placement import make_mesh
from t5patches.model.protocol import (
    LanguageModel,
    architecture,
    differing,
    dtype_named,
    require_positions,
)
from t5patches.model.teacher_cache import TeacherCache
from t5patches.model.tokenizer import Inputs, Tokenizer, messages_of, same_vocabulary
from t5patches.model.tokenizer_files import TOKENIZER_FILES, load_tokenizer, uses_chat
from t5patches.runs import hosts
from t5patches.runs.claims import Parts
from t5patches.runs.files import PathLike, require_writable, unfinished
from t5patches.runs.fingerprints import file_fingerprint


@dataclasses.dataclass(frozen=True)
class Job:
    """An edit: what of, with what, to where.

    Attributes:
        model: the folder to edit.
        data: files of outputs to push down, see `t5patches.editing.data`.
        output: the folder to make.
        settings: how to train; `negatives` is taken from the data where `negatives` below is None.
        original: the folder of the model to stay close to; None is `model`.
        negatives: ids that a marked position loses at most; 0 is only the one that was said; None
            is all that the data names, or 0 for objectives that take no sets.
        max_input_length: a longer input is an error; None lets all pass.
        max_output_length: the same for outputs.
        truncate_inputs: inputs are cut to so many tokens; None cuts none.
        skip_longer: examples with more tokens on either side are left out; None leaves out none.
        rates: how often each data file is drawn from; None goes by size.
        cap: a larger file counts as this many examples.
        keep: a file of inputs to which the model is to answer as the original does, see
            `t5patches.editing.data.read_kept`. Where a line has no output, the original makes one,
            sampled at temperature 1 and cut at the length of the longest output in `data`.
        keep_share: how much of what is drawn is of `keep`, whatever its size.
        temperature: evens the rates out, see `t5patches.editing.mixing.mixing_rates`.
        templates: a file of instructions to put around the inputs.
        dropout: of the model being trained.
        dtype: of activations; parameters, sums and the optimizer are float32.
        remat: whether an update runs each layer again in its backward pass instead of holding what
            is inside it.
        model_parallel: over how many devices the vocabulary is split.
        devices: how many to use; None is all.
        cache_teacher: where the original's hidden states are kept, computed once and for any
            later edit that needs the same; None runs it at every update.
        chat: whether inputs are put into the folder's chat template, "on" or "off"; "auto" is "on"
            where it has one.
        merge: whether an adapter (`settings.lora`) is added to the model's kernels and `output` is
            a whole folder; else it is a folder of the adapter alone, to lie beside the model.
    """

    model: PathLike
    data: Sequence[PathLike]
    output: PathLike
    settings: TrainSettings
    original: PathLike | None = None
    negatives: int | None = None
    max_input_length: int | None = None
    max_output_length: int | None = None
    truncate_inputs: int | None = None
    skip_longer: int | None = None
    rates: Sequence[float] | None = None
    cap: int | None = None
    temperature: float = 1.0
    keep: PathLike | None = None
    keep_share: float = 0.5
    templates: PathLike | None = None
    dropout: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    model_parallel: int = 1
    devices: int | None = None
    cache_teacher: PathLike | None = None
    chat: str = "auto"
    merge: bool = False


@dataclasses.dataclass(frozen=True)
class Checked:
    """A job of which all is known to be right but the weights, and the memory it will take.

    Attributes:
        model: as it is trained.
        arrays: the data.
        order: which rows come when; None for one file.
        settings: with the size of the sets.
        mesh: of the devices; None for one.
        step: the compiled update.
        plan: the memory.
        counts: examples, tokens that count, marked ones, and those in the place of which only
            others are pushed down.
        notes: for each data file, what was cut or left out of it; the lengths of batches.
        unsaid: by row of `arrays`, the inputs whose outputs the original is yet to make; until then
            they stand there as long as they may become.
        most: tokens that such an output may have.
        held_out: the data that is not trained on, with `settings.until`.
    """

    model: LanguageModel
    arrays: Batch
    order: np.ndarray | None
    settings: TrainSettings
    mesh: Mesh | None
    step: Step
    plan: MemoryPlan
    counts: Mapping[str, int]
    notes: Sequence[str] = ()
    unsaid: Mapping[int, Inputs] = dataclasses.field(default_factory=dict)
    most: int = 0
    held_out: Batch | None = None


def edit(job: Job, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Edits a model folder.

    Args:
        job: what to do.
        resume: go on with the same job where it was killed, or begin it. More steps than then
            (where the rate is constant), and checkpoints at other steps, are no other job.
        console: where progress is shown; None shows nothing.

    Returns:
        The record of the edit, as `read_rounds` gives it last.

    Raises:
        ValueError: whatever is wrong with folders, data or settings, or does not fit into memory,
            before training; another or an unfinished edit is there.
        FloatingPointError: the loss stopped being a number.
        OSError: the disk is full; what was reached is kept.
    """
    console = console or Console(quiet=True)
    output, described, record = _there(job, resume)
    if record is not None:
        return record
    checked = check(job)
    show_plan(console, checked.notes, checked.plan)

    def write() -> None:
        began = time.monotonic()
        trained, done = _trained(job, checked, output.work, console)
        params = hosts.whole(trained.params)
        require_unchanged(job.model, described["model"], _weights(job.model))
        made = result(job.model, params, done.settings.lora, merge=job.merge)
        trained = trained._replace(params=made[0])
        record = record_of(described, done.counts, done.plan, output.work / "run", trained)
        record["seconds"] = round(time.monotonic() - began, 1)
        files = {RECORD: json.dumps({"rounds": [*read_rounds(job.model), record]}, indent=1)}
        files[CARD] = card_of(job.model, record)
        hosts.once(lambda: save_result(output.made, done.model, made, job.model, files))

    state = (checked.step.state, checked.step.state.params if checked.held_out else None)
    room = room_for(job.model, state, whole=checked.settings.lora is None or job.merge)
    return output.make(described, room, write, may_differ(job.settings))


def plan(job: Job, *, resume: bool = False) -> Checked:
    """Says what `edit` would do, and refuses what it would refuse before weights are read.

    Args:
        job: see `edit`.
        resume: see `edit`.

    Returns:
        What was read and planned.

    Raises:
        ValueError: see `edit`.
    """
    _there(job, resume)
    return check(job)


def _there(job: Job, resume: bool) -> tuple[Output, dict[str, Any], dict[str, Any] | None]:
    """The folder to make, what makes two jobs the same, and the record of a finished one."""
    for folder in (job.model, job.original or job.model):
        require_whole(folder)
    output = Output(job.output, lambda folder: [None, *read_rounds(folder)][-1], "edit")
    described = _described(job)
    return output, described, output.finished(described, resume=resume)


def check(job: Job) -> Checked:
    """Checks a job and plans its memory; no weights are read.

    Args:
        job: what is to be done.

    Returns:
        What was read and planned.

    Raises:
        ValueError: naming what is wrong.
    """
    if not 0 <= job.dropout < 1:
        raise ValueError(f"dropout is {job.dropout}: a rate from 0 to below 1 is needed")
    require_adapter_to_merge(job.merge, job.settings.lora)
    if job.keep is None and job.keep_share != Job.keep_share:
        raise ValueError(f"keep_share is {job.keep_share} and there is nothing to keep (--keep)")
    if job.keep is not None and job.settings.objective not in KEEPING:
        raise ValueError(
            f"{job.settings.objective} learns nothing from outputs of which nothing is pushed "
            f"down: leave --keep out, or use one of {KEEPING}"
        )
    require_writable(Path(job.output).absolute().parent, "the place of output")
    if job.cache_teacher is not None:
        if not Path(job.cache_teacher).exists():
            require_writable(job.cache_teacher, "cache_teacher")
        cache, output = (Path(folder).resolve() for folder in (job.cache_teacher, job.output))
        # What is unfinished is removed at the end, with all in it.
        if output.is_relative_to(cache) or {output, unfinished(output)} & {cache, *cache.parents}:
            raise ValueError(
                f"cache_teacher is {job.cache_teacher} and output {job.output}: neither may be in "
                "the other's place or within it: keep the cache in a folder of its own"
            )
    dtype = dtype_named(job.dtype)
    model, tokenizer = model_to_train(job.model, job.chat)
    model = model.replace(dropout_rate=job.dropout, dtype=dtype, remat=job.remat)
    _check_original(job, tokenizer)
    _check_data(job.data)
    templates = None if job.templates is None else read_templates(job.templates)
    sets, kept, notes = _read_all(job, tokenizer, model.config.vocab_size)
    all_examples = [example for part in sets for example in part]
    settings = _with_negatives(job, all_examples)
    most = max(len(example.output_ids) for example in all_examples)
    held: list[Example] = []
    if settings.until is not None:
        sets, kept, held, note = _hold_out(job, sets, kept, tokenizer)
        notes.append(note)
    if templates is not None:
        sets, (kept, held) = (
            [template_items(items, templates, tokenizer, settings.seed) for items in parts]
            for parts in (sets, (kept, held))
        )
    examples = [example for part in sets for example in part]
    first, unsaid = len(examples), {}
    for row, item in enumerate(kept, start=first):
        if isinstance(item, Source):
            unsaid[row] = item.inputs
            item = _to_be_said(item.inputs, most, tokenizer)
        examples.append(item)
    given = [*examples, *held]
    if settings.objective in ("ce", "dpo"):  # which train on corrections, that may be longer
        corrected = corrected_examples(examples[:first], tokenizer)
        _check_lengths(job, corrected)
        given += corrected
    lengths = np.array([(len(example.input_ids), len(example.output_ids)) for example in given])
    require_positions(model.config, *lengths.T)
    if unsaid:
        _require_room_to_say(job, model, [*unsaid.values()], tokenizer, most)
    arrays = training_arrays(
        examples,
        tokenizer,
        settings.objective,
        pad_id=model.config.pad_id,
        negatives=settings.negatives,
    )
    counts = _counts(arrays)
    if settings.objective != "ce" and not (counts["marked"] or counts["only others"]):
        raise ValueError(
            f"{', '.join(map(str, job.data))}: nothing is marked in any of {first} "
            "examples, so there is nothing to edit away: give spans (or run `t5patches annotate`)"
        )
    held_out = None
    if held:
        most_ids = max(1, largest_set(held))
        held_out = to_arrays(held, pad_id=model.config.pad_id, negatives=most_ids)
    order = _order(job, settings, [len(part) for part in sets], len(kept))
    mesh = _mesh(job)
    cached, own = job.dtype if job.cache_teacher else None, job.original is not None
    step = Step(model, settings, arrays, mesh, cached=cached, own_original=own)
    settings = with_larger_chunks(step, settings, mesh)
    step = step.with_settings(settings)
    memory = plan_memory(step, settings, mesh)
    require_memory(memory, settings, mesh, bfloat16=job.dtype == "bfloat16", remat=job.remat)
    notes += _told_lengths(Batches(arrays, settings, model.config.pad_id, order).shapes())
    return Checked(
        model,
        arrays,
        order,
        settings,
        mesh,
        step,
        memory,
        counts,
        notes,
        unsaid=unsaid,
        most=most,
        held_out=held_out,
    )


def _told_lengths(shapes: Mapping[tuple[int, int], int]) -> list[str]:
    """A note of the lengths that updates are padded to, where there are several."""
    if len(shapes) == 1:
        return []
    told = (
        f"{count} to {inputs} and {outputs} tokens"
        for (inputs, outputs), count in sorted(shapes.items(), reverse=True)
    )
    return [
        f"updates padded, inputs and outputs: {', '.join(told)}; each of these is compiled once"
    ]


def model_to_train(folder: PathLike, chat: str) -> tuple[LanguageModel, Tokenizer]:
    """Checks what a run begins with, and all of it that is read again at the end.

    Args:
        folder: of a whole model.
        chat: whether inputs are put into its chat template, "on", "off" or "auto".

    Returns:
        The network and its tokenizer; no weights are read.

    Raises:
        ValueError: naming what is wrong, or it is an adapter.
    """
    require_whole(folder)
    found = inspect_model(folder, chat=chat)
    read_rounds(folder)
    card_before_edits(folder)
    check_chat(folder, chat)
    return found


def _check_original(job: Job, tokenizer: Tokenizer) -> None:
    if job.original is None:
        return
    objective, until = job.settings.objective, job.settings.until
    if objective not in WITH_ORIGINAL and until is None and job.keep is None:
        raise ValueError(
            f"{objective} keeps close to no original, and {job.original} would be read for nothing:"
            f" leave original out, or use one of {WITH_ORIGINAL}"
        )
    require_whole(job.original)
    there, here = inspect_checkpoint(job.original), inspect_checkpoint(job.model)
    there = there.replace(dropout_rate=here.config.dropout_rate)
    if there != here:
        raise ValueError(
            f"the original in {job.original} and the model in {job.model} must be of the same "
            f"sizes, and differ in {', '.join(differing(there.config, here.config)) or 'family'}"
        )
    if not same_vocabulary(load_tokenizer(job.original, chat="off"), tokenizer):
        raise ValueError(
            f"the original in {job.original} is given the tokens of {job.model}, and its tokenizer "
            "writes some token otherwise: give an original with the same tokenizer"
        )
    original = _weights(job.original)["sha256"]
    rounds = [round_["job"] for round_ in read_rounds(job.model)]
    first = next((i for i, r in enumerate(rounds) if r["model"]["sha256"] == original), len(rounds))
    given = {file_fingerprint(file) for file in job.data}
    earlier = {digest: name for r in rounds[first:] for name, digest in r["data"].items()}
    left_out = sorted(name for digest, name in earlier.items() if digest not in given)
    if left_out:
        # Measured: a second round so undoes the first one altogether.
        raise ValueError(
            f"{job.original} still has the habits that were edited away since, and they would come "
            f"back: give those files as data too ({', '.join(left_out)}), or leave the original "
            "out, and the model itself is kept close to"
        )


def _check_data(files: Sequence[PathLike]) -> None:
    """Refuses to count data twice."""
    seen: dict[str, PathLike] = {}
    for file in files:
        content = file_fingerprint(file)
        if content in seen:
            raise ValueError(
                f"{os.fspath(seen[content])} and {os.fspath(file)} are data of the same content: "
                "give it once, and rates (--rates) where it is to be drawn from more often"
            )
        seen[content] = file


def _read_all(
    job: Job, tokenizer: Tokenizer, vocab_size: int
) -> tuple[list[list[Example]], list[Source | Example], list[str]]:
    """The examples of each data file, what is kept, and what was cut or left out of them.

    What is wrong with any of the files is told of all.
    """
    limits = Limits(job.truncate_inputs, job.skip_longer)
    longest: dict[str, Any] = {
        "max_input_length": job.max_input_length,
        "max_output_length": job.max_output_length,
    }
    files: list[tuple[PathLike, Callable[..., Sequence[Any]]]]
    files = [(file, read_examples) for file in job.data]
    if job.keep is not None:
        files.append((job.keep, read_kept))
    found: list[list[Any]] = []
    notes, problems = [], []
    for file, read in files:
        try:
            items = read(file, tokenizer, **longest)
            _check_ids(file, items, vocab_size)
            left = within(items, limits, tokenizer)
        except ValueError as error:
            named = os.fspath(file) in str(error)
            problems.append(str(error) if named else f"{os.fspath(file)}: {error}")
            continue
        if limits != Limits():
            notes.append(f"{os.fspath(file)}: {left.text(limits)}")
        found.append(left.kept)
    if problems:
        raise ValueError("\n".join(problems))
    return found[: len(job.data)], found[-1] if job.keep is not None else [], notes


def _check_lengths(job: Job, corrected: Sequence[Example]) -> None:
    """Refuses corrections that are longer than outputs may be."""
    limits = [x for x in (job.max_output_length, job.skip_longer) if x is not None]
    most = min(limits, default=math.inf)
    longer = [i for i, e in enumerate(corrected, start=1) if len(e.output_ids) > most]
    if longer:
        raise ValueError(
            f"{len(longer)} of {len(corrected)} corrections have more than {most} tokens (the "
            f"first is of example {longer[0]} of those within the limits): shorten them, or raise "
            "--max-output-length or --skip-longer"
        )


def _check_ids(file: PathLike, items: Sequence[Source | Example], vocab_size: int) -> None:
    for number, example in enumerate(items, start=1):
        if isinstance(example, Source):
            continue
        largest = max((*example.output_ids, *example.input_ids))
        if largest >= vocab_size:
            raise ValueError(
                f"{file}: example {number} has the token {largest} and the model "
                f"{vocab_size} ids: was the file made with another model?"
            )


def _hold_out(
    job: Job,
    sets: Sequence[Sequence[Example]],
    kept: Sequence[Source | Example],
    tokenizer: Tokenizer,
) -> tuple[list[list[Example]], list[Source | Example], list[Example], str]:
    """The data without what is held out, what is held out, and a note of it.

    Inputs are told apart as they are in the files: with templates around them, or where a chat
    template holds the date, outputs to one input have several prompts, and would be trained on and
    held out.
    """
    examples = [example for part in sets for example in part]
    known = frozenset(held_out_inputs(examples, job.settings.seed))
    held = held_out_examples(examples, known)
    # Two inputs may be one to the model, such as those that differ in spaces.
    prompts = {e.input_ids for e in examples if messages_of(e.inputs) in known}
    left = [[example for example in part if example.input_ids not in prompts] for part in sets]
    for file, part in zip(job.data, left, strict=True):
        if not part:
            raise ValueError(
                f"{file}: until holds out all that it has, {len(known)} inputs of all files being "
                "held out: give more data, or leave until out"
            )
    note = (
        f"held out to stop by: {len(held)} outputs to {len(known)} inputs, of {len(examples)} to "
        f"{len({messages_of(example.inputs) for example in examples})}"
    )
    asked = (
        item.input_ids if isinstance(item, Example) else tokenizer.encode_prompt(item.inputs)
        for item in kept
    )
    others = [
        item
        for item, prompt in zip(kept, asked, strict=True)
        if messages_of(item.inputs) not in known and prompt not in prompts
    ]
    if kept and not others:
        raise ValueError(
            f"{job.keep}: until holds out all {len(kept)} inputs that it has: give other inputs to "
            "keep, or leave until out"
        )
    if len(others) < len(kept):
        note += f"; these are also {len(kept) - len(others)} of the {len(kept)} inputs to keep"
    return left, others, held, note


def _to_be_said(inputs: Inputs, most: int, tokenizer: Tokenizer) -> Example:
    """An example in the place of the one that the original will make."""
    prompt = tokenizer.encode_prompt(inputs)
    return Example(inputs, "", (), prompt, (tokenizer.eos_id,) * most, (False,) * most)


def _require_room_to_say(
    job: Job, model: LanguageModel, inputs: Sequence[Inputs], tokenizer: Tokenizer, most: int
) -> None:
    if jax.process_count() > 1:
        raise NotImplementedError(
            f"several processes let no model speak, and {len(inputs)} of the inputs to keep have "
            "no outputs: make them with `t5patches annotate`, and give its file"
        )
    require_room_to_speak(
        model,
        inputs,
        tokenizer,
        max_length=most,
        temperature=_TEMPERATURE,
        batch_size=job.settings.batch_size,
        beside=size(model.param_shapes()),
    )


# What the original says of itself: the mean of a divergence over its samples is that of the whole
# distribution of its outputs.
_TEMPERATURE = 1.0


def _with_negatives(job: Job, examples: Sequence[Example]) -> TrainSettings:
    negatives, there = job.negatives, largest_set(examples)
    if negatives and not there:
        raise ValueError(
            f"negatives is {negatives} and the data names no alternatives to what was said: make "
            "them with `t5patches annotate --expand`, or leave negatives out"
        )
    if negatives is None:
        negatives = 0 if job.settings.objective in NO_SETS else there
    return dataclasses.replace(job.settings, negatives=negatives)


def _order(job: Job, settings: TrainSettings, sizes: Sequence[int], kept: int) -> np.ndarray | None:
    if len(sizes) > 1:
        rates = mixing_rates(sizes, cap=job.cap, temperature=job.temperature, rates=job.rates)
    elif job.rates is not None or job.cap is not None or job.temperature != 1:
        raise ValueError("rates, cap and temperature mix several data files, and there is one")
    else:
        rates = (1.0,)
    if kept:
        rates = with_share(rates, job.keep_share)
        sizes = [*sizes, kept]
    if len(sizes) == 1:
        return None
    return mixture_order(sizes, rates, settings.steps * settings.batch_size, settings.seed)


def _mesh(job: Job) -> Mesh | None:
    there = jax.devices()
    several = jax.process_count() > 1
    if several and (job.devices is not None or job.cache_teacher is not None):
        raise NotImplementedError(
            "several processes use all their devices and keep no teacher cache: leave out "
            "--devices and --cache-teacher"
        )
    if job.devices is not None and job.devices > len(there):
        raise ValueError(f"devices is {job.devices} and there are {len(there)}: take fewer")
    used = there[: job.devices]
    if len(used) == 1 and job.model_parallel == 1:
        return None
    return make_mesh(job.model_parallel, used)


def _counts(arrays: Batch) -> dict[str, int]:
    weights, marked = arrays["weights"], said_is_pushed_down(arrays)
    return {
        "examples": len(weights),
        "tokens": int((weights != 0).sum()),
        "marked": int(marked.sum()),
        "only others": int(((weights < 0) & ~marked).sum()),
    }


def _trained(job: Job, checked: Checked, work: Path, console: Console) -> tuple[Trained, Checked]:
    """What training makes, and what it was made of, with all that the original had to say."""
    directory = work / "run"
    params, original = _loaded(job, checked)
    with training_progress(console) as progress:
        if checked.unsaid:
            checked = _said(job, checked, original, work, progress)
        # Other processes' devices cannot be read here.
        if not checked.step.head_only and jax.process_count() == 1:
            params, original = _placed(checked, params, original)
        teacher = _cached(job, checked, original, progress)
        trained = train(
            checked.model,
            params,
            checked.arrays,
            checked.settings,
            directory,
            original=original,
            order=checked.order,
            mesh=checked.mesh,
            teacher=teacher,
            held_out=checked.held_out,
            progress=progress,
        )
        return trained, checked


def _said(job: Job, checked: Checked, original: Params, work: Path, progress: Progress) -> Checked:
    """The same with the outputs that the original makes, once for all resumptions."""
    inputs, seed = [*checked.unsaid.values()], checked.settings.seed
    parts = Parts(work / "kept", {"outputs": len(inputs), "most": checked.most, "seed": seed})
    said = speak(
        checked.model,
        original,
        inputs,
        mark_nothing,
        load_tokenizer(job.model, chat=job.chat),
        max_length=checked.most,
        temperature=_TEMPERATURE,
        seed=seed,
        batch_size=checked.settings.batch_size,
        keep=parts.get,
        progress=progress,
    )
    arrays, rows = dict(checked.arrays), [*checked.unsaid]
    made = to_arrays(
        said,
        pad_id=checked.model.config.pad_id,
        output_length=arrays["outputs"].shape[1],
    )
    for name in ("outputs", "weights"):
        arrays[name] = arrays[name].copy()
        arrays[name][rows] = made[name]
    return dataclasses.replace(checked, arrays=arrays, counts=_counts(arrays))


def _loaded(job: Job, checked: Checked) -> tuple[Params, Params]:
    """What training starts from and the original; what is frozen of it in its own dtype."""
    dtype, lora = checked.settings.param_dtype, checked.settings.lora
    params: Params = load_checkpoint(job.model)[1]
    held = in_dtype(params, dtype)
    original = held if job.original is None else in_dtype(load_checkpoint(job.original)[1], dtype)
    return params if lora is None else held, original


def _placed(checked: Checked, params: Params, original: Params) -> tuple[Params, Params]:
    """The same where what is frozen lies: what was read need not be held twice."""
    base, placed = checked.step.place(params, original)
    if original is not params:
        return base or params, placed or original
    there = base or placed or params
    return there, there


def _cached(
    job: Job, checked: Checked, original: Params, progress: Progress
) -> TeacherCache | None:
    if job.cache_teacher is None:
        return None
    files = (Path(job.model) / name for name in TOKENIZER_FILES)
    task = progress.add_task("original model, once", total=None, note="")
    return cache_teacher(
        job.cache_teacher,
        checked.model,
        original,
        checked.arrays,
        batch_size=checked.settings.batch_size,
        dtype=job.dtype,
        about={"tokenizer": {f.name: file_fingerprint(f) for f in files if f.exists()}},
        mesh=checked.mesh,
        tell=lambda said: progress.console.print(
            f"teacher cache {job.cache_teacher}: {said}", markup=False
        ),
        advance=lambda done, count: progress.update(task, completed=done, total=count),
    )


def _described(job: Job) -> dict[str, Any]:
    """What makes two jobs the same: files by their content."""
    settings, data = dataclasses.asdict(job.settings), _named(job.data)
    for name in ("checkpoint_every", "chunk_bytes"):  # which change nothing in what is made
        del settings[name]
    return {
        "model": _weights(job.model),
        # The original, where it is another one, has the same.
        "config": architecture(inspect_checkpoint(job.model).config),
        "original": None if job.original is None else _weights(job.original),
        "data": data,
        # Rates go by it, and so do the rows that are drawn; in `data` it would say nothing.
        **({"order": list(data)} if len(data) > 1 else {}),
        "limits": {"truncate_inputs": job.truncate_inputs, "skip_longer": job.skip_longer},
        "templates": None if job.templates is None else file_fingerprint(job.templates),
        "chat": uses_chat(job.model, job.chat),
        "negatives": job.negatives,
        "keep": None if job.keep is None else {"file": _named([job.keep]), "share": job.keep_share},
        "rates": None if job.rates is None else list(job.rates),
        "cap": job.cap,
        "temperature": job.temperature,
        "dropout": job.dropout,
        "dtype": job.dtype,
        "cached teacher": job.cache_teacher is not None,
        "merge": job.merge,
        "settings": settings,
    }


def _weights(folder: PathLike) -> dict[str, Any]:
    return {"name": Path(folder).name, "sha256": weight_fingerprints(folder)}


def _named(files: Sequence[PathLike]) -> dict[str, str]:
    """Content by name; the whole path where two files share a name."""
    names = [Path(file).name for file in files]
    return {
        name if names.count(name) == 1 else str(file): file_fingerprint(file)
        for name, file in zip(names, files, strict=True)
    }
