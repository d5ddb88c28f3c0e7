"""The script for a borrowed card, as far as a CPU can take it."""

import json
import pathlib
import sys
import types

import pytest

from bench import card, checks, common, counters, liger, tpu
from bench.checks import Apart, Program

pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="needs absl-py")


@pytest.mark.parametrize(
    "of",
    [Program("tnff", "float32", 8, 264, card.KERNEL),
     Program("tnff", "bfloat16", 8, 264, card.KERNEL, width=16)],
)  # fmt: skip
def test_a_kernel_that_is_wrong_is_told(of, monkeypatch):
    assert checks.error(of, checks.ready(of))["right"]
    name = "head_total" if of.width else "total"
    honest = getattr(common, name)

    def total(what, *rest):
        return honest(what, *rest) * (1.001 if what == card.KERNEL else 1.0)

    monkeypatch.setattr(common, name, total)
    assert not checks.error(of, checks.ready(of))["right"]


# --- What is run, and in which order --------------------------------------------------------------


def test_each_plan_that_is_timed_is_held_to_float64_before():
    options = card.options_of([])
    before = [program for of in card.checked(options).values() for program in of]
    timed = card.Timed(options, Apart({}))
    planned = {program.plan for program in (*timed.programs, *timed.again)} - {None}
    heads = (of for of, _ in card.heads(options, Apart({})))
    planned |= {
        Program(of["objective"], of["dtype"], 8, of["vocabulary"], of["what"], of["width"]).plan
        for of in heads
    }
    assert planned <= {program.plan for program in before}
    alone = {(of.objective, of.dtype) for of in before if (of.vocabulary, of.what) == (32128, 1)}
    assert len(alone) == 5 * 2
    of_sixteen = {(of.objective, of.vocabulary) for of in before if of.what == 16}
    assert {(x, n) for x in ("tnrr", "tnrf") for n in (128256, 250112)} <= of_sixteen
    assert any(of.plan.keeps and of.dtype == "bfloat16" for of in before)
    assert ("cluster", 250112) in {(of.what, of.vocabulary) for of in timed.again}


def test_what_a_run_that_is_cut_short_has(monkeypatch):
    """Times of each vocabulary from early on, then the head, and the long tail at the end."""
    monkeypatch.setattr(Program, "compiled", lambda _: None)
    rows = [of for of, _ in card.steps(card.options_of([]))]
    assert {row["objective"] for row in rows if "objective" in row} == {*common.OBJECTIVES}
    heads = [k for k, row in enumerate(rows) if "chunk_mib" in row]
    timed = [k for k, row in enumerate(rows) if row["what"] in (card.KERNEL, "cluster", "xla")]
    timed = [k for k in timed if k not in heads and "counters" not in rows[k]]
    before, after = ([k for k in timed if (k > heads[0]) == late] for late in (False, True))
    assert {rows[k]["objective"] for k in before} == {"tnff", "tnrr"}
    assert {rows[k]["vocabulary"] for k in before[:9]} == {32128, 128256, 250112}
    assert after[-1] == len(rows) - 1
    assert len(timed) == 5 * 2 * 3 * 3


def test_what_a_tpu_runs(monkeypatch):
    """Every objective beside float64, and what bench.tpu times."""
    for name, value in (("PLATFORM", "tpu"), ("KERNEL", "pallas_tpu")):
        monkeypatch.setattr(card, name, value)
    monkeypatch.setattr(Program, "compiled", lambda _: None)
    monkeypatch.setattr(checks, "ready", lambda _: None)
    rows = [of for of, _ in card.steps(card.options_of([]))]
    every = {*common.OBJECTIVES, *common.ALONE}
    assert {row["objective"] for row in rows if row["what"] == "error"} == every
    whats, keys = ("pallas_tpu", "xla", "dense"), ("objective", "what", "dtype", "vocabulary")
    timed = [row for row in rows if row["what"] in whats]
    heads = [row for row in timed if "width" in row]
    found = {tuple(row[key] for key in keys) for row in timed if row not in heads}
    assert found == {
        (name, what, dtype, size) for name in every for what in whats
        for dtype in ("float32", "bfloat16") for size in tpu.VOCABULARIES
    }  # fmt: skip
    assert {(row["objective"], row["what"]) for row in heads} == {
        (name, what) for name in ("tnff", "tnrf") for what in whats
    }


def test_one_command_is_for_a_card():
    """`make bench-gpu`: this script, and Liger's for a minute at most."""
    lines = (pathlib.Path(__file__).parent.parent / "Makefile").read_text().splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("bench-gpu:"))
    ours, ligers = lines[start + 1 : start + 3]
    assert ours.endswith("$(CARD_PYTHON) -m bench.card")
    assert ligers.endswith("timeout -k 5 60 $(CARD_PYTHON) -m bench.liger")
    assert 60 * card.options_of([]).minutes + card.HANGS + 65 <= 6.1 * 60


# --- What hangs -----------------------------------------------------------------------------------

# In place of a process of checks: a row, and then that of 16 blocks hangs and that of 8 crashes.
STRANGE = """
import json, os, signal, sys, time
programs = json.loads(sys.argv[1])
print('{"right": true}', flush=True)
if programs[0][4] == 16:
    print("runs", flush=True)
    time.sleep(600)
if programs[0][4] == 8:
    os.kill(os.getpid(), signal.SIGSEGV)
print('{"right": true}' * (len(programs) - 1), "the last words", sep="\\n", flush=True)
"""


@pytest.fixture
def strange(monkeypatch):
    monkeypatch.setattr(checks, "COMMAND", (sys.executable, "-c", STRANGE))
    monkeypatch.setattr(checks, "SECONDS", {"compiles": 60, "runs": 3})


def test_what_hangs_is_ended_and_not_run_again(strange):
    programs = {n: [Program("tnrf", "float32", 8, 32128, n)] * 2 for n in (1, 8, 16)}
    apart = Apart(programs)
    assert all(apart.row(n)["right"] for n in programs)
    with pytest.raises(TimeoutError, match="hangs: runs for 3 s"):
        apart.row(16)
    with pytest.raises(RuntimeError, match="not run: rows over 16 blocks hang"):
        apart.row(16)
    with pytest.raises(RuntimeError, match="process of this check has ended"):
        apart.row(8)
    assert apart.row(1)["right"]
    with pytest.raises(RuntimeError, match="has ended: the last words"):
        apart.row(1)
    apart.refuse(1)
    for blocks, fault in ((8, "crash"), (16, "hang")):
        with pytest.raises(RuntimeError, match=f"not run: rows over {blocks} blocks {fault}"):
            apart.refuse(blocks)
    apart.close()


# --- All of it, small -----------------------------------------------------------------------------

WHOLE = ["--clusters", "2", "4", "--tokens", "4", "--vocabularies", "264", "--dtypes", "float32"]
WHOLE += ["--objectives", "tnff", "--repeats", "2", "--chunks-mib", "1"]


@pytest.fixture
def whole(monkeypatch, tmp_path):
    """Runs the script at small shapes and returns what it has stored."""
    monkeypatch.setattr(card, "FEW", 4)
    monkeypatch.setattr(card, "SHARED", ((264, 2),))
    monkeypatch.setattr(card, "DISTINCT", ("tnrf", "tnff"))
    monkeypatch.setattr(card, "COUNTED", card.COUNTED | {"vocabulary": 264})
    shapes = {"beside": {"vocabulary": 264, "width": 8, "reference_width": 16}}
    monkeypatch.setattr(liger, "SHAPES", shapes)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "require_device", lambda *_: None)
    monkeypatch.setenv("PATH", "")  # without ncu

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["card", *WHOLE, *options])
        card.main()
        return json.loads((tmp_path / "gpu-card.json").read_text())["rows"]

    return run


ORDER = [
    *[("tnff", "error", 1)] * 2,  # logits, and a head
    ("tnrf", "error", 2),
    ("tnff", "repeats", None),
    ("tnff", "repeats", "best"),
    (None, "copy", None),
    *(("tnff", what, None) for what in (card.KERNEL, "cluster", "xla")),
    *[("tnff", card.KERNEL, None)] * 2,  # the head
    *(("tnff", what, None) for what in counters.WHATS),
]


def order(rows):
    return [(row.get("objective"), row["what"], row.get("cluster")) for row in rows]


def test_what_cannot_be_measured_is_said_and_stops_nothing(whole, monkeypatch, capsys):
    def nothing(*_, **__):
        raise ModuleNotFoundError("No module named 'this'")

    for module, name in ((checks, "differing"), (Program, "compiled"),
                         (card.gpu, "copy_gb_per_second"), (card.gpu, "run_head")):  # fmt: skip
        monkeypatch.setattr(module, name, nothing)
    monkeypatch.setattr(
        checks, "COMMAND", (sys.executable, "-c", "print(\"No module named 'this'\")")
    )
    rows = whole()
    assert order(rows) == ORDER
    assert all("No module named 'this'" in row["error"] for row in rows[:-2])
    assert all("ncu, NVIDIA's profiler, is not on PATH" in row["error"] for row in rows[-2:])
    assert f"{len(ORDER)} rows" in capsys.readouterr().out


def test_after_what_hangs_the_rest_is_run(whole, strange, monkeypatch):
    """What would hang again, the one block that the head takes here, is not."""
    monkeypatch.setattr(checks, "COMMAND", (sys.executable, "-c", STRANGE.replace("16", "1")))
    monkeypatch.setattr(Program, "compiled", lambda _: None)
    monkeypatch.setattr(card.gpu, "time_of", lambda *_: {"ms": 1.0})
    rows = whole("--objectives", "tnff", "tnrr")
    hung = [row for row in rows if "hangs: runs" in row.get("error", "")]
    assert [(row["what"], row["cluster"]) for row in hung] == [("error", 1)]
    left_out = [row for row in rows if "not run: rows over 1 blocks hang" in row.get("error", "")]
    assert {row["what"] for row in left_out} == {"error", "repeats", card.KERNEL, "cluster"}
    assert all(row["ms"] for row in rows if row["what"] == "xla")


def test_when_the_time_is_over_nothing_begins(whole, monkeypatch, capsys):
    monkeypatch.setattr(Program, "compiled", None)  # what compiles ahead
    monkeypatch.setattr(card.gpu, "guarded", lambda _: {"ms": 1.0})
    with pytest.raises(FileNotFoundError):  # nothing is stored either
        whole("--minutes", "0")
    assert f"0 rows in bench/results/gpu-card.json, {len(ORDER)} missing" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_script(whole, monkeypatch):
    monkeypatch.setattr(checks, "SECONDS", {"compiles": 600, "runs": 600})  # by an interpreter
    rows = whole()
    assert order(rows) == ORDER
    assert [row for row in rows if "error" in row] == rows[-2:]  # the counters'
    assert all(row["right"] for row in rows[:5])
    assert all(row["ms"] > 0 for row in rows[6:-2])


# --- The card's counters --------------------------------------------------------------------------

PRINTED = """==PROF== Connected to process 12 (/usr/bin/python3.12)
==PROF== Profiling "anonymous_mosaic_gpu_kernel" - 0: 0%....50%....100% - 1 pass
==PROF== Disconnected from process 12
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","anonymous_mosaic_gpu_kernel","dram__bytes_read.sum","byte","1,050,673,152"
"0","anonymous_mosaic_gpu_kernel","dram__bytes_write.sum","byte","525,336,576"
"""


def test_counters_are_read():
    assert counters.read(PRINTED) == {"read_bytes": 1050673152.0, "written_bytes": 525336576.0}


@pytest.mark.parametrize(
    "printed",
    ["==ERROR== No kernels were profiled.", PRINTED.replace("dram", "dram2"),
     PRINTED + PRINTED.splitlines()[-1].replace('"0"', '"1"')],
)  # fmt: skip
def test_counters_that_are_not_of_one_kernel(printed):
    with pytest.raises(LookupError, match="no counters"):
        counters.read(printed)


def test_ncu_gets_the_program(monkeypatch):
    """Passes are what it counts over the bytes of the logits."""
    ran = []

    def run(command, **_):
        ran.append(command)
        return types.SimpleNamespace(returncode=0, stdout=PRINTED, stderr="")

    monkeypatch.setattr(counters.shutil, "which", lambda _: "/there/ncu")
    monkeypatch.setattr(counters.subprocess, "run", run)
    row = counters.of_kernel("cluster", **card.COUNTED)
    assert row["passes"] == pytest.approx(1.5 * 1050673152 / (2048 * 128256 * 2))
    (command,) = ran
    assert command[0] == "/there/ncu"
    assert command[-5:] == ["cluster", "tnff", "bfloat16", "2048", "128256"]


# --- Liger's rows ---------------------------------------------------------------------------------


def test_rows_say_that_liger_is_not_there(monkeypatch, tmp_path):
    for name in ("torch", "liger_kernel"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    liger.main()
    found = json.loads((tmp_path / "gpu-liger.json").read_text())
    assert "torch" in found["about"]["error"]
    assert len(found["rows"]) == 4
    assert all("torch" in row["error"] for row in found["rows"])
