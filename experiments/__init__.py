"""Commands. `python -m experiments.NAME`, or `deepseek-jax NAME` where the package is installed."""

import os

# XLA's alarms (a slow compilation, a cached program's CPU features) would tear the progress bar. XLA reads this when it
# is loaded, so it stands before any import; 0 shows everything.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
