"""Imports go one way, and what edits a model does not ask which one it has."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# A room may import from itself and from the rooms named here. `t5patches_kernels` is in two parts:
# what its users import, and its insides below.
ROOMS = {
    "t5patches": {"t5patches.model", "t5patches.t5x"},  # T5Patches' own module names
    "t5patches.cli": {"t5patches.commands"},
    "t5patches.commands": {"t5patches.editing", "t5patches.model", "t5patches.runs"},
    "t5patches.editing": {"t5patches.model", "t5patches.runs", "t5patches_kernels"},
    "t5patches.t5x": {"t5patches.model", "t5patches.runs", "t5patches_kernels"},
    "t5patches.configs": {"t5patches.t5x"},
    "t5patches.model": {"t5patches.runs", "t5patches_kernels"},
    "t5patches.runs": set(),
}
# From top to bottom; each may import from its own line and from those below.
KERNELS = (
    {"", "losses", "linear_losses", "preferences", "t5x_losses"},
    {"calls", "checks", "dispatch", "autodiff", "sharding"},
    {"backends"},
    {"core"},
    {"dense"},
)


def modules():
    """Every module of ours by name."""
    for package in ("t5patches", "t5patches_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


NAMES = dict(modules())


def imported(text):
    """The modules of ours that a text imports, also inside functions and for types alone."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            # `from package import module` is of the module, `from module import name` is not.
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in NAMES else node.module for name in whole]
        else:
            continue
        yield from (name for name in names if re.match(r"t5patches(_kernels)?(\.|$)", name))


def room(name):
    first = name.split(".")
    if first[0] == "t5patches_kernels":
        return first[0]
    found = ".".join(first[:2])
    return found if found in ROOMS else "t5patches"


def line(name):
    part = ([*name.split("."), ""])[1]
    return next(i for i, parts in enumerate(KERNELS) if part in parts)


def allowed(name, other):
    if name == other:
        return True
    here, there = room(name), room(other)
    if here == there == "t5patches_kernels":
        return line(name) <= line(other) and name != "t5patches_kernels.dense"
    if there == "t5patches_kernels":  # what its users see
        return there in ROOMS[here] and line(other) == 0
    return here != "t5patches_kernels" and (here == there or there in ROOMS[here])


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_one_way(name):
    wrong = [x for x in imported(NAMES[name].read_text()) if not allowed(name, x)]
    assert not wrong, f"{name} imports {', '.join(wrong)}"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t5patches.model.placement", "import t5patches.editing.train"),
        ("t5patches.runs.files", "def f():\n    from t5patches.model import tokenizer"),
        ("t5patches.editing.train", "from t5patches.t5x.models import BaseModel"),
        ("t5patches.editing.train", "from t5patches_kernels.core import objectives"),
        ("t5patches_kernels.core.statistics", "from t5patches_kernels import autodiff"),
        ("t5patches_kernels.backends.tiling", "from t5patches_kernels.losses import TokenLoss"),
        ("t5patches_kernels.dense", "from t5patches_kernels.core import objectives"),
        ("t5patches_kernels.losses", "import t5patches.network"),
    ],
)
def test_control_a_wrong_import_is_seen(name, text):
    (found,) = imported(text)
    assert not allowed(name, found)


@pytest.mark.parametrize("folder", ["editing", "commands"])
def test_editing_names_no_network(folder):
    for path in sorted((ROOT / "t5patches" / folder).rglob("*.py")):
        found = re.findall(r"T5Config|Transformer|encoder_\w*|decoder_\w*", path.read_text())
        found += filter(is_of_a_family, imported(path.read_text()))
        assert not found, f"{path} names {sorted(set(found))}"


def is_of_a_family(name):
    return re.match(r"t5patches\.model\.(t5|decoder)(\.|$)", name)


@pytest.mark.parametrize("text", [
    "from t5patches.model import t5", "import t5patches.model.decoder.families"
])  # fmt: skip
def test_control_a_network_that_is_imported_is_seen(text):
    (found,) = imported(text)
    assert is_of_a_family(found)
    assert not is_of_a_family("t5patches.model.t5x_format")
