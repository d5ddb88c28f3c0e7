"""Memory that a process has freed goes back to the system."""

import pathlib
import re
import sys

import numpy as np
import pytest

from t5patches.model.memory import give_back

MIB = 2**20


def held():
    """Bytes of this process in memory that is no file's."""
    (kilobytes,) = re.findall(r"RssAnon:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


@pytest.mark.skipif(sys.platform != "linux", reason="nothing to do elsewhere")
def test_freed_memory_goes_back():
    arrays = [np.ones(MIB // 16, np.uint8) for _ in range(1024)]  # 64 MiB, too small to be mapped
    kept, before = arrays[-1], held()
    del arrays
    control = held()
    give_back()
    assert control > before - 8 * MIB  # the last one keeps all of the heap below it
    assert held() < before - 48 * MIB
    assert kept.all()
