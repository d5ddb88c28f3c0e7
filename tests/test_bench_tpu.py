"""The TPU's microbenchmarks without a TPU: what is read out of a profile, and what they say."""

import pathlib
import subprocess
import sys

import jax
import pytest

from bench import card, common, decoder_card, gpu, tpu

MS = 10**9  # picoseconds


def line(name, *events):
    """A line of a profile: of each event its module's number, when it begins and how long."""
    texts = [f"events {{ metadata_id: {i} offset_ps: {at} duration_ps: {took} }}"
             for i, at, took in events]  # fmt: skip
    return f'lines {{ name: "{name}" {" ".join(texts)} }}'


def plane(name, *lines):
    names = {1: "jit_loss(123)", 2: "jit_add(7)", 3: "fusion.1"}
    known = [f'event_metadata {{ key: {k} value {{ id: {k} name: "{v}" }} }}'
             for k, v in names.items()]  # fmt: skip
    return f'planes {{ name: "{name}" {" ".join([*lines, *known])} }}'


def test_an_execution_takes_as_long_as_the_slowest_core():
    ops = line("XLA Ops", (3, 0, MS))
    first = line("XLA Modules", (1, 0, 2 * MS), (2, 3 * MS, MS), (1, 5 * MS, 2 * MS))
    found = jax.profiler.ProfileData.from_text_proto("\n".join([
        plane("/host:CPU", line("XLA Modules", (1, 0, 9 * MS))),
        plane("/device:TPU:0", first, ops),
        plane("/device:TPU:1", ops, line("XLA Modules", (1, 0, MS), (1, 5 * MS, 3 * MS))),
        plane("/device:TPU:2", ops),  # takes no part
    ]))  # fmt: skip
    assert common.device_times(found, "jit_loss") == [2.0, 3.0]
    assert common.device_times(found, "jit_add") == [1.0]
    with pytest.raises(LookupError, match=r"no execution of jit_other .* /device:TPU:2"):
        common.device_times(found, "jit_other")


HERE = """
from bench import card, common, gpu, tpu

class Harness:  # the part of pytest-benchmark's fixture that is used
    extra_info = {}

    def pedantic(self, call, rounds, warmup_rounds):
        call()

def device_times(found, program):
    times.extend(read(found, program))
    return times

times, read = [], common.device_times
common.device_times, tpu.TOKENS, tpu.ROUNDS = device_times, 16, 5
tpu.test_loss(Harness(), 1024, "float32", "tnff", "xla")
assert len(times) == 5, times
assert Harness.extra_info["device_ms"]["median"] == sorted(times)[2] > 0
assert Harness.extra_info["temporaries_mib"] > 0
"""


def test_a_benchmark_on_what_is_here():
    """The profile is a real one, of this machine's CPU, and has every execution in it.

    In a process of its own: JAX's profiler fails where the TPU compiler was loaded without a TPU.
    """
    root = pathlib.Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", HERE], cwd=root, check=True, timeout=300)


@pytest.mark.parametrize(
    ("main", "wanted"), [
        (tpu.main, "TPU"), (gpu.main, "GPU"), (card.main, "GPU or TPU"), (decoder_card.main, "GPU")
    ],
)  # fmt: skip
def test_nothing_is_stored_of_another_device(main, wanted, monkeypatch, tmp_path):
    stored = tmp_path / "figures.json"
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")  # what one of them changes
    monkeypatch.setattr(sys, "argv", ["bench"] + ["--out", str(stored)] * (main is gpu.main))
    with pytest.raises(
        SystemExit, match=rf"No {wanted} here \(JAX runs on cpu\): nothing is timed"
    ):
        main()
    assert not list(tmp_path.iterdir())
