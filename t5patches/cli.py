"""The `t5patches` command: puts the commands of `t5patches.commands` together."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import inspect
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

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
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file's name need not be UTF-8.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _terminated_as_by_exit(), _silenced(options.quiet):
            return options.module.run(options)
    except KeyboardInterrupt:
        again = getattr(options.module, "AGAIN", "repeat the command to go on")
        print(f"interrupted; {again}", file=sys.stderr)
        return 130
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        said = _in_words(error)
        if _is_out_of_memory(error):
            less = getattr(options.module, "LESS_MEMORY", "end what else runs on this machine")
            said = f"out of memory ({said.splitlines()[0][:200]}): {less}"
        common.print_error(options, said)
        return code


def run() -> NoReturn:
    """`main` as a process of its own, which ends with its exit code."""
    try:
        code = main()
    except SystemExit as ended:  # of the parser, and where a signal asks a command to end
        if not isinstance(ended.code, int) or ended.code <= 128:
            raise
        code = ended.code
    if code <= 128:
        sys.exit(code)
    # XLA may be compiling in threads of its own. As Python ends it would take from them what they
    # use: a segmentation fault.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _terminated_as_by_exit() -> Iterator[None]:
    """What is half written is removed on SIGTERM too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _silenced(quiet: bool) -> Iterator[None]:
    """With `--quiet`, what libraries log and warn of is not shown; what they raise is told."""
    # Orbax's event loops are closed before what waits in them: as Python ends, or a disk is full.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable
    if not quiet:
        yield
        return
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TPU_MIN_LOG_LEVEL"):  # read as XLA is loaded
        os.environ.setdefault(name, "3")
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _unraisable(unraisable: Any) -> None:
    """Python calls this with what is raised where nobody can catch it, in a `__del__` for one."""
    number = {SystemExit: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(unraisable.exc_type)
    if number is not None:  # a signal came there: it would be lost, and comes again
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
    elif str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in a line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _version() -> str:
    try:
        return importlib.metadata.version("t5patches")
    except importlib.metadata.PackageNotFoundError:
        return "t5patches, of a checkout that is not installed"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="t5patches",
        description="Stop a language model from saying what it must not, and change little else.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
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
    stopped = isinstance(error, OSError | FloatingPointError) or _is_out_of_memory(error)
    return 1 if stopped else None


def _is_out_of_memory(error: Exception) -> bool:
    """JAX says that a device's memory is full with a `RuntimeError` of one of these texts."""
    texts = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
    full = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return full or isinstance(error, MemoryError)


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror}"
    return str(error) or f"{type(error).__name__}, with no more said"


if __name__ == "__main__":
    run()
