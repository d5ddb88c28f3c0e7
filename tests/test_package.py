"""The package as a newcomer meets it: imports, rooms, examples, and what the documents say."""

import ast
import doctest
import importlib
import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import t5patches_kernels
from t5patches_kernels import TARGETED_NEGATIVE, TRAINING_OBJECTIVES

ROOT = pathlib.Path(__file__).parent.parent


def _modules():
    for info in pkgutil.walk_packages(t5patches_kernels.__path__, "t5patches_kernels."):
        yield info.name


@pytest.mark.parametrize("name", list(_modules()))
def test_examples_in_docstrings(name):
    results = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert results.failed == 0


def test_every_public_function_has_an_example():
    for name in t5patches_kernels.__all__:
        if name.endswith(("_loss", "_divergence", "_statistics")):
            assert ">>>" in getattr(t5patches_kernels, name).__doc__, name


def _python(code):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout


def test_the_losses_need_jax_alone():
    """With everything but jax's own needs hidden, the losses import; jaxlib brings numpy, scipy."""
    hidden = ("flax", "optax", "orbax", "rich", "matplotlib", "sentencepiece", "t5patches")
    out = _python(
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({hidden!r}))\n"
        "import t5patches_kernels\n"
        "print('ok')"
    )
    assert out.strip() == "ok"


def test_importing_costs_little_over_jax():
    """Modules, not seconds: what is imported beyond jax is ours alone."""
    out = _python(
        "import sys, jax, jax.numpy\n"
        "before = set(sys.modules)\n"
        "import t5patches_kernels\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    assert set(out.split()) <= {"t5patches_kernels", "jax", "jaxlib"}


@pytest.mark.parametrize("name", ["models", "trainer", "cache_teacher"])
def test_the_t5x_part_says_how_to_get_t5x(name):
    out = _python(
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('t5x', 'tensorstore', 'orbax')))\n"
        "try:\n"
        f"    import t5patches.{name}\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    assert "T5X is on no package index: clone https://github.com/google-research/t5x" in out


def _lists_of_objectives(source):
    """The line numbers of displays, and of strings but docstrings, that list the objectives."""
    tree = ast.parse(source)
    docstrings = {
        id(node.value) for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }  # fmt: skip
    for node in ast.walk(tree):
        found = set()
        if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
            items = node.keys if isinstance(node, ast.Dict) else node.elts
            found = {str(i.value).lower() for i in items if isinstance(i, ast.Constant)}
        elif isinstance(node, ast.Constant) and id(node) not in docstrings:
            found = set(re.findall(r"\w+", str(node.value).lower()))
        if found.issuperset(TARGETED_NEGATIVE):
            yield node.lineno


def test_there_is_one_list_of_objectives():
    """All others are made of it, or the next objective is left out of one of them."""
    found = [
        (str(path.relative_to(ROOT)), line)
        for folder in ("t5patches_kernels", "t5patches", "bench", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for line in _lists_of_objectives(path.read_text())
    ]
    assert [file for file, _ in found] == ["t5patches_kernels/core/objectives.py"], found


@pytest.mark.parametrize(
    "second",
    [
        f"NAMES = {TARGETED_NEGATIVE}",
        f"names = {[name.upper() for name in TRAINING_OBJECTIVES]}",
        f"cases = {dict.fromkeys(TRAINING_OBJECTIVES, 1)}",
        f"raise ValueError(f'{{x}} is none of {', '.join(TARGETED_NEGATIVE)}')",
    ],
)
def test_a_second_list_is_found(second):
    assert list(_lists_of_objectives(f'"""{TARGETED_NEGATIVE}"""\n{second}')) == [2]


def test_what_names_each_objective_names_them_all():
    classes = (ROOT / "t5patches/t5x/models.py").read_text()
    assert tuple(re.findall(r'    OBJECTIVE = "(\w+)"', classes)) == TARGETED_NEGATIVE
    config = (ROOT / "t5patches/configs/model.gin").read_text()
    assert f"TRAINING_OBJECTIVES: {', '.join(TRAINING_OBJECTIVES)}." in config
