"""How fast: against the machine's own limit, and against peers. `python -m benchmarks --help`."""

import importlib.util

from experiments import import_tensorflow

if importlib.util.find_spec("tensorflow"):  # the peers' environment has none
    import_tensorflow()
