"""What `make bench-rewards` scores, marks and asks, and how a killed one goes on."""

import numpy as np
import pytest

from bench import common, real, rewards
from bench.real import MARKING, MEASURING


def test_scores_and_marks(monkeypatch):
    assert rewards.about_nothing(["This ARTICLE says", "Rain fell.", ""]) == [0, 1, 1]
    monkeypatch.setattr(rewards, "toxicity", lambda words: [0.9 * (w == "Pest") for w in words])
    rewards._insult.cache_clear()
    assert rewards.insults("you Pest", "You Pest, pestering Pest") == [(4, 8), (20, 24)]
    rewards._insult.cache_clear()


def test_what_is_measured_is_not_learnt_from(tmp_path):
    words = np.random.default_rng(0).integers(0, 9999, (MARKING + MEASURING, 40))
    folder = tmp_path / "package" / "bbcnews" / "data" / "sport"
    folder.mkdir(parents=True)
    for number, row in enumerate(words):
        (folder / f"{number}.txt").write_text(f"Headline\n\n{' '.join(map(str, row))}.")
    for task in rewards.tasks(tmp_path).values():
        used = task.inputs[: MARKING + MEASURING]
        assert len(set(used)) == len(used) == MARKING + MEASURING


def test_a_command_that_was_not_recorded_is_run_from_the_start(tmp_path, monkeypatch):
    ran = []

    def command(*words):
        ran.append([p.name for p in tmp_path.iterdir()])
        if len(ran) == 1:
            (tmp_path / "model.unfinished").mkdir()
            (tmp_path / "model").mkdir()
            raise SystemExit("killed")
        return {"output": words[-1]}, 1.0, 0.5

    monkeypatch.setattr(common, "t5patches", command)
    words = ("edit", "--output", str(tmp_path / "model"))
    with pytest.raises(SystemExit, match="killed"):
        real.t5patches(tmp_path, *words)
    made = real.t5patches(tmp_path, *words)
    assert ran == [[], []]
    (tmp_path / "model").mkdir()
    assert real.t5patches(tmp_path, *words) == made
    assert len(ran) == 2
    assert (tmp_path / "model").exists()
