"""Runs a program in two processes that know of each other, as two hosts of a pod."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import pytest

_LONGEST = 150  # seconds
_TESTS = os.fspath(pathlib.Path(__file__).parent)

# Four devices each; what comes after it sees all eight. The other flags are the test's own, so that
# both compute the same initial values.
_BEGIN = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
"""


def run(text: str, directory: pathlib.Path, *arguments: str) -> list[str]:
    """What a program prints in each process; `arguments` begin at ``sys.argv[3]``."""
    program = directory / "program.py"
    program.write_text(_BEGIN + text)
    done = together(lambda port, i: [os.fspath(program), str(port), str(i), *arguments])
    for process in done:
        assert process.returncode == 0, process.stderr[-3000:]
    return [process.stdout for process in done]


def together(
    command: Callable[[int, int], Sequence[str]], environment: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Runs Python in two processes at once, with what `command` makes of a free port and 0 or 1."""
    path = os.pathsep.join([_TESTS, os.environ.get("PYTHONPATH", "")])
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, *command(port, i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}
            | dict(environment or {}),
        )
        for i in range(2)
    ]
    try:
        both = [process.communicate(timeout=_LONGEST) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)  # says where it is
        said = "".join(process.communicate()[1][-6000:] for process in processes)
        pytest.fail(f"the two processes did not finish within {_LONGEST} s: {said}")
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *said)
        for process, said in zip(processes, both, strict=True)
    ]
