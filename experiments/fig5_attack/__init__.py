"""The experiment of Figure 5: its figure, claims, attacks and heads."""
