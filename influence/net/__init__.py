"""Nets: Keras models with their risks, and the derivatives of these risks."""

import lazy_loader

# The public name `influence.measurements` is this module. It is imported at its first use.
__getattr__, _, _ = lazy_loader.attach(__name__, ["measurements"])
