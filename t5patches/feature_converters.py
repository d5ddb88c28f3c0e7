"""The public name of `t5patches.t5x.feature_converters`."""

import sys

from t5patches.t5x import feature_converters

sys.modules[__name__] = feature_converters
