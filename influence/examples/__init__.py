"""Sets of examples. A risk averages over their rows."""
