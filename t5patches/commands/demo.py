"""Train, mark, edit and measure on a built-in task, in about 6 minutes.

A tiny T5 learns to summarise short news. Its training summaries name places that the news does
not name, so the model does the same. Its own summaries are marked where they do, and it is edited
with each objective: the five targeted ones, which also keep the original model's distribution,
and three baselines (unlikelihood, negative likelihood, fine-tuning on corrected summaries).
Held-out news show what each edit removed and what else it changed.

Prints a table and what it says in words; writes DIR/report.html and DIR/results.json. Takes about
6 minutes on two cores. A demo that was interrupted goes on when the command is repeated.
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


def run(options: argparse.Namespace) -> int:
    """Runs the demo.

    Args:
        options: parsed arguments.

    Returns:
        The exit code.
    """
    from rich.console import Console

    from t5patches.editing.demo import DemoConfig, run_demo, show
    from t5patches.editing.report import to_json

    config = DemoConfig(seeds=options.seeds)
    results = run_demo(config, options.output, common.progress_console(options))
    if options.json:
        print(to_json(results))
    elif not options.quiet:
        console = Console()
        # A table that is cut off at 80 columns helps nobody who writes it to a file.
        show(results, console if console.is_terminal else Console(width=140))
        console.print(f"report: {options.output}/report.html", highlight=False, soft_wrap=True)
    return 0
