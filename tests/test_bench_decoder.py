"""The benchmarks of decoder-only models, at a size that says nothing of speed."""

import json
import sys
import time

import jax
import pytest
from harness import slow_unless

from bench import common, decoder, decoder_card, readme
from t5patches.model.decoder.model import small_decoder
from t5patches.model.huggingface import save_checkpoint

pytestmark = pytest.mark.usefixtures("shared_programs")

MODEL = small_decoder(vocab_size=40, width=16, layers=1)


@pytest.fixture
def small(monkeypatch):
    """A few short examples of few ids, and a small adapter."""
    monkeypatch.setitem(decoder.SHAPES, "SmolLM2-135M", {"vocab_size": MODEL.config.vocab_size})
    for name, size in {"ROWS": 2, "PROMPT": 8, "OUTPUT": 4, "RANK": 2}.items():
        monkeypatch.setattr(decoder, name, size)


def test_an_update_is_timed_whole_and_in_parts(small, tmp_path):
    """A cached original gives the loss of a live one; before an update so does an adapter."""
    params = jax.jit(MODEL.init)(jax.random.key(0))
    save_checkpoint(tmp_path / "model", MODEL, params)
    with jax.numpy_dtype_promotion("standard"):
        live, cached = (
            decoder.measure("update", "ours", str(tmp_path / "model"), variant, rounds=1)
            for variant in (["all", "held", "live"], ["LoRA", "run again", "cached"])
        )
    assert cached["first"] == pytest.approx(live["first"], rel=1e-5)
    assert [set(round_) for round_ in live["parts"]] == [set(decoder.PARTS)]
    assert all(seconds > 0 for seconds in live["parts"][0].values())
    assert len(live["seconds"]) == 1
    assert cached["parts"] == []
    assert cached["held"] < live["held"]


def test_where_the_seconds_go_is_a_table():
    row = {"library": "ours", "variant": ["LoRA", "held", "live"]}
    parts = dict.fromkeys((*decoder.PARTS, "sum", "update"), 1.5)
    setting = {"device": "a CPU", "jax": "1", "python": "3", "date": "today", "commit": "x"}
    update = {"what": "update", **row, "seconds": 2.0, "working GiB": 0.5}
    torch = update | {"library": "torch", "seconds": 3.0}
    result = {"rank": 16, "batch": 8, "prompt": 128, "output": 32, "load": [0, 0]}
    result |= {"setting": setting, "rows": [update, torch, {"what": "parts", **row, **parts}]}
    shown = readme.decoder(result)
    assert "| an adapter of rank 16, layers held, original live | 2.0 | 0.50 | 3.0 |" in shown
    assert "| ours: adapter, layers held, original live | 1.50 | 1.50 |" in shown


# --- On a card, as far as a CPU can take it -------------------------------------------------------

TINY = decoder_card.SHAPES["Gemma 3 1B"] | {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 1,
    "layer_types": ["sliding_attention"],
}


@pytest.mark.parametrize(
    ("library", "trained"), [("ours", ["LoRA"]), slow_unless(False, "dense", ["LoRA", "all"])]
)
def test_updates_of_a_card(library, trained, small, monkeypatch):
    monkeypatch.setitem(decoder_card.SHAPES, "tiny", TINY)
    monkeypatch.setattr(decoder_card, "TRAINED", trained)
    with jax.numpy_dtype_promotion("standard"):
        rows = list(decoder_card.rows_of("tiny", library, (1, 4)))
    updates = {(row["trained"], row["batch"]) for row in rows}
    assert updates == {(what, size) for what in trained for size in (1, 4)}
    assert [row["GiB"] for row in rows] == sorted(row["GiB"] for row in rows)
    for row in rows:
        assert row["tokens a second"] == pytest.approx(1e3 * row["batch"] * 12 / row["ms"])


def row_of(trained, batch, **more):
    return {"trained": trained, "batch": batch, **more}


def test_the_largest_batch_lies_on_a_line(monkeypatch):
    def found(shape, batches):
        yield row_of("LoRA", 8, ms=1.0, GiB=10.0, **{"limit GiB": 100.0})
        yield row_of("LoRA", 16, ms=1.0, GiB=20.0, **{"limit GiB": 100.0})
        yield row_of("all", 8, ms=1.0, GiB=50.0, **{"limit GiB": 100.0})
        yield row_of("all", 64, error="JaxRuntimeError: RESOURCE_EXHAUSTED")

    monkeypatch.setitem(decoder_card.LIBRARIES, "ours", found)
    rows = list(decoder_card.rows_of("Gemma 3 1B", "ours", (8, 16)))
    assert [row.get("largest batch") for row in rows] == [None, 80, None, None]
    assert rows[-1]["error"].endswith("EXHAUSTED")


@pytest.fixture
def on_a_card(monkeypatch, tmp_path):
    """Runs the script with programs in the place of its processes, and returns what is stored."""

    def run(programs, *options):
        def command(shape, library, batches):
            return [sys.executable, "-c", programs[library]]

        monkeypatch.setattr(decoder_card, "command", command)
        given = ["--shapes", "Gemma 3 1B", "--libraries", *programs, *options]
        monkeypatch.setattr(sys, "argv", ["decoder_card", *given])
        decoder_card.main()
        return json.loads((tmp_path / "decoder-card.json").read_text())["rows"]

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "require_device", lambda *_: None)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")  # which it changes
    return run


def printed(**more):
    of = {"shape": "Gemma 3 1B", "library": "ours", "trained": "LoRA", "batch": 8}
    return f"print('noise'); print({json.dumps(of | more)!r}, flush=True)"


def test_rows_are_stored_one_by_one_beside_those_before(on_a_card):
    rows = on_a_card({"ours": printed(ms=1.0), "torch": "import nowhere"})
    assert [row.get("ms") for row in rows] == [1.0, None]
    assert rows[1]["error"] == "its process ended with 1"
    assert [row["ms"] for row in on_a_card({"ours": printed(ms=2.0)}) if "ms" in row] == [2.0]


def test_when_its_time_is_over_it_ends(on_a_card, capsys):
    began = time.monotonic()
    slow = f"{printed(ms=1.0)}; import time; time.sleep(100)"
    rows = on_a_card({"ours": slow, "dense": printed(ms=3.0)}, "--minutes", "0.05")
    assert time.monotonic() - began < 60
    assert rows[0]["ms"] == 1.0
    assert rows[1]["error"] == "out of time"
    assert len(rows) == 2
    assert "of 2 processes 1 did not begin" in capsys.readouterr().out


def test_a_process_prints_its_rows(monkeypatch, capsys):
    rows = [row_of("LoRA", 8, error="none")]
    monkeypatch.setitem(decoder_card.LIBRARIES, "ours", lambda shape, batches: rows)
    command = decoder_card.command("Gemma 3 1B", "ours", (8,))
    monkeypatch.setattr(sys, "argv", command[2:])
    decoder_card.main()
    assert json.loads(capsys.readouterr().out)["error"] == "none"
