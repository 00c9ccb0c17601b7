"""A Keras model as a risk."""
