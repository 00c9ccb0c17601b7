"""Benchmarks: our speed compared with the machine's own limit and with other libraries.

`python -m benchmarks --help` describes the command line. "Peers" are the other libraries.
"""

import influence_console as console

console.begin(__name__)

import importlib.util

if importlib.util.find_spec("tensorflow"):  # the peers' environment has no TensorFlow
    console.import_tensorflow()
