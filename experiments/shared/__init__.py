"""Code that two or more figures use."""
