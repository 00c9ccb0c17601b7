"""Section 5.3."""
