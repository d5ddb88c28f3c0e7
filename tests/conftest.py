"""What every test runs under: 8 CPU devices, a cache of programs, strict promotion, a pace."""

import gc
import importlib.metadata
import itertools
import os
import pathlib
import tempfile

# Before jax is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# To optimise code for CPUs takes longer than it saves: `harness.AS_USERS` asks for it where a
# test's numbers or programs depend on it. So do the fusion emitters, three quarters of XLA's time
# for an interpreted kernel; jaxlib 0.11 cannot do without. Libtpu reads the flags too, later, and
# ends the process over one that it does not know.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 "
    + "--xla_backend_optimization_level=0 " * (os.environ["JAX_PLATFORMS"] == "cpu")
    + "--xla_cpu_use_fusion_emitters=false "
    * importlib.metadata.version("jaxlib").startswith("0.10.")
    + os.environ.get("XLA_FLAGS", "")
).strip()

# Many tests compile the same small T5. Workers and child processes take over what is set here.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="t5patches-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.4"

import hypothesis
import jax
import pytest

jax.devices("cpu")  # reads the flags
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("--xla_cpu_use_fusion_emitters=false", "")

# To trace programs makes many objects and little garbage: a tenth of the time went into searching
# for it.
gc.set_threshold(100_000, 20, 100)

# In this process only `shared_programs` stores any: interpreted kernels are large programs that no
# other test runs (to store one has once ended a worker), and those for a TPU cannot be loaded.
_LEAST_SECONDS = "jax_persistent_cache_min_compile_time_secs"
_STORED = getattr(jax.config, _LEAST_SECONDS)
jax.config.update(_LEAST_SECONDS, float("inf"))

hypothesis.settings.register_profile(
    "ci", max_examples=25, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile("slow", max_examples=200, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="module")
def shared_programs():
    """What is compiled here is kept for other tests, workers and child processes."""
    jax.config.update(_LEAST_SECONDS, _STORED)
    yield
    jax.config.update(_LEAST_SECONDS, float("inf"))


# Linux gives a process 65530 mappings of memory, and JAX does not survive asking for more: each
# compiled program takes dozens.
_MANY_MAPPINGS = 40_000
_MAPPINGS = pathlib.Path("/proc/self/maps")
_tests = itertools.count(1)


def pytest_runtest_teardown():
    """Programs are forgotten before there are too many: a sweep compiles thousands."""
    looks = next(_tests) % 16 == 0 and _MAPPINGS.exists()
    if looks and _MAPPINGS.read_bytes().count(b"\n") > _MANY_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _strict_jax():
    """A silent promotion (of a dtype or a rank) in our code is an error."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
