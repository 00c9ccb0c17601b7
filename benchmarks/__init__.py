"""How fast: against the machine's own limit, and against peers. `python -m benchmarks --help`."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported, here or below
