"""The public name of `t5patches.model.t5.network`."""

import sys

from t5patches.model.t5 import network

sys.modules[__name__] = network
