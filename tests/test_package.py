"""The package as a newcomer meets it: imports, examples, and what the documents say."""

import doctest
import importlib
import os
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import t5patches_kernels

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


@pytest.mark.parametrize("name", ["models", "trainer"])
def test_the_t5x_part_says_how_to_get_t5x(name):
    out = _python(
        "import sys\n"
        "sys.modules['t5x'] = None\n"
        "try:\n"
        f"    import t5patches.{name}\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    assert "T5X is on no package index: clone https://github.com/google-research/t5x" in out
