"""Train, mark, edit and measure on a built-in task, in minutes.

A tiny T5 learns to summarise short news. Its training summaries name places that the news does
not name, so the model does the same. Its own summaries are marked where they do, and it is edited
in eight ways: by targeted objectives, which also keep the original model's distribution, and by
one rival of each family (UNDIAL, unlikelihood, negative likelihood, fine-tuning on corrected
summaries, DPO, FTPO), each as it does best. Held-out news show what each edit removed and what else
it changed.

Prints a table and what it says in words; writes DIR/report.html and DIR/results.json. Takes 5 to
8 minutes on two cores. A demo that was interrupted goes on when the command is repeated.
"""

from __future__ import annotations

import argparse

from t5patches.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `t5patches demo`.

    Args:
        parser: of the command.
    """
    parser.add_argument(
        "--output",
        metavar="DIR",
        default="demo-report",
        help="where the report goes (default: %(default)s); a finished demo is not overwritten",
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=common.positive,
        default=1,
        help="repeat everything, base model included, with N seeds and report means and standard "
        "errors over them; with one seed the errors are over held-out inputs (default: 1)",
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="train the model and stop: DIR/model (a Hugging Face folder), DIR/inputs.txt, "
        "DIR/held-out.jsonl and DIR/rules.toml are what annotate, edit and evaluate take",
    )


def run(options: argparse.Namespace) -> int:
    """Runs the demo.

    Args:
        options: parsed arguments.

    Returns:
        The exit code.
    """
    from t5patches.editing.demo import DemoConfig, prepare_demo, run_demo

    config, console = DemoConfig(seeds=options.seeds), common.progress_console(options)
    if options.prepare:
        prepare_demo(config, options.output, console)
        files = [f"{options.output}/{name}" for name in _PREPARED]
        common.print_result(options, {"files": files}, f"written: {', '.join(files)}")
        return 0
    results = run_demo(config, options.output, console)
    common.print_results(options, results, f"{options.output}/report.html")
    return 0


_PREPARED = ("model", "inputs.txt", "held-out.jsonl", "rules.toml")
