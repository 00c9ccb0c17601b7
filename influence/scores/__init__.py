"""Predicted changes: influence functions and other methods to compare."""
