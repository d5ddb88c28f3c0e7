"""README's tutorial, with the smallest model that there is: the same commands, other numbers."""

import functools
import json
import pathlib
import re

import jax
import pytest
from test_cli import TINY

from bench import tutorial
from t5patches import cli
from t5patches.editing import demo
from t5patches.editing.demo import DemoConfig

ROOT = pathlib.Path(tutorial.__file__).parent.parent
SMALLER = {
    "demo": (),
    "annotate": ("--expand", "2", "--max-length", "6"),
    "edit": ("--steps", "3", "--batch-size", "8", "--devices", "1"),
    "evaluate": ("--max-length", "6"),
}


def run(command, *more):
    name, *_ = words = [*tutorial.words(command), *more]
    with jax.numpy_dtype_promotion("standard"):  # Optax's own.
        return cli.main([*words, *SMALLER[name]])


def test_four_commands_stop_a_model_from_inventing_names(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "DemoConfig", functools.partial(DemoConfig, **TINY))
    monkeypatch.chdir(tmp_path)
    prepare, annotate, edit, evaluate = tutorial.COMMANDS
    assert run(prepare) == 0
    # A model of this size names nothing; some words it says.
    rules = pathlib.Path("tutorial/rules.toml")
    assert "absent_from_source" in rules.read_text()
    rules.write_text("[[rule]]\npattern = '\\S+'\n")
    assert run(annotate) == 0
    assert re.search(r"of 12 outputs have something unwanted", capsys.readouterr().out)
    assert run(edit) == 0
    assert run(evaluate) == 0
    shown = capsys.readouterr().out
    assert "over 8 inputs" in shown
    assert pathlib.Path("tutorial/report.html").exists()
    for command in tutorial.ROUNDS[:-1]:
        assert run(command) == 0
    capsys.readouterr()
    assert run(tutorial.ROUNDS[-1], "--json") == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]]
    last = [name.split("/")[-1] for name in names]
    assert last == ["round-1", "round-2", "round-2-original"]


@pytest.mark.parametrize("name", ["annotate", "edit", "evaluate"])
def test_help_of_the_commands_teaches(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    shown = capsys.readouterr().out
    assert "--json" in shown
    assert "exit codes" in shown
    assert len(shown) > 2000


def test_the_stored_tutorial_is_of_these_commands():
    stored = json.loads((ROOT / "bench/results/tutorial.json").read_text())
    assert [row["command"] for row in stored["rows"]] == [*tutorial.COMMANDS, *tutorial.ROUNDS]
