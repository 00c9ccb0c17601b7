"""The rows that a risk averages over."""
