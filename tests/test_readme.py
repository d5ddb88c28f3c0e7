"""What README.md says is run, its numbers are those stored, and ten minutes are enough for it."""

import argparse
import importlib
import inspect
import pathlib
import re
import shlex
import shutil
import string
import subprocess
import tomllib

import editing_samples
import jax
import pytest
from test_decoder_commands import place, run  # noqa: F401

import t5patches_kernels
from bench import card, readme, tutorial
from t5patches import cli, commands, editing
from t5patches_kernels.core.objectives import TARGETED_NEGATIVE

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = pytest.mark.parametrize("document", readme.DOCUMENTS, ids=["root", "bench"])


def test_it_takes_ten_minutes():
    assert len(README.split()) <= 2500


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_examples(code):
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(code, "README.md", "exec"), {})


def test_the_first_screen_edits_a_model(place, tmp_path, monkeypatch, capsys):  # noqa: F811
    """With a tiny model in place of Gemma, what it says as the words, and fewer tokens."""
    (block,) = re.findall(r"## Stop a model.*?```sh\n(.*?)```", README, re.DOTALL)
    install, *lines = re.findall(r"^(?:pip|t5patches) (?:.*\\\n)*.*", block, re.MULTILINE)
    assert install.startswith("pip install '.[editing]'")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "model", tmp_path / "gemma")
    shutil.copy(place / "inputs.txt", tmp_path / "prompts.txt")
    shutil.copy(place / "inputs.txt", tmp_path / "others.txt")
    (tmp_path / "words.txt").write_text("".join(f"{x}\n" for x in string.ascii_lowercase))
    less = ("--max-length", 6)
    more = {"annotate": less, "edit": ("--steps", 2, "--devices", 1), "evaluate": less}
    assert [name for name, *_ in map(tutorial.words, lines)] == [*more]
    for line in lines:
        name, *_ = words = tutorial.words(line)
        assert run(*words, *more[name]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\d+ of 16 outputs have something unwanted", shown)
    assert "Edits of gemma" in shown


def test_the_functions_behind_the_commands(tmp_path, monkeypatch, capsys):
    """README names `help(t5patches.editing)`, whose example is run here on a tiny model."""
    code = inspect.cleandoc(editing.__doc__).partition("::\n\n")[2]
    monkeypatch.chdir(tmp_path)
    editing_samples.model_folder(tmp_path / "model")
    (tmp_path / "inputs.txt").write_text("\n".join(editing_samples.TEXTS))
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(inspect.cleandoc(code), "t5patches/editing/__init__.py", "exec"), {})
    assert (tmp_path / "edited" / "config.json").exists()
    before, after = map(float, capsys.readouterr().out.split())
    assert 0 <= after < before <= 100


@DOCUMENTS
def test_make_targets_exist(document):
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"(?:^|`)make ([a-z0-9-]+)", document.read_text(), re.MULTILINE)
    assert named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_a_tpu_is_measured_by_one_command():
    """It installs a JAX and a TPU compiler that know each other."""
    command = 'pip install -e ".[bench-tpu]" && python -m bench.card'
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert "bench-tpu" in extras
    for text in (README, readme.DOCUMENTS[1].read_text(), card.__doc__):
        assert re.findall(r"pip install [^`]*?python -m bench.card", text) == [command]


def test_commands_and_flags_exist(capsys):
    helps = {}
    for name in commands.NAMES:
        with pytest.raises(SystemExit, match="0"):
            cli.main([name, "--help"])
        helps[name] = capsys.readouterr().out
    assert set(re.findall(r"`t5patches ([a-z]+)", README)) <= set(helps)
    flags = re.findall(r"`(--[a-z-]+)", README)
    assert flags
    for flag in flags:
        assert any(flag in shown for shown in helps.values()), flag


def commands_shown():
    """The whole command lines of both documents and of the commands' own help."""
    texts = [document.read_text() for document in readme.DOCUMENTS]
    modules = [importlib.import_module(f"t5patches.commands.{name}") for name in commands.NAMES]
    texts += [inspect.getdoc(module) for module in modules]
    found = re.findall(r"^(?:\$| ) (t5patches (?:.*\\\n)*.*)", "\n".join(texts), re.MULTILINE)
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("line", commands_shown(), ids=lambda line: " ".join(line.split()[1:3]))
def test_command_lines_are_understood(line):
    cli._parser().parse_args(tutorial.words(line))


@DOCUMENTS
def test_options_with_their_values_are_understood(document):
    """Such as `--lora 8`, or `t5patches edit --cache-teacher DIR`, amid the text."""
    (subparsers,) = cli._parser()._subparsers._group_actions
    said = re.findall(r"`(?:t5patches ([a-z]+) )?(--[^`]+)`", document.read_text())
    assert said
    for command, given in said:
        option, *_ = words = shlex.split(given)
        parsers = [subparsers.choices[command]] if command else subparsers.choices.values()
        actions = [
            action for p in parsers for action in p._actions if option in action.option_strings
        ]
        assert actions, given
        named = len(words) == 1
        assert named or any(understood(action, words) for action in actions), given


def understood(action, words):
    alone = argparse.ArgumentParser(exit_on_error=False, add_help=False)
    alone._add_action(action)
    try:
        return not alone.parse_known_args(words)[1]
    except argparse.ArgumentError:
        return False


def test_what_is_not_understood_is_found():
    (subparsers,) = cli._parser()._subparsers._group_actions
    actions = {o: a for a in subparsers.choices["edit"]._actions for o in a.option_strings}
    for given in ("--lora 8", "--until 0.02", "--keep FILE", "--plan", "--distributed a:1 2 0"):
        assert understood(actions[given.split()[0]], given.split()), given
    for given in ("--lora x", "--until soon", "--keep", "--plan 3", "--chat sometimes"):
        assert not understood(actions[given.split()[0]], given.split()), given


def test_the_table_of_losses_names_every_objective_and_its_function():
    rows = re.findall(r"^\| `(\w+)` \| .* \| `(\w+)` \|$", README, re.MULTILINE)
    assert [name for name, _ in rows] == [*TARGETED_NEGATIVE, "ul", "nl", "ce"]
    assert all(hasattr(t5patches_kernels, function) for _, function in rows)


@DOCUMENTS
def test_linked_places_exist(document):
    for path, heading in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", document.read_text()):
        there = document.parent / path if path else document
        assert there.exists(), path
        titles = re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE) if heading else []
        anchors = [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not heading or heading in anchors, heading


@DOCUMENTS
def test_numbers_are_those_stored(document):
    text = document.read_text()
    assert readme.rendered(text) == text, "run: python -m bench.readme"


def test_every_table_is_shown():
    shown = re.findall(r"<!-- (\S+) -->", "".join(d.read_text() for d in readme.DOCUMENTS))
    assert sorted(name for name in shown if name != "end") == sorted(readme.SECTIONS)


def test_measured_tables_have_one_number_a_cell():
    for name in ("real", "cpu", "tpu", "gpu"):
        section = README.partition(f"<!-- {name} -->")[2].partition("<!-- end -->")[0]
        _, *rows = re.findall(r"^\|(?!---)(.*)\|$", section, re.MULTILINE)
        assert rows
        for row in rows:
            _, *cells = row.split("|")
            assert all(re.fullmatch(r" (\d+(\.\d+)?)? ", cell) for cell in cells), row


def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("demo", "test", "lint", "bench"):
        assert f"make {target}" in shown.stdout
