"""Parts that two figures use."""
