"""Runs a program in two processes that know of each other, as two hosts of a pod."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

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
    path = os.pathsep.join([_TESTS, os.environ.get("PYTHONPATH", "")])
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, os.fspath(program), port, str(i), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        for i in range(2)
    ]
    try:
        both = [process.communicate(timeout=300) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail("the two processes did not finish within 300 s")
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, both, strict=True):
        assert process.returncode == 0, err[-3000:]
    return [out for out, _ in both]
