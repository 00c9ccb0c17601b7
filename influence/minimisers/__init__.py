"""Algorithms that minimise functions of NumPy arrays. They do not use a net."""
