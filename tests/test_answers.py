"""What `python -m bench.answers` corrects, trains and counts."""

import doctest
import io
import json
import pathlib
import re

import editing_samples
import jax
import pytest
from rich.console import Console
from test_cli import TINY

from bench import answers
from t5patches.editing import demo
from t5patches.editing.annotate import find_spans, pattern
from t5patches.editing.data import corrected_examples, read_examples
from t5patches.editing.demo import DemoConfig, Repetition
from t5patches.editing.demo_task import places_not_in_source
from t5patches.editing.train import training_progress

pytestmark = pytest.mark.usefixtures("shared_programs")


def example(text, *words):
    return editing_samples.example("news", text, *words)


def test_corrections():
    assert doctest.testmod(answers).failed == 0
    rule = places_not_in_source()
    said = "Fire shuts depot in Port Wray, 3 moved in Brea"
    spans = find_spans(rule, "no place", said)
    assert answers.answers(said, spans) == (
        "Fire shuts depot, where is not known, 3 moved, where is not known"
    )
    assert answers.stops(said, spans) == "Fire shuts depot."
    assert answers.stops("Brea", [(0, 4)]) == "."  # no empty text, which no file may hold


def test_the_line_that_is_shown_is_one(tmp_path):
    text = (pathlib.Path(__file__).parent.parent / "bench" / "README.md").read_text()
    (shown,) = re.findall(r"```json\n(.*?corrected_targets.*?)```", text, re.DOTALL)
    (tmp_path / "answers.jsonl").write_text(shown.replace("\n", ""))
    (line,) = read_examples(tmp_path / "answers.jsonl", editing_samples.tokenizer())
    assert [line.outputs[start:end] for start, end in line.spans] == ["Quarley"]
    assert line.corrected == answers.answers(line.outputs, line.spans)


def test_shares_are_of_where_it_was_due():
    before = [
        example("a in Brea, b", "Brea"),
        example("c in Brea, d", "Brea"),
        example("e in the area, f"),
        example("g in Brea, h"),
    ]
    after = [f"a{answers.ANSWER}, b", "c.", f"e{answers.ANSWER}, f", "g."]
    found = answers.said([*map(example, after)], before)
    assert found == {"answered": 50, "stopped": 50, "vague": 100, "stated": 0}
    assert set(answers.said(before, before).values()) == {0}


@pytest.mark.slow
def test_all_of_it_on_a_tiny_model(tmp_path, monkeypatch):
    for module in (answers, demo):
        monkeypatch.setattr(
            module, "places_not_in_source", lambda: pattern(r"\w*e\w*"), raising=False
        )
    config = DemoConfig(**TINY | {"edits": answers.CONFIG.edits})
    with (
        jax.numpy_dtype_promotion("standard"),
        training_progress(Console(file=io.StringIO())) as progress,
    ):
        repetition = Repetition(tmp_path, progress, 0, config)
        rows = answers.measured(repetition, answers.WAYS, 1e-3)
    assert [row["name"] for row in rows] == ["before", *(way.name for way in answers.WAYS)]
    assert all(answers.cells(row)["unwanted, %"] for row in rows)
    json.dumps(rows, allow_nan=False)
    # What was trained on are files that `t5patches edit` takes.
    tokenizer = repetition.original.tokenizer
    found = read_examples(tmp_path / "ce-answers-0.jsonl", tokenizer)
    marked = [e for e in found if e.spans]
    assert marked
    for one in corrected_examples(marked, tokenizer):
        assert answers.ANSWER in one.outputs
