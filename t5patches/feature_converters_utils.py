"""The public name of `t5patches.t5x.feature_converters_utils`."""

import sys

from t5patches.t5x import feature_converters_utils

sys.modules[__name__] = feature_converters_utils
