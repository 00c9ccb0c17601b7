"""Speed, compared with the machine's own limit and with peers. `python -m benchmarks --help`."""

import influence_console as console

console.begin(__name__)

import importlib.util

from experiments import import_tensorflow

if importlib.util.find_spec("tensorflow"):  # the peers' environment has no TensorFlow
    import_tensorflow()
