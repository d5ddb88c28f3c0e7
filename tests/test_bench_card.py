"""The script for a borrowed card, as far as a CPU can take it."""

import json
import sys
import types

import pytest

from bench import card, common, counters, liger

pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="needs absl-py")


def test_a_kernel_that_is_wrong_is_told(monkeypatch):
    assert card.error("tnff", "float32", 8, 264)["right"]
    honest = common.total

    def total(what, *rest):
        return honest(what, *rest) * (1.001 if what == card.KERNEL else 1.0)

    monkeypatch.setattr(common, "total", total)
    assert not card.error("tnff", "float32", 8, 264)["right"]


# --- All of it, small -----------------------------------------------------------------------------

WHOLE = ["--clusters", "2", "4", "--tokens", "4", "--vocabularies", "264", "--dtypes", "float32"]
WHOLE += ["--objectives", "tnff", "--repeats", "2", "--chunks-mib", "1"]


@pytest.fixture
def whole(monkeypatch, tmp_path):
    """Runs the script at small shapes and returns what it has stored."""
    monkeypatch.setattr(card, "SMALL", ((4, 264),))
    monkeypatch.setattr(card, "SHARED", ((4, 264, 2),))
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
    ("tnrf", "error", 2),
    ("tnff", "error", None),
    ("tnff", "repeats", None),
    ("tnff", "repeats", "best"),
    (None, "copy", None),
    *(("tnff", what, None) for what in (card.KERNEL, "xla", "cluster")),
    *[("tnff", card.KERNEL, None)] * 2,  # the head
    *(("tnff", what, None) for what in counters.WHATS),
]


def order(rows):
    return [(row.get("objective"), row["what"], row.get("cluster")) for row in rows]


def test_what_cannot_be_measured_is_said_and_stops_nothing(whole, monkeypatch, capsys):
    def nothing(*_, **__):
        raise ModuleNotFoundError("No module named 'this'")

    for module, name in ((card, "error"), (card, "differing"), (card, "loss_and_gradient"),
                         (card.gpu, "copy_gb_per_second"), (card.gpu, "run_head")):  # fmt: skip
        monkeypatch.setattr(module, name, nothing)
    rows = whole()
    assert order(rows) == ORDER
    assert all("No module named 'this'" in row["error"] for row in rows[:-2])
    assert all("ncu, NVIDIA's profiler, is not on PATH" in row["error"] for row in rows[-2:])
    assert f"{len(ORDER)} rows" in capsys.readouterr().out


def test_when_the_time_is_over_nothing_begins(whole, monkeypatch, capsys):
    monkeypatch.setattr(card, "loss_and_gradient", None)  # what compiles ahead
    monkeypatch.setattr(card.gpu, "guarded", lambda _: {"ms": 1.0})
    with pytest.raises(FileNotFoundError):  # nothing is stored either
        whole("--minutes", "0")
    assert f"0 rows in gpu-card.json, {len(ORDER)} missing" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_script(whole):
    rows = whole()
    assert order(rows) == ORDER
    assert [row for row in rows if "error" in row] == rows[-2:]  # the counters'
    assert all(row["right"] for row in rows[:4])
    assert all(row["ms"] > 0 for row in rows[5:-2])


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
