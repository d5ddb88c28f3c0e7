r"""Train a reward model on pairs of outputs, to score others with.

Reads a file of preferences, one JSON object a line:

  {"inputs": "...", "chosen": "the better output", "rejected": "the worse one"}

({"messages": [...]} may stand for `inputs`.) A line in which both are the same is refused by its
number; pairs that repeat, or are there both ways, are counted and told. A part of the pairs is not
trained on, by whole inputs, and how many of these come out in the right order is told.

OUTPUT is a whole folder like --model, with reward.json in it. `align --reward OUTPUT` trains
towards it, and `evaluate --reward OUTPUT` measures with it, models with any tokenizer. Only
differences between rewards of outputs to the same input mean something.

  t5patches reward --model SmolLM2-135M-Instruct --preferences pairs.jsonl --output reward
  t5patches align --model SmolLM2-135M-Instruct --inputs news.txt --reward reward --output aligned
"""

from __future__ import annotations

import argparse

from t5patches.commands import common
from t5patches.runs.files import unfinished

LESS_MEMORY = "remove OUTPUT.unfinished and try a smaller --batch-size, or shorter preferences"
AGAIN = "repeat the command with --resume to go on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `t5patches reward`.

    Args:
        parser: of the command.
    """
    parser.add_argument("--model", metavar="DIR", required=True, help="the folder to begin with")
    parser.add_argument("--preferences", metavar="FILE", required=True, help="pairs, JSON lines")
    common.add_run_options(parser)
    common.add_chat_option(parser)
    parser.add_argument(
        "--held-out",
        metavar="SHARE",
        type=float,
        default=0.1,
        help="of the pairs, not trained on; 0 measures nothing (default: 0.1)",
    )
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=common.positive,
        default=1,
        help="times that each pair is learnt from; more than one tends to learn them by heart "
        "(default: 1)",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=common.positive,
        default=16,
        help="pairs in an update (default: 16)",
    )
    parser.add_argument(
        "--learning-rate",
        metavar="RATE",
        type=float,
        default=3e-4,
        help="of Adam (default: 0.0003, for adapters; all parameters want a tenth or less)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=common.int31,
        default=0,
        help="of which pairs are held out and of the others' order (default: 0)",
    )
    common.add_checkpoint_option(parser, 100, "updates between two states to resume from")
    common.add_adapter_options(parser, 8)


@common.goes_on_in(lambda options: unfinished(options.output))
def run(options: argparse.Namespace) -> int:
    """Trains a reward model.

    Args:
        options: parsed arguments.

    Returns:
        The exit code.
    """
    from t5patches.editing.reward import RewardSettings
    from t5patches.editing.reward_folder import Job, accuracy_text, plan, reward_folder

    given = {**vars(options), "lora": common.lora(options)}
    settings = common.filled(RewardSettings, given)
    job = common.filled(Job, {**given, "settings": settings})
    if options.plan:
        common.print_plan(options, plan(job, resume=options.resume))
        return 0
    record = reward_folder(job, resume=options.resume, console=common.progress_console(options))
    loss = record["history"]["loss"]
    common.print_result(
        options,
        {name: value for name, value in record.items() if name != "weight"},
        f"{options.output}: {record['pairs']} pairs, loss {loss[0]:.4g} to {loss[-1]:.4g}; in "
        f"order: {accuracy_text(record['accuracy'])}",
    )
    return 0
