"""The benchmark of decoder-only models, at a size that says nothing of speed."""

import jax
import pytest

from bench import decoder, readme
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
