"""Streaming XLA in the form that suits the platform a program is lowered for."""

from __future__ import annotations

from functools import partial

from t5patches_kernels.backends.xla import cpu_math, driver, gpu_form
from t5patches_kernels.core.operation import Driver
from t5patches_kernels.core.statistics import Functions

_FOR_CPUS: Driver = partial(driver.run, driver.Form(cpu_math.FUNCTIONS, whole=True))
_FORMS: dict[str, Driver] = {
    "cuda": gpu_form.run,
    "rocm": gpu_form.run,
    "tpu": partial(driver.run, driver.Form(Functions(), whole=False)),
}


def form(platform: str) -> Driver:
    """The driver of a platform, as JAX names it when it lowers a program."""
    return _FORMS.get(platform, _FOR_CPUS)
