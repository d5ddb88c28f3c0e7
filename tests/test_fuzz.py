"""A short slice of `make fuzz`: its corpus, and a few mutations that are the same each time."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import pytest

MUTATIONS = 8


@pytest.fixture(scope="module")
def reader():
    with fuzz.Reader() as reader:
        yield reader


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_spoilt_file_gives_a_result_or_an_error_of_ours(name, reader):
    valid, *corpus = pool = fuzz.inputs_of(name)
    answer = reader(name, valid)
    assert not answer.finding
    assert not answer.refused
    for number in range(MUTATIONS):
        rng = random.Random(f"{name} {number}")
        corpus.append(fuzz.mutated(name, rng.choice(pool), pool, rng))
    for content in corpus:
        assert not reader(name, content).finding, content[:2000]


# What the fuzzer would say of readers that are at fault.


def unnamed(folder):
    raise ValueError("something is wrong")


def talkative(folder):
    raise ValueError(f"{folder}: {'a' * 10**6}")


def of_another_kind(folder):
    return {}["a"]


def endless(folder):
    time.sleep(60)


def greedy(folder):
    bytearray(2 << 30)


def dying(folder):
    os.abort()


FAULTS = {
    unnamed: "names no file: 'something is wrong'",
    talkative: "says 1000",
    of_another_kind: "KeyError in nowhere of ours",
    endless: "takes more than 1 s",
    greedy: "MemoryError in nowhere of ours",
    dying: "the process ends, with -6",
}


@pytest.mark.slow  # where the fuzzing itself is
def test_faults_are_found():
    targets = {fault.__name__: fuzz.Target("inputs.txt", fault) for fault in FAULTS}
    with fuzz.Reader(targets, seconds=1, memory=1 << 30) as reader:
        for fault, finding in FAULTS.items():
            assert reader(fault.__name__, b"a").finding.startswith(finding)


def test_an_input_is_made_small():
    assert fuzz.smaller(b"a" * 1000 + b"bc" + b"a" * 500, lambda x: b"bc" in x) == b"bc"


@pytest.mark.slow
def test_a_killed_command_goes_on():
    script = Path(fuzz.__file__).with_name("kills.py")
    slice_ = ["--seed", "0", "--rounds", "2", "--commands", "convert"]  # the others compile
    ended = subprocess.run([sys.executable, script, *slice_], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " 0 findings" in ended.stdout
