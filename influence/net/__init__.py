"""Nets: Keras models as risks."""
