"""What a model folder says of the edits that made it: records for machines, a card for people."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5patches.editing.held_out import Look, verdict
from t5patches.editing.outputs import (
    ALIGN_RECORD,
    CARD,
    HEADINGS,
    RECORD,
    Record,
    card_with,
    lies,
    recorded,
)
from t5patches.editing.plan import MemoryPlan
from t5patches.editing.train import OBJECTIVES, WITH_ORIGINAL, Trained
from t5patches.model.lora import whole_model
from t5patches.model.tokenizer_files import uses_chat
from t5patches.runs.files import PathLike, read_object, read_regular, require_own_file
from t5patches.runs.fingerprints import fingerprint


def read_rounds(folder: PathLike) -> list[dict[str, Any]]:
    """What edits made a model folder.

    Args:
        folder: of any model.

    Returns:
        A record for each edit, oldest first; none for a model that `edit` did not make.

    Raises:
        ValueError: the record cannot be read, or is a link out of the folder.
    """
    path = Path(folder) / RECORD
    if not path.exists():
        return []
    require_own_file(path)
    try:
        rounds = list(json.loads(read_regular(path))["rounds"])
        for round_ in rounds:
            _check_round(round_)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}): remove it or restore it"
        ) from error
    return rounds


def _check_round(round_: Any) -> None:
    """Refuses a record without what is read of one, here and in reports."""
    _ = {**round_["job"]["model"]["sha256"], **round_["job"]["data"]}
    settings, history = round_["settings"], round_["history"]
    numbers = [settings["alpha"], settings["negatives"], *itertools.chain(*history.values())]
    odd = [x for x in numbers if type(x) not in (int, float) or not abs(x) < 1e300]
    if odd:
        raise ValueError(f"{len(odd)} of its numbers are none, such as {odd[0]!r:.200}")
    if settings["objective"] not in OBJECTIVES:
        raise ValueError(f"its objective is {settings['objective']!r:.200}")
    steps = {len(history[name]) for name in ("loss", "marked", "said")}
    if len(steps) != 1 or steps == {0}:
        raise ValueError("its history is of no step, or of another number of them for each measure")


def card_before_edits(folder: PathLike) -> str:
    """A folder's model card without what edits, alignments and reward models have said in it.

    Args:
        folder: of a model.

    Returns:
        The card; empty where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    path = Path(folder) / CARD
    try:
        text = read_regular(path).decode() if path.exists() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): convert it, or remove it") from error
    headings = "|".join(map(re.escape, HEADINGS.values()))
    return re.split(f"^(?:{headings})", text, maxsplit=1, flags=re.MULTILINE)[0].strip()


def check_chat(folder: PathLike, chat: str, base: PathLike | None = None) -> None:
    """Refuses to treat an edited or aligned model otherwise than what made it did.

    Args:
        folder: of a model, or of an adapter.
        chat: "on", "off" or "auto".
        base: the model that an adapter lies beside.

    Raises:
        ValueError: what made it put inputs into the chat template and `chat` does not, or the
            other way round.
    """
    now = uses_chat(whole_model(folder, base), chat)
    then = {RECORD: [round_["job"].get("chat") for round_ in read_rounds(folder)]}
    if (aligned := Path(folder) / ALIGN_RECORD).exists():
        require_own_file(aligned)
        job = read_object(aligned, "remove it or restore it").get("job")
        then[ALIGN_RECORD] = [job.get("chat") if isinstance(job, dict) else None]
    for record, chats in then.items():
        if now is not None and (not now) in chats:
            was, asked = ("off", "on") if now else ("on", "off")
            raise ValueError(
                f"{folder} was trained with --chat {was}, as its {record} has it, and --chat "
                f"{asked} would give it other prompts: give --chat {was}"
            )


def record_of(
    job: Mapping[str, Any],
    counts: Mapping[str, int],
    plan: MemoryPlan,
    directory: Path,
    trained: Trained,
) -> Record:
    """What an edit says of itself.

    Args:
        job: what makes two jobs the same.
        counts: of the data.
        plan: of the memory.
        directory: of the run.
        trained: what it made.

    Returns:
        The record, as `read_rounds` gives it.
    """
    run = json.loads((directory / "run.json").read_text())
    looks, until = {}, run["settings"]["until"]
    if until is not None:
        found = verdict(trained.looks, until)
        looks["held out"] = {
            "why": found.why or "steps",
            "updates": trained.looks[found.best].step,
            "fingerprint": run["held_out"],
            **{name: [getattr(x, name) for x in trained.looks] for name in Look._fields},
        }
    return recorded(
        job,
        settings=run["settings"],
        counts=dict(counts),
        fingerprints={name: run[name] for name in ("data", "params", "original")}
        | {"edited": fingerprint(trained.params)},
        history=trained.history,
        **looks,
        memory=dataclasses.asdict(dataclasses.replace(plan, available=None)),
        devices=f"{plan.count} x {plan.device}",
    )


def card_of(folder: PathLike, record: Mapping[str, Any]) -> str:
    """A model's card with a section on an edit at its end.

    Args:
        folder: of the model before the edit.
        record: of the edit.

    Returns:
        The card.
    """
    settings, counts, job = record["settings"], record["counts"], record["job"]
    sets = f", sets of up to {settings['negatives']} ids" if settings["negatives"] else ""
    beta = f", beta {settings['beta']:g}" if settings["beta"] else ""
    data = ", ".join(f"`{name}` (sha256 `{digest}`)" for name, digest in job["data"].items())
    alpha = "" if settings["objective"] == "ce" else f", alpha {settings['alpha']:g}"
    close = ""
    if settings["objective"] in WITH_ORIGINAL:
        original = job["original"]
        close = (
            f"- Kept close to: {original['name'] if original else 'the model it was made from'}.\n"
        )
    adapter, lora = "", settings["lora"]
    if lora:
        adapter = (
            f"- An adapter (LoRA) of rank {lora['rank']}, alpha {lora['alpha'] or lora['rank']:g}, "
            f"{lies(job['merge'], job['model']['name'])}.\n"
        )
    average = f", weights averaged ({settings['average']:g})" if settings["average"] else ""
    kept = ""
    if job["keep"]:
        ((name, digest),), share = job["keep"]["file"].items(), job["keep"]["share"]
        kept = (
            f"- Outputs to `{name}` (sha256 `{digest}`) are {share:.0%} of what was drawn, with "
            "nothing pushed down.\n"
        )
    loss, made = record["history"]["loss"], ""
    if found := record.get("held out"):
        left = found["left"][found["step"].index(found["updates"])]
        made = (
            f"- Kept is the state after {found['updates']} updates, the best on inputs held out: "
            f"{left:.2%} left there of {found['left'][0]:.2%} (asked for: "
            f"{settings['until']:.2%}).\n"
        )
    chat = {None: "", True: ", chat template on", False: ", chat template off"}[job["chat"]]
    only_others = counts.get("only others", 0)  # older records have no such count
    others = f", and only others in the place of {only_others}" if only_others else ""
    return card_with(
        folder,
        f"{HEADINGS[RECORD]}t5patches\n\n"
        f"On {record['date']} `t5patches edit` edited `{job['model']['name']}`: objective "
        f"`{settings['objective']}`{alpha}{beta}{sets}.\n\n"
        f"- Data: {data}; {counts['examples']} examples, {counts['marked']} of {counts['tokens']} "
        f"output tokens pushed down{others}; fingerprint `{record['fingerprints']['data']}`.\n"
        f"{adapter}{kept}{close}"
        f"- {len(loss)} updates of {settings['batch_size']} examples, "
        f"{settings['optimizer']}, learning rate {settings['learning_rate']:g} "
        f"({settings['schedule']}), warm-up {settings['warmup_steps']}{average}, dropout "
        f"{job['dropout']:g}, {job['dtype']}, seed {settings['seed']}{chat}; loss "
        f"{loss[0]:.4g} at the first, {loss[-1]:.4g} at the last.\n"
        f"{made}"
        f"- All settings, fingerprints and the course of the loss: `{RECORD}`.\n\n"
        "What the edit removed and what else it changed was not measured here: "
        "`t5patches evaluate` does.\n",
    )
