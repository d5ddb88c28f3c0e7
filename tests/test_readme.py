"""What README.md says is run, its numbers are those stored, and ten minutes are enough for it."""

import inspect
import pathlib
import re
import subprocess

import editing_samples
import jax
import pytest

import t5patches_kernels
from bench import readme
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


def test_the_functions_behind_the_commands(tmp_path, monkeypatch, capsys):
    """README names `help(t5patches.editing)`, whose example is run here on a tiny model."""
    code = inspect.cleandoc(editing.__doc__).partition("::\n\n")[2]
    monkeypatch.chdir(tmp_path)
    editing_samples.model_folder(tmp_path / "model")
    (tmp_path / "inputs.txt").write_text("\n".join(editing_samples.TEXTS))
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(inspect.cleandoc(code), "t5patches/editing/__init__.py", "exec"), {})
    assert (tmp_path / "edited" / "config.json").exists()
    assert capsys.readouterr().out.count("Measure(") == 2


@DOCUMENTS
def test_make_targets_exist(document):
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"(?:^|`)make ([a-z0-9-]+)", document.read_text(), re.MULTILINE)
    assert named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


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
