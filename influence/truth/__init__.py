"""Actual changes: retraining without rows, and what stands near it."""
