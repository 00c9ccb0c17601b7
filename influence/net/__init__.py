"""A net is a Keras model as a risk."""

import lazy_loader

# `influence.measurements` is this module, imported at its first use.
__getattr__, _, _ = lazy_loader.attach(__name__, ["measurements"])
