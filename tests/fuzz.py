"""Spoilt files: whatever one holds, reading it gives a result or an error of ours.

`TARGETS` is the table of what is spoilt: a file, in a folder of valid ones
(`tests/data/fuzz/valid`), and what reads it. Mutations of the valid file and of the corpus
(`tests/data/fuzz/TARGET`) are given to a process of their own, one after the other. Those that
reach lines of ours that none has reached are mutated in turn. A finding is

* an exception that the command line does not tell in words, or an error that names no file;
* more than `SECONDS`, or memory beyond `MEMORY`;
* the end of the process: a library in C has given up.

Its input is made small and written to the corpus, all of which `make test` reads again
(`tests/test_fuzz.py`): mend what it found, and commit both.

    make fuzz                                               ten minutes, the kills of kills.py too
    python tests/fuzz.py --seed 7 --minutes 1 --targets rules words
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import multiprocessing
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CORPUS = Path(__file__).parent / "data" / "fuzz"
VALID = CORPUS / "valid"
SECONDS = 20.0  # patterns of rules have 5 of them
MEMORY = 2 << 30  # beyond what the process has when all is imported
LONGEST_MESSAGE = 20_000  # characters: 20 problems in a few lines each
LONGEST_INPUT = 1 << 18


class Target(NamedTuple):
    """A file that may hold anything.

    Attributes:
        file: its path among the valid ones.
        read: reads it as a command does; given the folder, which holds all valid files beside it.
        without: names of valid files that would hide it.
    """

    file: str
    read: Callable[[Path], Any]
    without: Sequence[str] = ()


# What the targets read with. Imported late: the process that mutates needs none of it.


@functools.cache
def tokenizer() -> Any:
    from t5patches.model.tokenizer_files import load_tokenizer

    return load_tokenizer(VALID)


def data(folder: Path) -> None:
    from t5patches.editing.data import Limits, read_examples, to_arrays, within, write_examples

    examples = read_examples(folder / "edits.jsonl", tokenizer())
    to_arrays(within(examples, Limits(10, 10**6), tokenizer()).kept[:50], pad_id=0, negatives=3)
    write_examples(folder / "again.jsonl", examples)
    if read_examples(folder / "again.jsonl", tokenizer()) != examples:
        raise AssertionError("what was read is not what is written and read again")


def inputs(folder: Path, name: str) -> None:
    from t5patches.editing.data import Limits, read_inputs, within

    within(read_inputs(folder / name), Limits(5, 10**6), tokenizer())


def templates(folder: Path) -> None:
    from t5patches.editing.templates import read_templates, with_templates

    with_templates(["a", "b {inputs}"], read_templates(folder / "templates.txt"), 0)


def rules(folder: Path) -> None:
    from t5patches.editing.rules import read_rules

    found = read_rules(folder / "rules.toml")
    for output in ("A man aged 52 left New York for Rome.", "a" * 40, "", "\u0130 \U0001f600 "):
        try:
            found("Rome", output)
        except ValueError as error:  # as a command that is at work tells it: by the rule's name
            raise ValueError(f"rules.toml: {error}") from error


def model(folder: Path) -> None:
    """A folder's model, and what becomes of its settings in the network."""
    import jax
    import numpy as np

    from t5patches.model.folder import load_model
    from t5patches.model.huggingface import config_file

    found = load_model(folder).model
    config_file(found)
    batch = {name: np.ones((1, 3), np.int32) for name in ("inputs", "outputs")}
    jax.eval_shape(found.hidden, found.param_shapes(), batch)


def decoder(folder: Path) -> None:
    model(folder / "decoder")


def chat(folder: Path) -> None:
    """A prompt by the folder's chat template, which gets less time than users give it."""
    from t5patches.model import chat
    from t5patches.model.tokenizer import Message
    from t5patches.model.tokenizer_files import load_tokenizer

    chat.SECONDS = 3.0
    found = load_tokenizer(folder / "decoder", chat="on")
    found.encode_prompt("a cat sat")
    found.encode_prompt((Message("system", "\U0001f600"), Message("user", "")))


def adapter(folder: Path) -> None:
    from t5patches.model.lora import load_adapter

    load_adapter(folder / "adapter", folder / "decoder")


def gguf(folder: Path) -> None:
    from t5patches.model.gguf_format import load_gguf

    load_gguf(folder / "model.gguf")


def tokens(folder: Path) -> None:
    from t5patches.model.tokenizer_files import load_tokenizer

    found = load_tokenizer(folder)
    for text in ("a cat sat in Rome", " \t\u2581<0x41></s><extra_id_0>", "\U0001f600\ufeff\0", ""):
        found.decode((*found.encode(text).ids, 0, 1, 2, 10**6))


def record(folder: Path) -> None:
    from t5patches.editing.evaluate import Evaluation, Measure
    from t5patches.editing.records import card_before_edits, read_rounds
    from t5patches.editing.report import Results, to_json, write_html
    from t5patches.editing.rounds import _row

    card_before_edits(folder)
    read_rounds(folder)
    measures = dict.fromkeys(("kl", "bleu", "exact_match"), Measure(1.0, 0.1))
    results = Results("", "", "", measures, [], [_row(folder, Evaluation(measures, []))], {})
    to_json(results)
    write_html(folder / "report.html", results)


def aligned(folder: Path) -> None:
    from t5patches.editing.records import check_chat

    check_chat(folder / "decoder", "auto")


def preferences(folder: Path) -> None:
    from t5patches.editing.reward import pair_arrays, read_pairs, repeats, split

    pairs = read_pairs(folder / "preferences.jsonl", tokenizer())
    repeats(pairs)
    try:
        pair_arrays(split(pairs, 0.1, 0)[0], 0)
    except ValueError as error:  # too few are left, which is said of the pairs
        raise ValueError(f"preferences.jsonl: {error}") from error


def other_text(folder: Path, name: str) -> None:
    from t5patches.editing.data import to_arrays
    from t5patches.editing.other_text import read_other_text

    to_arrays(read_other_text(folder / name, tokenizer(), tokenizer(), 8)[:50], pad_id=0)


def reward(folder: Path) -> None:
    """A reward model, and what it gives for outputs."""
    from t5patches.editing.reward import Reward, reward_fingerprint
    from t5patches.editing.scores import score

    reward_fingerprint(folder)
    found = Reward(folder)
    try:
        score(found, ["a cat sat", ""], ["a dog", "on a mat"])
    except ValueError as error:  # as `--reward` tells it: by the name of the folder
        raise ValueError(f"{folder}: {error}") from error


def scores(folder: Path) -> None:
    """What a scorer may give: anything that a file may hold."""
    import json

    from t5patches.editing.scores import score

    try:
        given = json.loads((folder / "scores.json").read_bytes())
    except (ValueError, RecursionError):  # nothing that a function gives
        return
    try:
        score(lambda outputs: given, ["a", "b", ""], [])
    except ValueError as error:
        raise ValueError(f"scores.json: {error}") from error


def run(folder: Path) -> None:
    from t5patches.editing.train import finished_run
    from t5patches.runs.claims import claim

    asked = {"settings": {"steps": 3}, "params": 64 * "0"}
    claim(folder, asked, may_differ={"steps": lambda old, new: old <= new})
    finished_run(folder, {})


def part(folder: Path) -> None:
    from t5patches.runs.claims import Parts

    (folder / "run.json").write_text("{}")
    Parts(folder, {}).get("part", lambda: [1])


def t5x(folder: Path) -> None:
    from t5patches.model.t5x_format import load_t5x

    load_t5x(folder)


_SHARD = "model-00001-of-00002.safetensors"
TARGETS: dict[str, Target] = {
    "data": Target("edits.jsonl", data),
    "inputs": Target("inputs.jsonl", functools.partial(inputs, name="inputs.jsonl")),
    "texts": Target("inputs.txt", functools.partial(inputs, name="inputs.txt")),
    "templates": Target("templates.txt", templates),
    "rules": Target("rules.toml", rules),
    "words": Target("words.txt", rules),
    "config": Target("config.json", model),
    "index": Target("model.safetensors.index.json", model),
    "weights": Target(_SHARD, model),
    "spiece": Target("spiece.model", tokens),
    "sentinels": Target("tokenizer_config.json", tokens),
    "tokenizer": Target("tokenizer.json", tokens, without=["spiece.model"]),
    "decoder": Target("decoder/config.json", decoder),
    "generation": Target("decoder/generation_config.json", decoder),
    "byte-level": Target("decoder/tokenizer.json", chat),
    "chat": Target("decoder/chat_template.jinja", chat),
    "adapter": Target("adapter/adapter_config.json", adapter),
    "matrices": Target("adapter/adapter_model.safetensors", adapter),
    "gguf": Target("model.gguf", gguf),
    "record": Target("t5patches.json", record),
    "card": Target("README.md", record),
    "aligned": Target("decoder/align.json", aligned),
    "preferences": Target("preferences.jsonl", preferences),
    "other text": Target("inputs.txt", functools.partial(other_text, name="inputs.txt")),
    "answers": Target("answers.jsonl", functools.partial(other_text, name="answers.jsonl")),
    "reward": Target("reward.json", reward),
    "scores": Target("scores.json", scores),
    "run": Target("run.json", run),
    "part": Target("part.json", part),
    "t5x": Target("checkpoint", t5x),
}

# Mutations: each makes something else of some bytes. `others` are inputs to the same target.

_VALUE = re.compile(rb'"(?:[^"\\\n]|\\.)*"|-?\d[\d.eE+-]*|\btrue\b|\bfalse\b|\bnull\b')
_PIECES = [
    *(b"null", b"true", b"0", b"1", b"-1", b"3.5", b"1e999", b"NaN", b"-0.0", b"9" * 5000),
    *(b"2147483648", b"18446744073709551616", b"1e-46", b"[]", b"{}", b"[[0, 1]]", b"'a'"),
    *(b'""', b'" "', b'"\\ud800"', b'"\\u0000"', b'"../x"', b'"/dev/zero"', b'"(a+)+$"', b'"a\nb"'),
    *(b'{"a": 1, "a": 2}', b"#", b"\\", b'"', b"\r", b"\n", b"[" * 3000, b'{"a":' * 3000),
    *(
        b"\xef\xbb\xbf",
        b"\xff",
        b"\0",
        "\u2028".encode(),
        "\u0130".encode(),
        b"\x80\x80\x80\x80\x04",
    ),
]

Mutation = Callable[[bytes, Sequence[bytes], random.Random], bytes]


def _place(content: bytes, rng: random.Random) -> tuple[int, int]:
    """Some bytes in the middle, mostly few."""
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.choice([1, 1, 2, 4, 8, 30, 200]))


def other_value(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A text, number or constant becomes another one, of here or of nowhere."""
    values = list(_VALUE.finditer(content))
    if not values:
        return other_bytes(content, others, rng)
    value = rng.choice(values)
    new = rng.choice(_PIECES) if rng.random() < 0.7 else rng.choice(values).group()
    return content[: value.start()] + new + content[value.end() :]


def other_bytes(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    start, end = _place(content, rng)
    new = rng.choice([*_PIECES, bytes(rng.randrange(256) for _ in range(end - start))])
    return content[:start] + new + content[rng.choice([start, end]) :]


def other_bit(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    changed = bytearray(content or b"\0")
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def dropped(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    start, end = _place(content, rng)
    return content[:start] + (content[end:] if rng.random() < 0.9 else b"")


def repeated(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    start, end = _place(content, rng)
    return content[:end] + content[start:end] * rng.choice([1, 1, 2, 1000]) + content[end:]


def of_another(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    other = rng.choice(others)
    start, end = _place(other, rng)
    at = rng.randrange(len(content) + 1)
    return content[:at] + (other[start:end] + content[at:] if rng.random() < 0.5 else other[start:])


def written_otherwise(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    ways = [
        lambda: b"\xef\xbb\xbf" + content,
        lambda: content.decode("utf-8", "replace").encode("utf-16"),
        lambda: content.replace(b"\n", b"\r\n"),
        lambda: content.replace(b" ", "\u00a0".encode()),
        lambda: content.upper(),
    ]
    return rng.choice(ways)()


MUTATIONS: Sequence[Mutation] = (
    *(other_value,) * 4,
    *(other_bytes, other_bit, dropped, repeated, of_another, written_otherwise),
)


def mutated(name: str, content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A few mutations; of a file of tensors mostly of its header.

    That of a safetensors file keeps the length that it says right.
    """
    before, rest, file = b"", b"", TARGETS[name].file
    if rng.random() < 0.8 and file.endswith(".gguf"):
        content, rest = content[: len(content) // 3], content[len(content) // 3 :]
    elif rng.random() < 0.8 and file.endswith(".safetensors"):
        length = int.from_bytes(content[:8], "little")
        before, content, rest = content[:8], content[8 : 8 + length], content[8 + length :]
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        content = rng.choice(MUTATIONS)(content, others, rng)[:LONGEST_INPUT]
    return (before and len(content).to_bytes(8, "little")) + content + rest


def inputs_of(name: str) -> list[bytes]:
    """The valid file of a target, and its corpus."""
    found = sorted((CORPUS / name).glob("*"))
    return [path.read_bytes() for path in (VALID / TARGETS[name].file, *found)]


# The process that reads.


class Answer(NamedTuple):
    """What came of an input.

    Attributes:
        finding: what is wrong, in a line; empty where nothing is.
        lines: of ours that it reached, and none before.
        refused: whether there was an error, one of ours.
    """

    finding: str
    lines: int
    refused: bool = False


class Reader:
    """A process that reads inputs; where it hangs or dies, another one takes its place."""

    def __init__(
        self,
        targets: Mapping[str, Target] = TARGETS,
        seconds: float = SECONDS,
        memory: int = MEMORY,
    ) -> None:
        self._process: Any = None
        self._seconds, self._given = seconds, (targets, memory)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: Any) -> None:
        self._end()

    def __call__(self, name: str, content: bytes) -> Answer:
        """Reads an input to a target."""
        if self._process is None:
            self._start()
        try:
            self._pipe.send((name, content))
            if self._pipe.poll(self._seconds):
                return Answer(*self._pipe.recv())
            finding = f"takes more than {self._seconds:g} s"
        except (EOFError, OSError):
            self._process.join(10)
            finding = f"the process ends, with {self._process.exitcode}"
        self._end()
        return Answer(finding, 0)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_answer, args=(there, *self._given), daemon=True)
        self._process.start()
        there.close()
        self._pipe.recv()  # all is imported

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _answer(pipe: Any, targets: Mapping[str, Target], memory: int) -> None:
    """Reads what comes through a pipe until there is nobody at its other end."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as directory:
        for name, target in TARGETS.items():  # so that all is imported
            target.read(_folder(target, inputs_of(name)[0], directory))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
        known: set[tuple[str, int]] = set()
        pipe.send("ready")
        with contextlib.suppress(EOFError):
            while True:
                name, content = pipe.recv()
                folder = _folder(targets[name], content, directory)
                lines: set[tuple[str, int]] = set()
                with _traced(lines):
                    finding, refused = _judged(targets[name], folder)
                new = len(lines - known)
                known |= lines
                pipe.send((finding, new, refused))


def _folder(target: Target, content: bytes, directory: str) -> Path:
    """A folder of valid files but for one."""
    folder = Path(directory, "folder")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(VALID, folder, ignore=shutil.ignore_patterns(*target.without))
    (folder / target.file).write_bytes(content)
    return folder


def _judged(target: Target, folder: Path) -> tuple[str, bool]:
    """What is wrong with how a file is read, and whether it is refused."""
    from t5patches import cli

    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            target.read(folder)
    except BaseException as error:
        if not isinstance(error, Exception) or cli._exit_code(error) != 2:
            ours = [f for f in traceback.extract_tb(error.__traceback__) if _is_ours(f.filename)]
            at = f"{Path(ours[-1].filename).name}, {ours[-1].name}" if ours else "nowhere of ours"
            return f"{type(error).__name__} in {at}: {str(error)[:200]!r}", True
        said = cli._in_words(error)
        if target.file not in said and str(folder) not in said:
            return f"names no file: {said[:200]!r}", True
        if len(said) > LONGEST_MESSAGE:
            return f"says {len(said)} characters: {said[:200]!r}...", True
        return "", True
    return "", False


_OURS = str(Path(__file__).parent.parent / "t5patches")


def _is_ours(file: str) -> bool:
    return file.startswith(_OURS)


@contextlib.contextmanager
def _traced(lines: set[tuple[str, int]]) -> Iterator[None]:
    """Collects the lines of ours that are run."""

    def local(frame: Any, event: str, _: Any) -> Any:
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    sys.settrace(lambda frame, *_: local if _is_ours(frame.f_code.co_filename) else None)
    try:
        yield
    finally:
        sys.settrace(None)


# The loop.


class Found(NamedTuple):
    """Something to mend."""

    target: str
    what: str
    file: Path


def key(finding: str) -> str:
    """Equal for findings that are the same but for the input."""
    return re.sub(r"\d+", "N", finding.partition(":")[0])


def smaller(content: bytes, still: Callable[[bytes], bool], seconds: float = 20.0) -> bytes:
    """Less of an input, of which the same still holds."""
    until, size = time.monotonic() + seconds, len(content) // 2
    while size and time.monotonic() < until:
        start = 0
        while start < len(content) and time.monotonic() < until:
            less = content[:start] + content[start + size :]
            content, start = (less, start) if still(less) else (content, start + size)
        size //= 2
    return content


def search(
    names: Sequence[str], seed: int, seconds: float, tell: Callable[[str], None]
) -> list[Found]:
    """Mutates and reads until the time is over.

    Args:
        names: of the targets.
        seed: of the mutations.
        seconds: how long.
        tell: is told what is found, and at the end how much was read.

    Returns:
        What was found, each kind once for each target.
    """
    until, found = time.monotonic() + seconds, []
    pools = {name: inputs_of(name) for name in names}
    count, refused = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    told = set()
    with Reader() as reader:

        def read(name: str, content: bytes) -> Answer:
            answer = reader(name, content)
            count[name] += 1
            refused[name] += answer.refused
            if answer.finding and (name, key(answer.finding)) not in told:
                told.add((name, key(answer.finding)))
                small = content
                if "more than" not in answer.finding:
                    small = smaller(
                        content, lambda x: key(reader(name, x).finding) == key(answer.finding)
                    )
                file = CORPUS / name / hashlib.sha256(small).hexdigest()[:12]
                found.append(Found(name, answer.finding, file))
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(small)
                tell(f"{name}: {answer.finding}\n  {file}")
            return answer

        for name in names:
            for content in pools[name]:
                read(name, content)
        number = 0
        while time.monotonic() < until:
            name = names[number % len(names)]
            rng = random.Random(f"{seed} {number}")
            number += 1
            # Half of them one step from a valid file: most of the others are refused at once.
            pool = pools[name]
            content = mutated(name, pool[0] if rng.random() < 0.5 else rng.choice(pool), pool, rng)
            if read(name, content).lines:
                pool.append(content)
    for name in names:
        tell(
            f"{name}: {count[name]} read, {refused[name]} of them refused; {len(pools[name])} that "
            "reach lines of their own"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the loop, and the kills beside it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--no-kills", action="store_true", help="spoil files only")
    options = parser.parse_args(arguments)
    print(f"seed {options.seed} (--seed {options.seed} again does the same)", flush=True)
    given = ["--seed", str(options.seed), "--minutes", str(options.minutes)]
    kills = None
    if not options.no_kills:
        script = Path(__file__).with_name("kills.py")
        kills = subprocess.Popen([sys.executable, script, *given])
    tell = functools.partial(print, flush=True)
    found = search(options.targets, options.seed, 60 * options.minutes, tell)
    killed = 0 if kills is None else kills.wait()
    print(f"{len(found)} to mend" + (", and of kills as told above" if killed else ""))
    return 1 if found or killed else 0


if __name__ == "__main__":
    sys.exit(main())
