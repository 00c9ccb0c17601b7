"""Training inputs moved so that test losses rise."""
