"""The `t5patches` command.

Each command is one `_add_...` function, which says what it takes, and one `_run_...` function,
which returns the exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

_EPILOG = """\
exit codes: 0 done, 1 the data or the files are not what is needed, 2 wrong arguments,
130 interrupted (repeat the same command to go on)
"""

_DEMO = """\
Shows targeted negative training on a small task that runs on any machine.

A tiny T5 learns to summarise short news. Its training summaries name places that the news does
not name, so the model does the same. Its own summaries are marked where they do, and it is edited
with each objective: the five targeted ones, which also keep the original model's distribution,
and three baselines (unlikelihood, negative likelihood, fine-tuning on corrected summaries).
Held-out news show what each edit removed and what else it changed.

Prints a table and what it says in words; writes DIR/report.html and DIR/results.json. Takes 6 to
10 minutes on two cores, depending on what else runs. A demo that was interrupted goes on when the
command is repeated.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: what follows `t5patches`; default, the process's own.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="t5patches",
        description="Stop a T5 from saying what it must not, and change nothing else.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"t5patches {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; repeat the command to go on", file=sys.stderr)
        return 130


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="train, mark, edit and measure on a built-in task, in 6 to 10 minutes",
        description=_DEMO,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        default="demo-report",
        help="where the report goes (default: %(default)s); a finished demo is not overwritten",
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=_positive,
        default=1,
        help="repeat everything, base model included, with N seeds and report means and standard "
        "errors over them; with one seed the errors are over held-out inputs (default: 1)",
    )
    parser.set_defaults(run=_run_demo)


def _run_demo(options: argparse.Namespace) -> int:
    # Imported here, so that --help and wrong arguments do not wait for JAX.
    from rich.console import Console

    from t5patches.editing.demo import DemoConfig, run_demo, show

    results = run_demo(DemoConfig(seeds=options.seeds), options.output)
    console = Console()
    # A table that is cut off at 80 columns helps nobody who writes it to a file.
    show(results, console if console.is_terminal else Console(width=140))
    console.print(f"report: {options.output}/report.html", highlight=False, soft_wrap=True)
    return 0


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
