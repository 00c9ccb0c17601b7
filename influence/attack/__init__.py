"""Perturbations of training inputs that increase the test loss (data poisoning)."""
