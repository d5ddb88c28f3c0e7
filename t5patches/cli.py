"""The `t5patches` command: puts the commands of `t5patches.commands` together."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Sequence

from t5patches import commands
from t5patches.commands import common

_EPILOG = """\
exit codes: 0 done; 1 stopped while running (no space, no memory, a loss that is no number): what
was reached is kept where the command can go on; 2 wrong arguments, files or data: nothing was
begun; 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: what follows `t5patches`; default, the process's own.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.module.run(options)
    except KeyboardInterrupt:
        print("interrupted; repeat the command to go on", file=sys.stderr)
        return 130
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        print(f"t5patches {options.command}: {_in_words(error)}", file=sys.stderr)
        return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="t5patches",
        description="Stop a T5 from saying what it must not, and change nothing else.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in commands.NAMES:
        module = importlib.import_module(f"t5patches.commands.{name}")
        text = inspect.getdoc(module) or ""
        command = subparsers.add_parser(
            name,
            help=text[:1].lower() + text.partition("\n")[0].rstrip(".")[1:],
            description=text,
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        common.add_output_options(command)
        command.set_defaults(module=module)
    return parser


_NOT_AS_NEEDED = (
    ValueError,
    NotImplementedError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


def _exit_code(error: Exception) -> int | None:
    """2 for what the user gave, 1 for what the machine lacks, None for an error of ours."""
    if isinstance(error, _NOT_AS_NEEDED):
        return 2
    # JAX says that a device's memory is full with a RuntimeError of this text.
    full = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return 1 if full or isinstance(error, OSError | MemoryError | FloatingPointError) else None


def _in_words(error: Exception) -> str:
    return str(error) or f"{type(error).__name__}, with no more said"


if __name__ == "__main__":
    sys.exit(main())
