"""Which run a directory holds, and the parts of it that are finished."""

import pytest

from t5patches.runs.claims import Parts, claim


def test_a_directory_belongs_to_one_run(tmp_path):
    run = {"seed": 0, "settings": {"alpha": 1.0, "steps": 3}}
    claim(tmp_path / "run", run)
    claim(tmp_path / "run", run)
    other = {"seed": 1, "settings": {"alpha": 2.0, "steps": 3}}
    message = r"seed \(0 there, 1 asked for\); alpha \(1.0 there, 2.0 asked for\): choose another"
    with pytest.raises(ValueError, match=message):
        claim(tmp_path / "run", other)


def test_finished_parts_are_not_made_again(tmp_path):
    made = []

    def make(part):
        made.append(part)
        if part == "killed":
            raise KeyboardInterrupt
        return [part, 1]

    parts = Parts(tmp_path / "run", {})
    assert parts.get("a", lambda: make("a")) == ["a", 1]
    with pytest.raises(KeyboardInterrupt):
        parts.get("b", lambda: make("killed"))
    again = Parts(tmp_path / "run", {})
    assert again.get("a", lambda: make("a")) == ["a", 1]
    assert again.get("b", lambda: make("b")) == ["b", 1]
    assert made == ["a", "killed", "b"]
    with pytest.raises(ValueError, match="holds another run"):
        Parts(tmp_path / "run", {"seed": 1})
    again.remove()
    assert not (tmp_path / "run").exists()
