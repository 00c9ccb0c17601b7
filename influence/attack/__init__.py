"""Moves of training inputs that raise test losses."""
