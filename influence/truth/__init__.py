"""Measurements of how losses actually change if training rows are removed or edited."""
