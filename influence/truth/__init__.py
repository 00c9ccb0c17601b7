"""Actual loss changes: retraining without rows, and related methods."""
