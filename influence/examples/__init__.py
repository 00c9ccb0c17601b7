"""The rows that a risk is a mean over."""
