"""From a model, inputs and rules to the file of unwanted outputs that an edit takes.

What takes long (outputs, rollouts) is kept beside the file until it is whole, so that a killed run
goes on when it is repeated. Outputs are kept for other rules too, with which one may come back.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.progress import Progress

from t5patches.editing.annotate import (
    Rule,
    check_count,
    expand_negatives,
    require_room_to_expand,
    require_room_to_speak,
    speak,
)
from t5patches.editing.data import Example, examples_text
from t5patches.editing.plan import yet_to_place
from t5patches.editing.programs import require_ranges
from t5patches.editing.rules import Rules
from t5patches.model.folder import LoadedModel
from t5patches.model.generate import require_temperature
from t5patches.model.protocol import architecture
from t5patches.model.tokenizer import Inputs
from t5patches.runs.claims import Parts, is_of
from t5patches.runs.files import work_of, write_file
from t5patches.runs.fingerprints import fingerprint, json_fingerprint


@dataclasses.dataclass(frozen=True)
class CollectSettings:
    """What to let the model say.

    Attributes:
        temperature: 0 for greedy decoding, above it to sample.
        samples: outputs to each input; more than one needs a temperature.
        max_length: tokens that an output may have, the end token counted.
        negatives: K, alternatives to try at each marked token; 0 for none. See
            `t5patches.editing.annotate.expand_negatives`.
        everywhere: try them also at tokens that are not marked and that the model was not sure of.
        rollout_length: tokens that are said behind each of them; None for to the output's end.
        batch_size: outputs made at a time.
        seed: of the sampling.
    """

    temperature: float = 0.0
    samples: int = 1
    max_length: int = 64
    negatives: int = 0
    everywhere: bool = False
    rollout_length: int | None = None
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses settings that give nothing."""
        require_ranges(self, _LEAST, above_0=())
        require_temperature(self.temperature)
        if self.rollout_length is not None and not (self.rollout_length > 0 and self.negatives):
            raise ValueError(
                f"rollout_length (--expand-length) is {self.rollout_length} and negatives "
                f"(--expand) {self.negatives}: at least 1 of both is needed, or neither"
            )
        if self.everywhere and not self.negatives:
            raise ValueError(
                "everywhere (--expand-everywhere) needs alternatives to try: give negatives "
                "(--expand), such as 32"
            )
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.samples} outputs to each input are asked for, and at temperature 0 all of "
                "them are the same: give a temperature, such as 1"
            )


_LEAST = {"samples": 1, "max_length": 1, "negatives": 0, "batch_size": 1}


def collect(
    model: LoadedModel,
    inputs: Sequence[Inputs],
    rules: Rules,
    output: str | os.PathLike[str],
    settings: CollectSettings,
    progress: Progress | None = None,
) -> list[Example]:
    """Lets a model speak, marks what it must not say, and writes the file that an edit takes.

    Args:
        model: see `t5patches.model.folder.load_model`.
        inputs: the source texts, or conversations.
        rules: say what is unwanted.
        output: the file to write, one example a line; it appears whole or not at all. Until then
            `OUTPUT.work` holds what is finished: the outputs, whatever the rules, and the rollouts
            by these rules.
        settings: how many outputs, and how.
        progress: shows how far it is, and before the rollouts how many there are to make.

    Returns:
        The examples that the file holds.

    Raises:
        ValueError: the file exists, `OUTPUT.work` is of another run, a setting does not fit the
            model, or a batch does not fit into memory.
    """
    output, described = Path(output), describe(model, inputs, settings)
    require_own(output, described)
    if settings.negatives:
        check_count(settings.negatives, model.tokenizer)
    require_room(model, inputs, settings)
    parts = Parts(work_of(output), described)
    examples = let_speak(model, inputs, rules, settings, parts, progress)
    if settings.negatives:
        by_rules = f"by-{json_fingerprint(rules.fingerprint)[:16]}"
        examples = expand_negatives(
            examples,
            rules,
            model.tokenizer,
            model.model,
            model.params,
            count=settings.negatives,
            max_length=settings.max_length,
            everywhere=settings.everywhere,
            rollout_length=settings.rollout_length,
            batch_size=settings.batch_size,
            keep=lambda name, make: parts.get(f"{name}-{by_rules}", make),
            progress=progress,
        )
    write_output(output, examples_text(examples), parts)
    return examples


def require_own(output: Path, described: Mapping[str, object]) -> None:
    """Refuses a file that is there, but for one of a run that was killed as it cleaned up.

    Args:
        output: the file to write.
        described: of `describe`.

    Raises:
        ValueError: it exists.
    """
    if output.exists() and not is_of(work_of(output), described):
        raise ValueError(_EXISTS.format(output))


def write_output(output: Path, text: str, parts: Parts) -> None:
    """Writes what a run has made, and removes what it kept until then.

    Args:
        output: the file to write, see `require_own`.
        text: its content.
        parts: what was kept.

    Raises:
        ValueError: it exists with other content.
    """
    if output.exists() and output.read_bytes() != text.encode():
        raise ValueError(_EXISTS.format(output))
    write_file(output, text)
    parts.remove()


_EXISTS = "{} exists: nothing is overwritten. Give another name or remove it"


def require_room(model: LoadedModel, inputs: Sequence[Inputs], settings: CollectSettings) -> None:
    """Refuses what would run out of memory, before anything is said.

    Args:
        model: the model.
        inputs: the source texts, or conversations.
        settings: how many outputs, and how.

    Raises:
        ValueError: naming what to change.
    """
    sizes: dict[str, Any] = {
        "max_length": settings.max_length,
        "batch_size": settings.batch_size,
        "beside": yet_to_place(model.params),
    }
    require_room_to_speak(
        model.model,
        inputs,
        model.tokenizer,
        temperature=settings.temperature,
        samples=settings.samples,
        **sizes,
    )
    if settings.negatives:
        require_room_to_expand(
            model.model, inputs, model.tokenizer, count=settings.negatives, **sizes
        )


def let_speak(
    model: LoadedModel,
    inputs: Sequence[Inputs],
    rule: Rule,
    settings: CollectSettings,
    parts: Parts,
    progress: Progress | None = None,
) -> list[Example]:
    """The outputs of a model to inputs.

    Args:
        model: the model.
        inputs: the source texts, or conversations.
        rule: says what is unwanted.
        settings: how many outputs, and how.
        parts: keeps what is made.
        progress: shows how far it is.

    Returns:
        The outputs, marked.
    """
    return speak(
        model.model,
        model.params,
        inputs,
        rule,
        model.tokenizer,
        max_length=settings.max_length,
        temperature=settings.temperature,
        samples=settings.samples,
        seed=settings.seed,
        batch_size=settings.batch_size,
        keep=parts.get,
        progress=progress,
    )


def marked_tokens(examples: Sequence[Example]) -> int:
    """How many tokens are marked.

    Args:
        examples: marked outputs.

    Returns:
        The number, of all of them together.
    """
    return sum(sum(example.marked) for example in examples)


def asked(model: LoadedModel, inputs: Sequence[Inputs]) -> dict[str, str]:
    """Which model is given which inputs, and computes in what, for `t5patches.runs.claims.claim`.

    Args:
        model: the model.
        inputs: the source texts, or conversations. With their tokens, so that another tokenizer
            or chat template is another run.

    Returns:
        A fingerprint of each, the model's config, and the name of the type.
    """
    given = [(text, model.tokenizer.encode_prompt(text)) for text in inputs]
    return {
        "model": fingerprint(model.params),
        "config": architecture(model.model.config),
        "dtype": jnp.dtype(model.model.config.dtype).name,
        "inputs": json_fingerprint(given),
    }


def describe(
    model: LoadedModel, inputs: Sequence[Inputs], settings: CollectSettings
) -> dict[str, object]:
    """What outputs depend on, whatever is then made of them.

    Args:
        model: the model.
        inputs: the source texts, or conversations.
        settings: how many outputs, and how.

    Returns:
        The run, for `t5patches.runs.claims.Parts`.
    """
    return asked(model, inputs) | {"settings": dataclasses.asdict(settings)}
