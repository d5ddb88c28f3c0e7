"""`t5patches edit` by two processes, as on two hosts: one writes, and the model is the same."""

import json
import os
import re

import editing_samples
import jax
import numpy as np
import pytest
import two_processes
from harness import slow_unless
from safetensors.numpy import load_file

from t5patches import cli
from t5patches.runs import hosts

TEXTS = ["a cat sat on a mat", "a dog sat on a cat", "on a mat a dog sat"]
LINES = [
    {"inputs": text, "outputs": "a dog sat", "spans": [[2, 5]] * (i % 2)}
    for i, text in enumerate(TEXTS * 3)
]
ALWAYS = ("--batch-size", "8", "--model-parallel", "2", "--checkpoint-every", "2")
# The command line of a process that looks for what is there when the first one has begun.
SLOW = """
import sys, time
from t5patches import cli
from t5patches.editing import train
quick = train.finished_run
def slow(*arguments):
    time.sleep(3)
    return quick(*arguments)
train.finished_run = slow
sys.exit(cli.main(sys.argv[1:]))
"""
FOUR_EACH = {"XLA_FLAGS": re.sub(r"(count=)\d+", r"\g<1>4", os.environ["XLA_FLAGS"])}


# Of an edit of each kind of model.
EDITS = {"T5": ("model.safetensors", ()), "decoder": ("adapter_model.safetensors", ("--lora", "2"))}


@pytest.fixture
def command(tmp_path, request):
    """Arguments of an edit of a tiny model."""
    kind = getattr(request, "param", "T5")
    editing_samples.FOLDERS[kind](tmp_path / "tiny")
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))

    def make(output, *more):
        files = ("--model", tmp_path / "tiny", "--data", tmp_path / "edits.jsonl")
        return [str(x) for x in ("edit", *files, "--output", tmp_path / output, *ALWAYS, *more)]

    return make


def by_two(arguments):
    def of(port, number):
        address = ("--distributed", f"localhost:{port}", "2", str(number))
        return [*(("-m", "t5patches.cli"), ("-c", SLOW))[number], *arguments, *address]

    return two_processes.together(of, FOUR_EACH)


@pytest.mark.parametrize(
    ("command", "kind"),
    [slow_unless(kind == "decoder", kind, kind) for kind in EDITS],
    indirect=["command"],
)
def test_two_hosts_make_the_model_that_one_makes(command, kind, tmp_path):
    file, trained = EDITS[kind]
    with jax.numpy_dtype_promotion("standard"):
        assert cli.main(command("one", "--steps", "4", *trained)) == 0
    # The second comes late to all it reads.
    first, second = by_two(command("two", "--steps", "4", *trained))
    assert first.returncode == second.returncode == 0, first.stderr[-3000:] + second.stderr[-3000:]
    assert "4 updates" in first.stdout
    assert "updates" not in second.stdout  # but Gloo says that it has connected
    one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, x in one.items():
        np.testing.assert_allclose(two[name], x, rtol=1e-5, atol=1e-6, err_msg=name)
    record = json.loads((tmp_path / "two" / "t5patches.json").read_text())
    assert record["rounds"][0]["devices"] == "8 x cpu"


REFUSED = """
from t5patches.runs import hosts

def refuse():
    raise ValueError("it is there already")

print("found", hosts.first_says(lambda: 7 if hosts.is_first() else 8))
try:
    hosts.once(refuse)
except ValueError as error:
    print(error)
"""


def test_what_the_first_refuses_the_others_do_not_wait_for(tmp_path):
    first, second = two_processes.run(REFUSED, tmp_path)
    assert "found 7" in first
    assert "found 7" in second
    assert first.endswith("\nit is there already\n")
    assert "the first process could not go on: ValueError: it is there already" in second


@pytest.mark.parametrize("address", [("localhost",), ("localhost:1", "two", "0")])
def test_an_address_of_another_form(command, address, capsys):
    assert cli.main(command("out", "--distributed", *address)) == 2
    assert "HOST:PORT of the first process, their number" in capsys.readouterr().err


def test_one_process_needs_nothing():
    done = []
    hosts.once(lambda: done.append(1))
    assert done == [1]
    assert hosts.is_first()
