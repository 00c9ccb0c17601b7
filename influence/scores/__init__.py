"""Predicted changes: influence functions, and other methods for comparison."""
