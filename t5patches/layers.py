"""The public name of `t5patches.model.t5.layers`."""

import sys

from t5patches.model.t5 import layers

sys.modules[__name__] = layers
