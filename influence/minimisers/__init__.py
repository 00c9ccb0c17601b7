"""Minimisers of functions of arrays, without a net."""
