"""Methods that measure how losses actually change: retraining without rows, and related ones."""
