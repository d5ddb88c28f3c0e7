"""The public name of `t5patches.t5x.cache_teacher`, also as `python -m t5patches.cache_teacher`."""

import runpy
import sys

if __name__ == "__main__":
    # A gin file names the module's `train` as `__main__.train`.
    runpy.run_module("t5patches.t5x.cache_teacher", run_name="__main__", alter_sys=True)
else:
    from t5patches.t5x import cache_teacher

    sys.modules[__name__] = cache_teacher
