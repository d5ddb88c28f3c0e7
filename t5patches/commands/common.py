"""What the commands share: how they are told and tell things."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from t5patches.editing.data import Source
    from t5patches.editing.report import Results


# For consoles: what is printed is text, whatever brackets and colons are in it.
PLAIN: Mapping[str, Any] = {"markup": False, "emoji": False, "highlight": False}


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every command.

    Args:
        parser: of the command.
    """
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="say nothing but errors (and the result, with --json)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the result as one JSON object on standard output; progress goes to standard "
        "error in any case",
    )


def add_length_options(container: Any) -> None:
    """Adds what becomes of texts that are too long, for `Limits` of `t5patches.editing.data`.

    Args:
        container: a parser, or a group of one.
    """
    container.add_argument(
        "--truncate-inputs",
        metavar="N",
        type=positive,
        help="cut longer inputs to N tokens, an end token or a chat template counted and "
        "instructions not (default: take all)",
    )
    container.add_argument(
        "--skip-longer",
        metavar="N",
        type=positive,
        help="leave out what has an input, or a given output, of more than N tokens, counted "
        "before inputs are cut (default: leave out none). How many were cut or left out is told",
    )


def add_chat_option(container: Any) -> None:
    """Adds whether inputs are put into the model's chat template.

    Args:
        container: a parser, or a group of one.
    """
    container.add_argument(
        "--chat",
        metavar="WHEN",
        choices=("auto", "on", "off"),
        default="auto",
        help="auto, on or off: put each input into the model's chat template, as a message of the "
        "user (default: auto, on where the folder has a template)",
    )


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Adds what every command needs that lets a model speak.

    Args:
        parser: of the command.
    """
    parser.add_argument(
        "--inputs",
        metavar="FILE",
        required=True,
        help="a text file with one input a line, or a .jsonl or .ndjson file with "
        '{"inputs": "..."} a line',
    )
    add_chat_option(parser)
    parser.add_argument(
        "--templates",
        metavar="FILE",
        help="instructions, one a line with {inputs} in it: one is drawn for each input",
    )
    add_length_options(parser)
    parser.add_argument(
        "--max-length",
        metavar="N",
        type=positive,
        default=64,
        help="tokens that an output may have (default: 64)",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=positive,
        default=64,
        help="outputs made at a time (default: 64)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=int31,
        default=0,
        help="of what is drawn: samples, templates (default: 0)",
    )


def add_rules_option(container: Any) -> None:
    """Adds the rules, for `read_rules` of `t5patches.editing.rules`.

    Args:
        container: a parser, or a group of one.
    """
    container.add_argument(
        "--rules",
        metavar="FILE",
        help="what is unwanted: words, one a line of a .txt file, or rules (TOML)",
    )


def add_run_options(container: Any, more: str = "") -> None:
    """Adds the folder that a long run makes, and how to go on with it.

    Args:
        container: a parser, or a group of one.
        more: what may be another when it goes on.
    """
    container.add_argument(
        "--output", metavar="DIR", required=True, help="the folder to make; it must not exist"
    )
    container.add_argument(
        "--resume",
        action="store_true",
        help=f"go on where it was killed; {more}--checkpoint-every may be another by then",
    )
    container.add_argument(
        "--plan", action="store_true", help="check everything, print the memory plan, and stop"
    )


def add_checkpoint_option(container: Any, default: int, what: str) -> None:
    """Adds how often a long run keeps its state.

    Args:
        container: a parser, or a group of one.
        default: how often.
        what: is counted, and between which states.
    """
    container.add_argument(
        "--checkpoint-every",
        metavar="N",
        type=positive,
        default=default,
        help=f"{what} (default: {default})",
    )


def add_dtype_option(container: Any) -> None:
    """Adds what a network computes in.

    Args:
        container: a parser, or a group of one.
    """
    container.add_argument(
        "--dtype",
        metavar="NAME",
        default="float32",
        help="float32 or bfloat16, of activations and of what decoding keeps of the text before, "
        "which bfloat16 halves on TPUs and GPUs (a CPU makes float32 copies); what is trained and "
        "sums are float32 (default: float32)",
    )


def add_machine_options(container: Any) -> None:
    """Adds how training computes.

    Args:
        container: a parser, or a group of one.
    """
    container.add_argument(
        "--implementation",
        metavar="NAME",
        help="of the losses: xla, pallas_tpu, pallas_gpu, reference (default: the best here)",
    )
    add_dtype_option(container)
    container.add_argument(
        "--remat",
        action="store_true",
        help="hold only what is between layers and run each layer again in the backward pass "
        "(gradient checkpointing): much less memory for long texts and deep models, a third more "
        "arithmetic",
    )


def add_merge_option(container: Any) -> None:
    """Adds what becomes of an adapter.

    Args:
        container: a parser, or a group of one.
    """
    container.add_argument(
        "--merge",
        action="store_true",
        help="add the adapter to the model's kernels: OUTPUT is a whole folder",
    )


def add_adapter_options(container: Any, default: int, about: str = "") -> None:
    """Adds the adapter that is trained, for `lora`.

    Args:
        container: a parser, or a group of one.
        default: its rank; 0 trains all parameters.
        about: what else is to be known of it.
    """
    container.add_argument(
        "--lora",
        metavar="RANK",
        type=count,
        default=default,
        help="train an adapter of this rank and leave the parameters as they are; 0 trains all "
        f"parameters (default: {default}){about}",
    )
    container.add_argument(
        "--lora-alpha",
        metavar="A",
        type=float,
        help="the adapter is multiplied by A / RANK (default: RANK)",
    )
    container.add_argument(
        "--lora-targets",
        metavar="REGEX",
        help="modules in whose name this is found get an adapter, such as '[.](q|v)(_proj)?$', the "
        "queries and values of a Llama, a Gemma or a T5 (default: every linear layer)",
    )


def lora(options: argparse.Namespace) -> Any:
    """The adapter that is asked for.

    Args:
        options: of the command, see `add_adapter_options`.

    Returns:
        A `t5patches.model.lora.Lora`; None where all parameters are trained.

    Raises:
        ValueError: it cannot be.
    """
    from t5patches.model.lora import Lora

    if options.lora:
        return Lora(options.lora, options.lora_alpha, options.lora_targets)
    if options.lora_alpha is not None or options.lora_targets is not None:
        raise ValueError("--lora-alpha and --lora-targets are of an adapter: give --lora RANK too")
    return None


def filled(kind: Any, given: Mapping[str, Any]) -> Any:
    """Makes settings of what is given under the names of their fields.

    Args:
        kind: a dataclass.
        given: values by name, of this and of other things; a field without one has its default.

    Returns:
        An object of that class.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: given[name] for name in names if name in given})


def read_sources(options: argparse.Namespace, folder: str) -> list[Source]:
    """Reads what `add_input_options` asks for.

    Args:
        options: parsed arguments.
        folder: of the model, as whose prompts they are tried.

    Returns:
        The inputs, within their limits and in their templates.
    """
    from t5patches.editing.data import Limits, read_inputs, within
    from t5patches.editing.templates import read_templates, with_templates
    from t5patches.model.tokenizer_files import load_tokenizer

    tokenizer = load_tokenizer(folder, chat=options.chat)
    sources = read_inputs(options.inputs, tokenizer)
    limits = Limits(options.truncate_inputs, options.skip_longer)
    if limits != Limits():
        left = within(sources, limits, tokenizer)
        progress_console(options).print(left.text(limits), soft_wrap=True)
        sources = left.kept
    if not options.templates:
        return sources
    inputs = [source.inputs for source in sources]
    texts = with_templates(inputs, read_templates(options.templates), options.seed)
    return [source._replace(inputs=text) for source, text in zip(sources, texts, strict=True)]


def print_plan(options: argparse.Namespace, checked: Any) -> None:
    """Says on standard output what `--plan` asks for.

    Args:
        options: of the command.
        checked: with a `t5patches.editing.plan.MemoryPlan` as `plan`, and `notes`.
    """
    print_result(options, vars(checked.plan), "\n".join([*checked.notes, checked.plan.text()]))


def progress_console(options: argparse.Namespace) -> Console:
    """Where progress is shown.

    Args:
        options: of the command.

    Returns:
        Standard error, or nothing with `--quiet`.
    """
    from rich.console import Console

    return Console(stderr=True, quiet=options.quiet, **PLAIN)


def print_result(options: argparse.Namespace, result: Mapping[str, Any], text: str) -> None:
    """Says on standard output what a command found.

    Args:
        options: of the command.
        result: for scripts; printed with `--json`.
        text: for people; not printed with `--json` or `--quiet`.
    """
    if options.json:
        print(json.dumps(result, ensure_ascii=False))
    elif not options.quiet:
        print(text)


def goes_on_in(
    work: Callable[[argparse.Namespace], str | os.PathLike[str] | None],
) -> Callable[[Callable[[argparse.Namespace], int]], Callable[[argparse.Namespace], int]]:
    """For a command that goes on where it was killed: chat templates are told when it began.

    Args:
        work: given the options, the folder that holds what is unfinished; None where nothing does.

    Returns:
        A decorator of the command's `run`.
    """

    def decorator(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
        @functools.wraps(run)
        def inside(options: argparse.Namespace) -> int:
            from t5patches.model.chat import at_time
            from t5patches.runs.claims import began

            with at_time(began(work(options))):
                return run(options)

        return inside

    return decorator


def print_error(options: argparse.Namespace, said: str) -> None:
    """Says on standard error what stopped a command.

    Args:
        options: of the command.
        said: one line or several, in which a stranger's files may be named and quoted.
    """
    from t5patches.editing.display import visible

    shown = "\n".join(visible(line) for line in said.split("\n"))
    print(f"t5patches {options.command}: {shown}", file=sys.stderr)


def print_results(options: argparse.Namespace, results: Results, report: str | None) -> None:
    """Says on standard output what edits changed.

    Args:
        options: of the command.
        results: a JSON object with `--json`, else a table and sentences, or nothing with `--quiet`.
        report: where the HTML report is; None where there is none.
    """
    from rich.console import Console

    from t5patches.editing.report import show, to_json

    if options.json:
        print(to_json(results))
    elif not options.quiet:
        console = Console(**PLAIN)
        # A table that is cut off at 80 columns helps nobody who writes it to a file.
        show(results, console if console.is_terminal else Console(width=140, **PLAIN))
        if report:
            console.print(f"report: {report}", soft_wrap=True)


def positive(text: str) -> int:
    """A whole number above 0, for `type=`.

    Args:
        text: what was given.

    Returns:
        The number.
    """
    return _whole(text, 1)


def count(text: str) -> int:
    """A whole number from 0, for `type=`.

    Args:
        text: what was given.

    Returns:
        The number.
    """
    return _whole(text, 0)


def int31(text: str) -> int:
    """A whole number that 32 bits with a sign hold, from 0, for `type=`: seeds and steps.

    Args:
        text: what was given.

    Returns:
        The number.
    """
    value = _whole(text, 0)
    if value >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is too large: {2**31 - 1} is the most")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above {least - 1}")
    return value
