"""Sets of examples, which are the rows that a risk averages over."""
