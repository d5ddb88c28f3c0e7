"""The public name of `t5patches.t5x.models`."""

import sys

from t5patches.t5x import models

sys.modules[__name__] = models
