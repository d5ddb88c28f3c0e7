"""The command line, and through it the whole loop at the smallest size."""

import doctest
import functools
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

import t5patches
from t5patches import cli
from t5patches.commands import demo as demo_command
from t5patches.editing import demo, experiment
from t5patches.editing.annotate import pattern
from t5patches.editing.data import read_examples, read_inputs
from t5patches.editing.demo import DemoConfig
from t5patches.editing.demo_task import (
    PLACES,
    correct,
    make_pairs,
    places_not_in_source,
    well_formed,
    wordings,
)
from t5patches.editing.experiment import Edit
from t5patches.editing.rules import read_rules
from t5patches.editing.train import finished_run
from t5patches.model.folder import load_model
from t5patches.model.tokenizer import SentencePieceTokenizer
from t5patches.runs.files import whole_folder
from t5patches.runs.fingerprints import fingerprint

TINY = {
    "texts": 200,
    "vocab_size": 300,
    "width": 16,
    "layers": 1,
    "base_steps": 20,
    "base_batch_size": 8,
    "edit_inputs": 12,
    "edit_steps": 3,
    "edit_batch_size": 4,
    "held_out": 8,
    "negatives": 3,
    "edits": (Edit("tnff", with_sets=True), Edit("ce", on_sampled=True)),
}


def run(*arguments):
    """The exit code, also where argparse exits by itself."""
    try:
        return cli.main(arguments)
    except SystemExit as left:
        return left.code


@pytest.mark.slow  # test_edit and test_train kill what takes long in it
def test_a_demo_is_killed_goes_on_and_is_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "DemoConfig", functools.partial(DemoConfig, **TINY))
    # A model of this size names no places; it says enough words with an e.
    monkeypatch.setattr(demo, "places_not_in_source", lambda: pattern(r"\w*e\w*"))
    evaluated = []

    def evaluate(*arguments, real=experiment.evaluate, **options):
        evaluated.append(arguments)
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(experiment, "evaluate", evaluate)
    output = tmp_path / "demo"
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam multiplies a float by a count.
        assert run("demo", "--output", str(output)) == 130
        assert "repeat the command to go on" in capsys.readouterr().err
        assert not (output / "results.json").exists()
        # Another size does not go on from there.
        assert run("demo", "--output", str(output), "--seeds", "2") == 2
        assert "differs in seeds (1 there, 2 asked for)" in capsys.readouterr().err
        kept = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file()}
        assert run("demo", "--output", str(output)) == 0
    shown = capsys.readouterr().out
    assert "TNFF, sets of 3, alpha 1" in shown
    assert "corrective" in shown
    assert "• Before, " in shown
    assert "report.html" in shown
    # What took long was not done again.
    for name in ("base", "tnff-1-sets", "edits.jsonl"):
        files = [p for p in kept if f"seed-0/{name}" in str(p)]
        assert files
        assert all(
            p.stat().st_mtime_ns == kept[p] for p in files if p.name != "_CHECKPOINT_METADATA"
        )
    check_results(output)
    check_task(output)
    assert run("demo", "--output", str(output)) == 2
    assert "holds a finished demo" in capsys.readouterr().err


def check_results(output):
    results = json.loads((output / "results.json").read_text())
    names = [row["name"] for row in results["rows"]]
    assert names == ["TNFF, sets of 3, alpha 1", "corrective, on sampled outputs"]
    assert results["settings"]["held_out"] == 8
    assert results["before"]["prevalence"]["value"] > 0
    assert all(row["measures"]["kl"]["value"] >= 0 for row in results["rows"])
    assert all(len(row["history"]["loss"]) == 3 for row in results["rows"])
    assert results["ceiling"] == {}
    assert all("reference_exact" in row["measures"] for row in results["rows"])
    report = (output / "report.html").read_text()
    assert "<mark>" in report
    work = output / "work" / "seed-0"
    examples = read_examples(work / "edits.jsonl", SentencePieceTokenizer(work / "spiece.model"))
    assert len(examples) == 12
    assert any(e.negatives for e in examples)


def check_task(output):
    """What the other commands go on from."""
    base = load_model(output / "model")
    trained = finished_run(output / "work" / "seed-0" / "base", base.params)
    assert fingerprint(base.params) == fingerprint(trained.params)
    assert len(read_inputs(output / "inputs.txt")) == 12
    held_out = read_inputs(output / "held-out.jsonl")
    assert len(held_out) == 8
    assert all(len(source.references) == 1 for source in held_out)
    rules = read_rules(output / "rules.toml")
    assert rules("a fire in Rome", "Fire in Paris") == [(8, 13)]


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["--help"], ["Stop a language model from saying what it must not", "demo", "exit codes"]),
        (
            ["edit", "--help"],
            ["start with tnrf, alpha 1", "spans", "--resume", "--plan", "--lora 16", "exit codes"],
        ),
        (
            ["align", "--help"],
            ["function(outputs)", "--reward DIR", "--most-kl", "last\ncheckpoint"],
        ),
        (["reward", "--help"], ["chosen", "--held-out", "align --reward OUTPUT"]),
        (["convert", "--help"], ["T5X is not needed", "--like DIR", "--model gemma"]),
        (["demo", "--help"], ["targeted objectives", "--seeds N", "--output DIR", "goes on"]),
    ],
)
def test_help_teaches(arguments, needed, capsys):
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    for text in needed:
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["dem"], "invalid choice"),
        (["demo", "--seeds", "0"], "'0' is not a whole number above 0"),
        (["demo", "--seeds", "x"], "'x' is not a whole number above 0"),
        (["demo", "--seeds", "0"], "(see t5patches demo --help)"),
        (["edit", "--seed", "2147483648"], "'2147483648' is too large: 2147483647 is the most"),
        (["annotate", "--seed", "-1"], "'-1' is not a whole number above -1"),
        (["convert", "--step", "2147483648"], "is too large"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments, message, capsys):
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1  # no usage, which hides the error


def test_the_version_is_told(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() in (
        importlib.metadata.version("t5patches"),
        "t5patches, of a checkout that is not installed",
    )


def test_help_does_not_wait_for_jax():
    code = (
        "import sys; from t5patches import cli\n"
        "try: cli.main(['demo', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


NOT_INSTALLED = """
import sys
import time
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("t5x", "tensorflow", "torch"):
            raise ImportError(name)
sys.meta_path.insert(0, Finder())
"""


LIBRARY = [
    f"t5patches.{room}.{path.stem}"
    for room in ("editing", "model", "model.t5", "runs")
    for path in sorted(
        pathlib.Path(t5patches.__file__).parent.joinpath(*room.split(".")).glob("*.py")
    )
    if path.stem != "__init__"
]


@pytest.mark.parametrize("name", LIBRARY)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_editing_needs_neither_t5x_nor_tensorflow_nor_torch():
    code = NOT_INSTALLED + "".join(f"import {name}\n" for name in LIBRARY)
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"held_out": 0}, "held_out is 0: at least 1 is needed"),
        ({"negatives": 40, "vocab_size": 42}, "a vocabulary of 42 leaves at most 39 to try"),
    ],
)
def test_demo_sizes_are_checked(sizes, message):
    with pytest.raises(ValueError, match=message):
        DemoConfig(**sizes)


# The demo's task.


def test_summaries_are_well_formed_and_a_third_names_what_the_news_does_not():
    pairs = make_pairs(2000, seed=5)
    rule = places_not_in_source()
    assert all(well_formed(pair.summary) for pair in pairs)
    unwanted = [bool(list(rule(*pair))) for pair in pairs]
    assert 0.3 < sum(unwanted) / len(pairs) < 0.45
    for pair, bad in zip(pairs, unwanted, strict=True):
        fixed = correct(pair.summary, list(rule(*pair)))
        assert well_formed(fixed)
        assert not list(rule(pair.news, fixed))
        assert (fixed != pair.summary) == bad
        said = wordings(fixed)
        assert fixed in said
        assert len(set(said)) == 4
        assert all(well_formed(text) and set(wordings(text)) == set(said) for text in said)
    assert make_pairs(5, seed=5) == pairs[:5]
    assert make_pairs(5, seed=6) != pairs[:5]


def test_broken_summaries_are_not_well_formed():
    good = f"Fire closes library in {PLACES[0]}, 3 people hurt"
    assert well_formed(good)
    for bad in ("", good + ".", good.replace("3", ""), good.replace("in", "in in"), good[:-2]):
        assert not well_formed(bad)


LESS = "a smaller batch"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (OSError("in words"), 1, "in words"),
        (FileNotFoundError(2, "No such file", "x"), 2, "x: No such file"),
        (MemoryError(), 1, f"out of memory (MemoryError, with no more said): {LESS}"),
        (MemoryError("116. TiB"), 1, f"out of memory (116. TiB): {LESS}"),
        *(
            (RuntimeError(f"{said}\nand so on"), 1, f"out of memory ({said}): {LESS}")
            for said in ("RESOURCE_EXHAUSTED: 3 GB", "INTERNAL: Out of memory allocating 7 bytes")
        ),
        (FloatingPointError("the loss is nan"), 1, "the loss is nan"),
        (NotImplementedError("no sets"), 2, "no sets"),
        (ValueError("\x1b]0;x\x07 \u202eb\r\n2"), 2, "\\x1b]0;x\\x07 \\u202eb\\r\n2"),
        (OSError(28, "No space", "a\x1b[2J\nb"), 1, "a\\x1b[2J\nb: No space"),
    ],
)
def test_errors_are_told_and_not_traced(monkeypatch, capsys, error, code, said):
    def fail(_):
        raise error

    monkeypatch.setattr(demo_command, "run", fail)
    monkeypatch.setattr(demo_command, "LESS_MEMORY", LESS, raising=False)
    assert run("demo") == code
    assert capsys.readouterr().err == f"t5patches demo: {said}\n"


def test_an_error_of_ours_is_traced(monkeypatch):
    def fail(_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(demo_command, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run("demo")


def test_the_exit_code_is_that_of_the_process(monkeypatch):
    monkeypatch.setattr(demo_command, "run", lambda options: options.seeds)
    assert run("demo", "--seeds", "7") == 7


def test_terminated_it_cleans_up_behind_itself(monkeypatch, tmp_path):
    def terminate(options):
        with whole_folder(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(demo_command, "run", terminate)
    assert run("demo") == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_not_lost_where_nothing_can_be_raised(monkeypatch, number, code):
    class Late:
        def __del__(self):
            signal.raise_signal(number)

    def run(options):
        Late()
        time.sleep(20)
        return 0

    monkeypatch.setattr(demo_command, "run", run)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    began = time.monotonic()
    # Ignored from the start where a shell has put the tests into the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ended = cli.main(["demo"])
    except SystemExit as left:
        ended = left.code
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == code
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", ["annotate", "edit", "reward", "align", "evaluate"])
def test_what_takes_less_memory_are_options_of_the_command(name, capsys):
    less = importlib.import_module(f"t5patches.commands.{name}").LESS_MEMORY
    assert run(name, "--help") == 0
    known = capsys.readouterr().out
    assert "--batch-size" in less
    assert all(option in known for option in re.findall(r"--[a-z-]+", less))


NOISE = {
    "logged": "logging.getLogger('absl').error('noise')",
    "warned": "warnings.warn('noise')",
    "unraisable": "Loop()",
    "asyncio": "logging.getLogger('asyncio').error('noise: Event loop is closed')",
}


def test_quiet_is_quiet():
    code = (
        "import logging, sys, warnings; from t5patches import cli; from t5patches.commands "
        "import demo\n"
        "class Loop:\n"
        "  def __del__(self): raise RuntimeError('Event loop is closed')\n"
        "def run(options):\n  " + "; ".join(NOISE.values()) + "\n  return 0\n"
        "demo.run = run\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "demo"]
    loud, quiet = (
        subprocess.run(command + more, capture_output=True, text=True, check=True).stderr
        for more in ([], ["--quiet"])
    )
    assert loud.count("noise") == 2
    assert "Event loop is closed" not in loud  # of Orbax's threads, and no news to anybody
    assert quiet == ""


def test_a_name_that_is_no_utf8_is_told_all_the_same():
    code = (
        "import os, sys; from t5patches import cli; from t5patches.commands import common, demo\n"
        "name = os.fsdecode(b'a\\xff')\n"
        "demo.run = lambda o: common.print_result(o, {'output': name}, name) or 0\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "demo"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    for more, said in (([], "a\\udcff\n"), (["--json"], '{"output": "a\\udcff"}\n')):
        done = subprocess.run(
            command + more, capture_output=True, text=True, check=True, env=environment
        )
        assert done.stdout == said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_process_that_is_interrupted_as_xla_compiles_ends_with_its_code(number, code):
    """And not in a segmentation fault, as XLA's threads outlive what they use."""
    program = (
        "import sys, threading, time, os, jax, jax.numpy as jnp\n"
        "from t5patches import cli\n"
        "from t5patches.commands import demo\n"
        "def step(x):\n"
        "  for i in range(100): x = jnp.sin(x @ x + i) * jnp.cumsum(x, 0)\n"
        "  return x\n"
        "def run(options):\n"
        "  lowered = jax.jit(step).lower(jnp.ones((16, 16)))\n"
        "  def interrupt():\n"  # again, where it came as nothing could be raised
        f"    while True: time.sleep(0.2); os.kill(os.getpid(), {int(number)})\n"
        "  threading.Thread(target=interrupt, daemon=True).start()\n"
        "  lowered.compile()\n"
        "  time.sleep(60)\n"
        "demo.run = run\n"
        "sys.argv[1:] = ['demo']\n"
        "cli.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("interrupted" in done.stderr) == (number == signal.SIGINT)
