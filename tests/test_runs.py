"""Which run a directory holds, the parts of it that are finished, folders that appear whole."""

import contextlib
import os
import subprocess
import sys

import pytest

from t5patches.runs import claims
from t5patches.runs.claims import Parts, claim, is_of, remove
from t5patches.runs.files import whole_folder


def test_a_directory_belongs_to_one_run(tmp_path):
    run = {"seed": 0, "settings": {"alpha": 1.0, "steps": 3}}
    claim(tmp_path / "run", run)
    claim(tmp_path / "run", run)
    other = {"seed": 1, "settings": {"alpha": 2.0, "steps": 3}}
    message = r"seed \(0 there, 1 asked for\); alpha \(1.0 there, 2.0 asked for\): choose another"
    with pytest.raises(ValueError, match=message):
        claim(tmp_path / "run", other)
    fewer = {"seed": 0, "settings": {"steps": 3}}
    with pytest.raises(ValueError, match=r"differs in alpha \(1.0 there, None asked for\): choose"):
        claim(tmp_path / "run", fewer)
    claim(tmp_path / "run", run | {"new": None})  # as a later version may say of what there is not
    for _ in range(2):
        claim(tmp_path / "other", {"clip": (0.2, 0.3)})  # which JSON gives back as a list
    assert is_of(tmp_path / "other", {"clip": (0.2, 0.3)})


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


def parts_of_another_model(directory):
    """A directory with two parts of model 1."""
    parts = Parts(directory, {"model": 1})
    for name in ("a", "b"):
        parts.get(name, lambda: 1)
    return parts


@pytest.mark.parametrize("kills_at", range(1, 6))  # two parts, the time, the claim, the directory
def test_a_kill_while_parts_are_removed_gives_them_to_nobody_else(tmp_path, monkeypatch, kills_at):
    parts = parts_of_another_model(tmp_path / "run")
    removals = []

    def killed(*arguments, real, **options):
        removals.append(arguments)
        if len(removals) >= kills_at:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        for name in ("unlink", "rmdir"):
            real = getattr(os, name)
            patched.setattr(os, name, lambda *a, real=real, **k: killed(*a, real=real, **k))
        with pytest.raises(KeyboardInterrupt):
            parts.remove()
    try:
        other = Parts(tmp_path / "run", {"model": 2})
    except ValueError as error:
        assert "holds another run" in str(error)  # noqa: PT017
        assert kills_at < 5  # the claim has gone
    else:
        assert [other.get(name, lambda: 2) for name in ("a", "b")] == [2, 2]


def test_what_is_of_no_run_is_not_taken_for_one(tmp_path):
    parts_of_another_model(tmp_path)
    (tmp_path / "run.json").unlink()
    for number in range(2):
        with pytest.raises(
            ValueError, match=r"holds 'a[.]json' and 1 more, which are of no run: move"
        ):
            Parts(tmp_path, {"model": number})
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json", "began"}


def test_a_claim_that_was_killed_is_made_again(tmp_path):
    (tmp_path / "run.json.unfinished").write_text("{")
    assert Parts(tmp_path, {"model": 2}).get("a", lambda: 2) == 2
    (tmp_path / "a.json").write_text("[1]")  # of a version that did not say whose they are
    assert Parts(tmp_path, {"model": 2}).get("a", lambda: 3) == 3


def test_one_process_works_in_a_directory(tmp_path):
    (tmp_path / "run").mkdir()
    other = (
        "import fcntl, os, sys; handle = os.open(sys.argv[1], os.O_RDONLY);"
        "fcntl.flock(handle, fcntl.LOCK_EX); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", other, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match=r"another process is at work in .*run: wait"):
            Parts(tmp_path / "run", {})
        process.communicate(b"\n")
    Parts(tmp_path / "run", {})
    Parts(tmp_path / "run", {}).remove()  # by the same process, after an interruption
    assert not claims._HELD.keys() & {tmp_path / "run"}


def test_links_are_removed_and_what_they_lead_to_stays(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (tmp_path / "run" / "link").symlink_to(tmp_path / "mine")
    remove(tmp_path / "run")
    assert (tmp_path / "mine" / "file").exists()


def test_folders_appear_whole_with_the_users_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "out") as partial:
            (partial / "deep").mkdir()
            (partial / "deep" / "file").touch()
            assert not (tmp_path / "out").exists()
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="exists: nothing is overwritten"):
        whole_folder(tmp_path / "out").__enter__()


def test_a_folder_that_another_process_has_made_meanwhile_is_kept(tmp_path):
    def make(name):
        with whole_folder(tmp_path / "out") as partial:
            (partial / name).touch()
            if name == "first":
                make("second")

    with pytest.raises(ValueError, match=r"out exists now: another process has made it"):
        make("first")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "second"]


def test_what_a_kill_left_is_removed_by_the_next_attempt_and_what_is_being_made_is_not(tmp_path):
    killed = f"""
import os
from t5patches.runs.files import whole_folder
with whole_folder({os.fspath(tmp_path / "out")!r}) as partial:
    (partial / "file").touch()
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    (tmp_path / ".out.mine").mkdir()
    with whole_folder(tmp_path / "out") as first:
        assert not left.exists()
        with contextlib.suppress(KeyboardInterrupt), whole_folder(tmp_path / "out"):
            raise KeyboardInterrupt
        assert first.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.mine"}


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_folders_that_are_not_finished_leave_nothing(tmp_path, error):
    def fill():
        with whole_folder(tmp_path / "out") as partial:
            (partial / "file").touch()
            raise error

    with pytest.raises(type(error)):
        fill()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_of_a_folder_are_read_by_whom_the_umask_lets(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "model") as partial:
            (partial / "model.safetensors").touch(mode=0o600)
            (partial / "config.json").write_text("{}")
    finally:
        os.umask(before)
    assert [x.stat().st_mode & 0o777 for x in (tmp_path / "model").iterdir()] == [mode] * 2
