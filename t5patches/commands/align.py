r"""Train a model towards a score of whole outputs, and keep it close to what it was.

For what no rule and no corrected text can say, and a score can. (Where a rule marks the unwanted
tokens, `annotate` and `edit` are cheaper and change less.)

Each step samples several outputs to some of the inputs, has them scored, and updates the model:
towards outputs that score higher than the others to the same input, and not far from the original,
by the exact KL divergence of every token's distribution (GRPO, with PPO's clip). With
--advantages value it goes towards tokens of which more came than was expected (PPO): a head on the
model's hidden states learns what to expect, and is left out of OUTPUT.

  --scorer my_module:function   function(outputs) takes a list of texts and returns as many numbers,
                                the higher the better; with a second parameter named `inputs` it is
                                also given what the model was given for each. The module is looked
                                for where Python looks, and in this directory. An output may be
                                empty. t5patches.scorers:harmlessness is ready to use
  --reward DIR                  a reward model, which `t5patches reward` makes; it reads outputs as
                                far as its positions go

By default only an adapter is trained (--lora 8): the model without it is the original. OUTPUT is a
folder of the PEFT library, to lie beside the model (`evaluate` takes it with --base), or with
--merge a whole folder; with --lora 0 all parameters are trained. With it come align.json, the
course of score, KL and length, and a section in README.md.

Where the KL or the length of outputs leaves its bounds, training stops: OUTPUT then holds the last
checkpoint before, and the exit code is 1. So it is where the scorer fails on the way: mend it and
repeat the command with --resume, which samples the same outputs again.

  t5patches align --model SmolLM2-135M-Instruct --inputs news.txt --scorer my_module:brevity \
      --output aligned
"""

from __future__ import annotations

import argparse
from typing import Any

from t5patches.commands import common
from t5patches.runs.files import unfinished

LESS_MEMORY = (
    "remove OUTPUT.unfinished and try a smaller --update-size or --batch-size, or "
    "--truncate-inputs, --skip-longer, --remat, a smaller --max-length, or on TPUs and GPUs "
    "--dtype bfloat16"
)
AGAIN = "repeat the command with --resume to go on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `t5patches align`.

    Args:
        parser: of the command.
    """
    parser.add_argument("--model", metavar="DIR", required=True, help="the folder to begin with")
    common.add_input_options(parser)
    scored = parser.add_mutually_exclusive_group(required=True)
    scored.add_argument("--scorer", metavar="MODULE:FUNCTION", help="scores outputs, see above")
    scored.add_argument("--reward", metavar="DIR", help="scores outputs, see above")
    common.add_run_options(parser, "--remat and ")
    _add_steps(parser.add_argument_group("steps"))
    _add_advantages(parser.add_argument_group("advantages"))
    _add_closeness(parser.add_argument_group("what it keeps to"))
    adapter = parser.add_argument_group("adapter")
    common.add_adapter_options(adapter, 8)
    common.add_merge_option(adapter)
    machine = parser.add_argument_group("machine")
    common.add_machine_options(machine)
    common.add_checkpoint_option(
        machine, 5, "steps between two states to resume from, or to go back to"
    )


def _add_steps(group: Any) -> None:
    for name, what, default in (
        ("--steps", "times to sample, score and update", 50),
        ("--inputs-per-step", "inputs that are answered in a step", 8),
        ("--samples", "outputs to each of them, compared with one another or with a value", 8),
        ("--update-size", "outputs in an update; it divides those of a step", 32),
        ("--epochs", "times that a step's outputs are learnt from", 1),
    ):
        group.add_argument(
            name,
            metavar="N",
            type=common.positive,
            default=default,
            help=f"{what} (default: {default})",
        )
    group.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=1.0,
        help="that outputs are sampled at; probabilities and KL are those at it (default: 1)",
    )
    group.add_argument(
        "--learning-rate", metavar="RATE", type=float, default=3e-4, help="of Adam (default: "
        "0.0003, for adapters; all parameters want a tenth or less)")  # fmt: skip


def _add_advantages(group: Any) -> None:
    group.add_argument(
        "--advantages",
        metavar="KIND",
        choices=("group", "value"),
        default="group",
        help="group or value: of an output, against the others to the same input, or of each of "
        "its tokens, against a value head (default: group)",
    )
    for name, what, default in (
        ("--value-coefficient", "what the loss of its values counts", 0.1),
        ("--value-clip", "how far a value may go in a step, in deviations of the score", 0.2),
        ("--gamma", "what a token later counts, of one now", 1),
        ("--gae-lambda", "1 compares what came with the value, 0 one value with the next", 0.95),
    ):
        group.add_argument(
            name,
            metavar="X",
            type=float,
            help=f"with a value head: {what} (default: {default})",
        )


def _add_closeness(group: Any) -> None:
    group.add_argument(
        "--clip",
        metavar="X",
        type=float,
        nargs=2,
        default=(0.2, 0.2),
        help="how far a token's probability may fall below and rise above that which it was "
        "sampled with, as a share of it, within a step (default: 0.2 0.2)",
    )
    group.add_argument(
        "--kl-coefficient",
        metavar="BETA",
        type=float,
        default=0.05,
        help="what a nat of divergence from the original costs, where a standard deviation of the "
        "score counts 1; scores that differ by less than 0.001 count less (default: 0.05)",
    )
    group.add_argument(
        "--target-kl",
        metavar="NATS",
        type=float,
        help="raise and lower the coefficient, by a fifth a step at most, to keep to this KL a "
        "token (default: the coefficient stays)",
    )
    group.add_argument(
        "--pretraining",
        metavar="FILE",
        help="other text whose likelihood is raised beside the score: a text file with one text a "
        'line, or a .jsonl or .ndjson file with {"inputs": "...", "outputs": "..."} a line',
    )
    group.add_argument(
        "--pretraining-weight",
        metavar="W",
        type=float,
        help="of its loss, a mean over tokens, beside that of the score (default: 1)",
    )
    group.add_argument(
        "--pretraining-length",
        metavar="N",
        type=common.positive,
        help="longer texts are cut to N tokens (default: 256)",
    )
    group.add_argument(
        "--fim",
        metavar="RATE",
        type=float,
        help="of the texts in a text file for --pretraining, the share that is told with its "
        "middle last, so that the model keeps or learns filling gaps: cut at two characters into "
        "prefix, middle and suffix (default: none)",
    )
    group.add_argument(
        "--fim-spm",
        metavar="SHARE",
        type=float,
        help="of these, the share that is told suffix, prefix, middle; the rest is told prefix, "
        "suffix, middle (default: 0.5)",
    )
    group.add_argument(
        "--fim-sentinels",
        metavar=("PREFIX", "SUFFIX", "MIDDLE"),
        nargs=3,
        help="special tokens of the model's tokenizer in front of the three, such as "
        "'<fim_prefix>' '<fim_suffix>' '<fim_middle>'",
    )
    group.add_argument(
        "--most-kl",
        metavar="NATS",
        type=float,
        default=1.0,
        help="stop where the KL a token is above this (default: 1)",
    )
    group.add_argument(
        "--most-length-change",
        metavar="FACTOR",
        type=float,
        default=4.0,
        help="stop where outputs are on average so many times longer or shorter than at first "
        "(default: 4)",
    )


@common.goes_on_in(lambda options: unfinished(options.output))
def run(options: argparse.Namespace) -> int:
    """Trains a model folder towards a score.

    Args:
        options: parsed arguments.

    Returns:
        The exit code.
    """
    from t5patches.editing.align import Job, align_folder, plan
    from t5patches.editing.policy import PolicySettings, Stopped
    from t5patches.model.huggingface import read_config
    from t5patches.model.lora import require_whole

    # As read_sources reads its tokenizer.
    require_whole(options.model)
    read_config(options.model)
    given = {**vars(options), "lora": common.lora(options), "clip": tuple(options.clip)}
    given["value"] = _value(options)
    for name in ("pretraining_weight", "pretraining_length"):
        if given[name] is None:
            del given[name]
        elif options.pretraining is None:
            raise ValueError(
                f"--{name.replace('_', '-')} is of other text, and there is none (--pretraining)"
            )
    settings = common.filled(PolicySettings, given)
    inputs = [source.inputs for source in common.read_sources(options, options.model)]
    given |= {"inputs": inputs, "settings": settings, "fim": _fim(options)}
    job = common.filled(Job, given)
    if options.plan:
        common.print_plan(options, plan(job, resume=options.resume))
        return 0
    try:
        console = common.progress_console(options)
        record = align_folder(job, resume=options.resume, console=console)
    except Stopped as error:
        common.print_error(options, f"{error}. What was reached is kept: {AGAIN}")
        return 1
    history = record["history"]
    common.print_result(
        options,
        record,
        f"{options.output}: {record['steps']} steps, score {history['score'][0]:.4g} to "
        f"{history['score'][-1]:.4g}, KL {history['kl'][-1]:.4g} nats a token, length "
        f"{history['length'][0]:.1f} to {history['length'][-1]:.1f} tokens",
    )
    if record["collapse"] is None:
        return 0
    common.print_error(
        options,
        f"stopped early, as {record['collapse']}; {options.output} holds the state after "
        f"{record['steps']} steps. For more, give another --output with a lower --learning-rate, "
        "a higher --kl-coefficient, or wider bounds (--most-kl, --most-length-change)",
    )
    return 1


def _value(options: argparse.Namespace) -> Any:
    """The value head that is asked for; None where advantages are within the group."""
    from t5patches.editing.values import ValueHead

    of = {"value_coefficient": "coefficient", "value_clip": "clip"}
    of |= {"gamma": "gamma", "gae_lambda": "lam"}
    given = {name: getattr(options, name) for name in of if getattr(options, name) is not None}
    if options.advantages == "value":
        return ValueHead(**{of[name]: x for name, x in given.items()})
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{names}: of a value head alone; give --advantages value too")
    return None


def _fim(options: argparse.Namespace) -> Any:
    """How other text is told; None for as it is."""
    from t5patches.editing.fim import FillInTheMiddle

    if (options.fim is None) != (options.fim_sentinels is None):
        raise ValueError("--fim RATE and --fim-sentinels PREFIX SUFFIX MIDDLE need one another")
    if options.fim is None:
        if options.fim_spm is not None:
            raise ValueError("--fim-spm is a share of the texts that --fim RATE chooses: give both")
        return None
    spm = {} if options.fim_spm is None else {"spm": options.fim_spm}
    return FillInTheMiddle(options.fim, tuple(options.fim_sentinels), **spm)
