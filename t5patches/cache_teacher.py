"""The public name of `t5patches.t5x.cache_teacher`, also as `python -m t5patches.cache_teacher`."""

import runpy
import sys

from t5patches.t5x import cache_teacher

if __name__ == "__main__":
    runpy.run_module("t5patches.t5x.cache_teacher", run_name="__main__", alter_sys=True)
else:
    sys.modules[__name__] = cache_teacher
