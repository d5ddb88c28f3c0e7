"""The tutorial of README.md: runs its commands in a fresh directory and stores what they print.

python -m bench.tutorial
python -m bench.readme     # puts it into README.md
"""

from __future__ import annotations

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
    "t5patches edit --model tutorial/model --data tutorial/edits.jsonl --output tutorial/edited",
    "t5patches evaluate --before tutorial/model --after tutorial/edited \\\n"
    "    --inputs tutorial/held-out.jsonl --rules tutorial/rules.toml --references \\\n"
    "    --report tutorial/report.html",
)


def words(command: str) -> list[str]:
    """What follows `t5patches`, as a shell would split it."""
    return shlex.split(command.replace("\\\n", " "))[1:]


def main() -> None:
    """Runs the commands, shows and stores what they print."""
    root = str(pathlib.Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root}
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for command in COMMANDS:
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
            seconds = round(time.monotonic() - began)
            print(f"{printed}({seconds} s)\n", flush=True)
            rows.append({"command": command, "printed": printed.splitlines(), "seconds": seconds})
    common.save("tutorial", rows)


if __name__ == "__main__":
    main()
