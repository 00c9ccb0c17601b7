"""Parts that two or more figures use."""
