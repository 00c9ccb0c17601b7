"""Predicted changes: influence functions and what they are compared with."""
