"""README.md's tutorial and bench/README.md's second round: runs their commands, stores the output.

`python -m bench.readme` then puts it into both.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time

from bench import common

COMMANDS = (
    "t5patches demo --prepare --output tutorial",
    "t5patches annotate --model tutorial/model --inputs tutorial/inputs.txt \\\n"
    "    --rules tutorial/rules.toml --expand 32 --output tutorial/edits.jsonl",
    "t5patches edit --model tutorial/model --data tutorial/edits.jsonl \\\n"
    "    --learning-rate 0.001 --output tutorial/edited",
    "t5patches evaluate --before tutorial/model --after tutorial/edited \\\n"
    "    --inputs tutorial/held-out.jsonl --rules tutorial/rules.toml \\\n"
    "    --report tutorial/report.html",
)
_ANNOTATE = "t5patches annotate --rules tutorial/rules.toml --inputs tutorial/inputs.txt \\\n"
ROUNDS = (
    f"{_ANNOTATE}    --model tutorial/model --output tutorial/1.jsonl",
    "t5patches edit --model tutorial/model --data tutorial/1.jsonl --output tutorial/round-1 \\\n"
    "    --learning-rate 0.001",
    f"{_ANNOTATE}    --model tutorial/round-1 --output tutorial/2.jsonl",
    "t5patches edit --model tutorial/round-1 --data tutorial/2.jsonl --output tutorial/round-2 \\\n"
    "    --learning-rate 0.001",
    "t5patches edit --model tutorial/round-1 --original tutorial/model \\\n"
    "    --data tutorial/1.jsonl tutorial/2.jsonl --output tutorial/round-2-original \\\n"
    "    --learning-rate 0.001",
    "t5patches evaluate --rules tutorial/rules.toml --inputs tutorial/held-out.jsonl \\\n"
    "    --before tutorial/model \\\n"
    "    --after tutorial/round-1 tutorial/round-2 tutorial/round-2-original",
)


def words(command: str) -> list[str]:
    """What follows `t5patches`, as a shell would split it."""
    return shlex.split(command.replace("\\\n", " "))[1:]


def run(directory: str) -> list[dict]:
    """Runs the commands in a directory and shows what they print."""
    root = str(pathlib.Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root}
    rows = []
    for command in (*COMMANDS, *ROUNDS):
        print(f"$ {command}", flush=True)
        began = time.monotonic()
        printed = subprocess.run(
            [sys.executable, "-m", "t5patches.cli", *words(command)],
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        print(f"{printed}({time.monotonic() - began:.0f} s)\n", flush=True)
        rows.append({"command": command, "printed": printed.splitlines()})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", metavar="DIR", help="run here; default: where all is removed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as passing:
        common.save("tutorial", run(options.keep or passing))
