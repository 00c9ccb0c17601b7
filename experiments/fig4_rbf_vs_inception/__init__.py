"""The experiment of Figure 4: its figure, claims and models."""
