"""T5X and Orbax leave event loops open: that is said while their tests' warnings are let pass."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _their_garbage():
    """Else it is found during a later test, to which every warning is an error."""
    yield
    gc.collect()
