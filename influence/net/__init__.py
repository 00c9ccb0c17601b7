"""Nets: Keras models with their risks, and the derivatives of these risks."""
