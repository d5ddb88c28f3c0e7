"""What README.md says is run, and its numbers are those that are stored."""

import pathlib
import re
import subprocess

import jax
import pytest

from bench import readme

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_examples(code):
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(code, "README.md", "exec"), {})


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z0-9-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("document", readme.DOCUMENTS, ids=["root", "bench"])
def test_linked_places_exist(document):
    for path, heading in re.findall(r"\]\((?!http)([^)#]+)(?:#([^)]+))?\)", document.read_text()):
        there = document.parent / path
        assert there.exists(), path
        titles = re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE) if heading else []
        anchors = [re.sub(r"[^a-z0-9 ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not heading or heading in anchors, heading


@pytest.mark.parametrize("document", readme.DOCUMENTS, ids=["root", "bench"])
def test_numbers_are_those_stored(document):
    text = document.read_text()
    assert readme.rendered(text) == text, "run: python -m bench.readme"


def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("demo", "test", "lint", "bench"):
        assert f"make {target}" in shown.stdout
