"""A net is a Keras model as a risk."""
