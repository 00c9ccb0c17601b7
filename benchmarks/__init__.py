"""Speed, compared with the machine's own limit and with peers. `python -m benchmarks --help`."""

import influence_console as console

console.begin(__name__)

import importlib.util

if importlib.util.find_spec("tensorflow"):  # the peers' environment has no TensorFlow
    console.import_tensorflow()
