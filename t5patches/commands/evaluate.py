r"""Measure what edits removed and what else they changed.

The original model and each edit of it answer the same inputs, which the edits should not have
seen. Without more, that tells how far an edit is from the original: BLEU, ROUGE-L and exact match
of its outputs with the original's, and the mean KL(original, edited) over the tokens of the
original's outputs.

  --rules       (the file that `annotate` took) adds how many outputs have something unwanted, of
                greedy and of sampled ones, and leaves unwanted tokens out of the KL
  --references  adds the quality at the task, by the references in a .jsonl file of inputs:
                {"inputs": "...", "references": ["..."]} a line
  --scorer      adds a meter of several sampled outputs to each input: the mean of their scores and
                of the largest, and how often that reaches the threshold. my_module:function takes
                a list of outputs and returns as many numbers; with a second parameter named
                `inputs` it is also given what the model was given for each. The module is looked
                for where Python looks, and in this directory. t5patches.scorers:toxicity is ready
                to use (pip install 't5patches[toxicity]')

Several edits (two rounds, say) stand side by side:

  t5patches evaluate --before model --after round-1 round-2 --inputs held-out.jsonl \
      --rules rules.toml --references --report report.html

All numbers come with standard errors over the inputs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5patches.commands import common
from t5patches.runs.files import work_of

LESS_MEMORY = (
    "remove REPORT.work, where there is one, and try a smaller --batch-size, or --truncate-inputs, "
    "--skip-longer, or a smaller --max-length"
)

AGAIN = "with --report, repeat the command to go on; without, nothing is kept"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `t5patches evaluate`.

    Args:
        parser: of the command.
    """
    parser.add_argument("--before", metavar="DIR", required=True, help="the original model")
    parser.add_argument(
        "--after", metavar="DIR", required=True, nargs="+", help="edits of it, or adapters"
    )
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="the model that adapters lie beside (default: --before)",
    )
    common.add_input_options(parser)
    common.add_dtype_option(parser)
    common.add_rules_option(parser)
    parser.add_argument(
        "--references", action="store_true", help="compare with the references of the inputs"
    )
    scored = parser.add_mutually_exclusive_group()
    scored.add_argument("--scorer", metavar="MODULE:FUNCTION", help="scores outputs, see above")
    scored.add_argument(
        "--reward",
        metavar="DIR",
        help="a reward model as the scorer, see `t5patches reward`. Its high scores are good ones: "
        "read the mean alone, as the largest score and the threshold take high for bad",
    )
    parser.add_argument(
        "--samples",
        metavar="N",
        type=common.positive,
        help="sampled outputs to each input: for the rules (default: 1; more tell a small share of "
        "unwanted ones from none) and for the scorer (default: 25)",
    )
    parser.add_argument(
        "--threshold",
        metavar="X",
        type=float,
        help="a score from which on an output is bad (default: 0.5)",
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="write an HTML page with plots and texts here; until then FILE.work keeps what the "
        "models say, so that a killed comparison goes on when it is repeated",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the report that is there already"
    )


def _work(options: argparse.Namespace) -> Path | None:
    return work_of(options.report) if options.report else None


@common.goes_on_in(_work)
def run(options: argparse.Namespace) -> int:
    """Measures the edits.

    Args:
        options: parsed arguments.

    Returns:
        The exit code.
    """
    from t5patches.editing.evaluate import Measuring
    from t5patches.editing.report import write_html
    from t5patches.editing.rounds import compare
    from t5patches.editing.rules import read_rules
    from t5patches.model.folder import whole_model
    from t5patches.runs.claims import remove

    if options.force and not options.report:
        raise ValueError("--force replaces a report, and none is asked for (--report)")
    work = _work(options)
    if work:
        _check_report(Path(options.report), work, options.force)
    sources = common.read_sources(options, str(whole_model(options.before, options.base)))
    inputs = [source.inputs for source in sources]
    measuring = Measuring(
        rule=read_rules(options.rules) if options.rules else None,
        references=[source.references for source in sources] if options.references else None,
        meter=_meter(options, inputs),
        samples=options.samples or 1,
        max_length=options.max_length,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    console = common.progress_console(options)
    results = compare(
        options.before,
        options.after,
        inputs,
        measuring,
        console,
        work,
        options.base,
        chat=options.chat,
        dtype=options.dtype,
    )
    if work:
        write_html(options.report, results)
        remove(work)
    common.print_results(options, results, options.report)
    return 0


def _check_report(path: Path, work: Path, force: bool) -> None:
    """Refuses a place where the report cannot be written."""
    from t5patches.editing.report import is_report

    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file for the report")
    # With its work beside it, it is of this comparison, which was killed as it cleaned up; where
    # that is of another one, it is refused.
    if path.exists() and not force and not (work / "run.json").exists():
        raise ValueError(
            f"{path} exists: nothing is overwritten. Give another name, or --force to replace it"
        )
    if path.exists() and not is_report(path):
        raise ValueError(f"{path} is no report of t5patches, and is not replaced: remove it first")
    folder = path.absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"no report can be written to {folder}: it is no folder, or not writable")


def _meter(options: argparse.Namespace, inputs: Sequence[Any]) -> Any:
    """The scorer that is asked for, tried on a sample; None where there is none."""
    from t5patches.editing.evaluate import Meter
    from t5patches.editing.reward import load_scorer

    if not (options.scorer or options.reward):
        if options.threshold is not None:
            raise ValueError("--threshold needs --scorer, whose scores it is of")
        if options.samples is not None and options.rules is None:
            raise ValueError("--samples needs --rules or --scorer, which are shown the outputs")
        return None
    given = {"samples": options.samples, "threshold": options.threshold}
    given = {name: value for name, value in given.items() if value is not None}
    scorer = load_scorer(options.scorer, options.reward, inputs, options.max_length)
    return Meter(scorer, **given)
