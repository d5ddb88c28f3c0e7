"""The public name of `t5patches.t5x.trainer`."""

import sys

from t5patches.t5x import trainer

sys.modules[__name__] = trainer
