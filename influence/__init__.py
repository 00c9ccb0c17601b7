"""Influence functions for Keras models: the effect of each training row on a test loss."""

import influence_console as console

console.begin(__name__)

import lazy_loader

# A public name is imported at its first use, because TensorFlow's import takes seconds. The names
# and their places are in __init__.pyi, which type checkers read too.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
