"""Kills at random moments: what a command makes is whole or not there, and going on makes the same.

Each round takes a command, ends it with SIGKILL or SIGTERM up to three times, as it is about to
change a file or at any moment, repeats it as its message says, and compares what there is with what
an undisturbed run has made. Now and then another run is tried on what the killed one has left: it
is refused, or makes what is its own.

    python tests/kills.py --seed 7 --minutes 1 --commands edit
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]
VALID = HERE / "data" / "fuzz" / "valid"


class Command(NamedTuple):
    """A command, in a folder that holds what it needs.

    Attributes:
        given: its arguments.
        output: what it makes.
        again: what to add when it is repeated.
        other: what makes another run of it.
    """

    given: str
    output: str
    again: str = ""
    other: str = ""


_SPEAK = "--inputs inputs.txt --rules letters.toml --max-length 5 --batch-size 2"
_ALIGN = (
    "align --model model --inputs inputs.txt --scorer kills:letters --steps 2 --inputs-per-step 2 "
    "--samples 4 --update-size 4 --max-length 4 --lora 2 --most-kl 50 --learning-rate 0.05 "
    "--checkpoint-every 1 --implementation reference"
)
COMMANDS = {
    "annotate": Command(
        f"annotate --model model {_SPEAK} --expand 2 --output made.jsonl",
        "made.jsonl",
        other="--temperature 1",
    ),
    "edit": Command(
        "edit --model model --data edits.jsonl --output edited --steps 3 --batch-size 2 "
        "--checkpoint-every 1 --devices 1",
        "edited",
        again="--resume",
        other="--resume --seed 1",
    ),
    "evaluate": Command(
        f"evaluate --before model --after after {_SPEAK} --report report.html",
        "report.html",
        other="--seed 1",
    ),
    "align": Command(
        f"{_ALIGN} --output aligned",
        "aligned",
        again="--resume",
        other="--resume --temperature 2",
    ),
    "align by value": Command(
        f"{_ALIGN} --advantages value --output aligned",
        "aligned",
        again="--resume",
        other="--resume --gamma 0.5",
    ),
    "reward": Command(
        "reward --model model --preferences preferences.jsonl --batch-size 2 --epochs 2 --lora 2 "
        "--held-out 0.2 --checkpoint-every 1 --output reward",
        "reward",
        again="--resume",
        other="--resume --seed 1",
    ),
    "convert": Command("convert --model model --output t5x", "t5x/checkpoint_0"),
    "convert back": Command("convert --model before.t5x --like model --output back", "back"),
}


def letters(outputs: Sequence[str]) -> list[float]:
    """Scores for `align`: how many different letters an output has."""
    return [float(len(set(text))) for text in outputs]


_CHANGES = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        code: its exit code; below 0 the signal.
        said: on both outputs.
        changes: of files, that it was about to make.
        seconds: it took.
    """

    code: int
    said: str
    changes: int
    seconds: float


class Kill(NamedTuple):
    """When to end a command, and by which signal: before a change of files, or after a time."""

    number: signal.Signals
    change: int | None = None
    seconds: float | None = None


def run(place: Path, work: Callable[[], int], kill: Kill | None = None) -> Ended:
    """Runs something in a process of its own."""
    began, said, counted = time.monotonic(), place.parent / "said", place.parent / "changes"
    counted.write_text("0")
    child = os.fork()  # all is imported, and nothing has begun that a fork would break
    if child == 0:
        code = 70
        try:
            os.chdir(place)
            file = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(file, 1)
            os.dup2(file, 2)
            _watch(place, counted, kill)
            code = work()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if kill is not None and kill.seconds is not None:
        time.sleep(kill.seconds)
        os.kill(child, kill.number)
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - began
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, said.read_text(errors="replace"), int(counted.read_text() or 0), seconds)


def _watch(place: Path, counted: Path, kill: Kill | None) -> None:
    """Counts what is about to change in a folder; before one of the changes the process ends."""
    seen, file = itertools.count(1), os.open(counted, os.O_WRONLY)

    def before(event: str, arguments: tuple) -> None:
        if event not in _CHANGES or not _is_in(place, arguments[0]):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        number = next(seen)
        os.pwrite(file, str(number).encode(), 0)
        if kill is not None and kill.change == number:
            os.kill(os.getpid(), kill.number)

    sys.addaudithook(before)


def _is_in(place: Path, path: Any) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    path = os.fsdecode(path)
    return not path.startswith("/") or path.startswith(str(place))


def command(arguments: str) -> Callable[[], int]:
    """A `t5patches` command."""
    from t5patches import cli

    return lambda: cli.main([*arguments.split(), "--quiet"])


def contents(place: Path, output: str = "") -> dict[str, bytes]:
    """All files, or those of an output, without what differs between any two runs."""
    top = place / output
    files = [top] if top.is_file() else sorted(top.rglob("*"))
    found = {str(f.relative_to(place)): f.read_bytes() for f in files if f.is_file()}
    for name in found:
        if name.endswith(("t5patches.json", "align.json", "reward.json")):
            record = json.loads(found[name])
            for round_ in record.get("rounds", [record]):
                round_["seconds"] = 0
            found[name] = json.dumps(record).encode()
    # Orbax's names and times are new ones each time; what it holds is asked of itself.
    checkpoint = re.compile(r"^[\w.]+/checkpoint_\d+/")
    for name in [name for name in found if checkpoint.match(name)]:
        found[checkpoint.match(name)[0]] = b""
        del found[name]
    return found


class Loop:
    """The rounds.

    Attributes:
        found: what is to be mended, in words.
    """

    def __init__(self, names: Sequence[str], seed: int, tell: Callable[[str], None]):
        """Makes the place that each round has a copy of, and what undisturbed runs make.

        Args:
            names: of the commands.
            seed: of the kills.
            tell: is told what is found.
        """
        self.names, self._seed, self._tell, self.found = names, seed, tell, list[str]()
        self._directory = tempfile.TemporaryDirectory(prefix="t5patches-kills-")
        self._top = Path(self._directory.name)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(self._top / "programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        _import_all()
        self._start = self._top / "start"
        self._start.mkdir()
        shutil.copytree(VALID, self._start / "model")
        for name in ("inputs.txt", "edits.jsonl", "preferences.jsonl"):
            shutil.copy(VALID / name, self._start)
        (self._start / "letters.toml").write_text("[[rule]]\npattern = '\\w'\n")
        edit = COMMANDS["edit"].given.replace("--output edited", "--output after --seed 2")
        convert = COMMANDS["convert"].given.replace("t5x", "before.t5x")
        for name, first in (("evaluate", edit), ("convert back", convert)):
            if name in names:
                self._must(run(self._start, command(first)), first)
        self._whole, self._sizes, self._others = {}, {}, {}
        for name in names:
            given = COMMANDS[name].given
            place = self._copy(self._start)
            ended = run(place, command(given))
            self._must(ended, given)
            self._whole[name], self._sizes[name] = contents(place), ended
            if COMMANDS[name].other:
                place = self._copy(self._start)
                self._must(run(place, command(f"{given} {COMMANDS[name].other}")), given)
                self._others[name] = contents(place, COMMANDS[name].output)

    def round(self, number: int, kills: int | None = None) -> None:
        """Kills a command and goes on.

        Args:
            number: of the round.
            kills: how many; default, one to three.
        """
        rng = random.Random(f"{self._seed} {number}")
        name = self.names[number % len(self.names)]
        given, output, again, other = COMMANDS[name]
        place, arguments = self._copy(self._start), given
        story = [f"round {number}, {name}"]

        def wrong(what: str, ended: Ended) -> None:
            self.found.append(f"{'; '.join(story)}: {what}\n{ended.said[-1500:]}")
            self._tell(self.found[-1])

        killed = set()
        for _ in range(kills or rng.randint(1, 3)):
            kill = self._moment(name, rng)
            ended = run(place, command(arguments), kill)
            story.append(f"{kill.number.name} at {kill.change or f'{kill.seconds:.2f} s'}")
            killed.add(kill.number)
            arguments = f"{given} {again}"
            if "Traceback" in ended.said:
                wrong("a traceback", ended)
            there = contents(place, output)
            whole = {k: v for k, v in self._whole[name].items() if _of(output, k)}
            if there and there != whole:
                wrong(f"{output} is there and not whole: {_difference(there, whole)}", ended)
                return
            if ended.code not in (0, 2, -kill.number, 128 + kill.number):
                wrong(f"the exit code is {ended.code}", ended)
            if rng.random() < 0.3 and other and not there:
                copy = self._copy(place)
                ended = run(copy, command(f"{given} {other}"))
                made = contents(copy, output)
                if not (ended.code == 2 or (ended.code == 0 and made == self._others[name])):
                    wrong(f"another run, of {other}, takes what is there for its own", ended)
            if there:
                break
        there = contents(place, output)
        ended = run(place, command(arguments))
        if ended.code != 0 and not (there and ended.code == 2 and "exists" in ended.said):
            wrong(f"repeated, its exit code is {ended.code}", ended)
            return
        left = contents(place)
        if signal.SIGKILL in killed:  # which leaves nobody to clean up
            left = {k: v for k, v in left.items() if not any(p[:1] == "." for p in k.split("/"))}
        if left != self._whole[name]:
            wrong(f"in the end it differs: {_difference(left, self._whole[name])}", ended)
        if name == "convert" and not self._holds_the_model(place / output):
            wrong("the checkpoint holds another model", ended)

    def close(self) -> None:
        """Removes all places."""
        self._directory.cleanup()

    def _moment(self, name: str, rng: random.Random) -> Kill:
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        usual = self._sizes[name]
        if rng.random() < 0.7:
            return Kill(number, change=rng.randint(1, usual.changes))
        return Kill(number, seconds=rng.random() * usual.seconds)

    def _holds_the_model(self, checkpoint: Path) -> bool:
        def compared() -> int:
            from t5patches.model.huggingface import load_checkpoint
            from t5patches.model.t5x_format import load_t5x
            from t5patches.runs.fingerprints import fingerprint

            params = load_checkpoint(self._start / "model")[1]
            return int(fingerprint(load_t5x(checkpoint).params) != fingerprint(params))

        return run(self._start, compared).code == 0

    def _copy(self, place: Path) -> Path:
        copy = Path(tempfile.mkdtemp(dir=self._top)) / "place"
        return Path(shutil.copytree(place, copy))

    def _must(self, ended: Ended, what: str) -> None:
        if ended.code:
            raise RuntimeError(f"undisturbed, {what!r} ends with {ended.code}:\n{ended.said}")


def _of(output: str, name: str) -> bool:
    return name == output or name.startswith(f"{output}/")


def _difference(there: dict[str, bytes], whole: dict[str, bytes]) -> str:
    parts = {
        "too much": sorted(there.keys() - whole.keys()),
        "missing": sorted(whole.keys() - there.keys()),
        "other content": sorted(k for k in there.keys() & whole.keys() if there[k] != whole[k]),
    }
    return "; ".join(f"{name} {names[:5]}" for name, names in parts.items() if names)


def _import_all() -> None:
    """All that the commands import, once for all of them."""
    import t5patches.cli
    import t5patches.editing.align
    import t5patches.editing.collect
    import t5patches.editing.edit
    import t5patches.editing.report
    import t5patches.editing.reward_folder
    import t5patches.editing.rounds
    import t5patches.model.t5x_format  # noqa: F401


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the loop."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--first", type=int, default=0, help="the first round's number")
    parser.add_argument("--rounds", type=int, help="how many (default: until the time is over)")
    options = parser.parse_args(arguments)
    until = time.monotonic() + 60 * options.minutes
    print(f"kills: seed {options.seed}", flush=True)
    loop = Loop(options.commands, options.seed, lambda text: print(f"kills: {text}", flush=True))
    number = options.first
    try:
        while number - options.first != options.rounds:
            done = number - options.first >= len(options.commands)  # each has had its turn
            if options.rounds is None and done and time.monotonic() > until:
                break
            loop.round(number)
            number += 1
    finally:
        loop.close()
    print(f"kills: {number - options.first} rounds, {len(loop.found)} findings", flush=True)
    return 1 if loop.found else 0


if __name__ == "__main__":
    sys.exit(main())
