"""Figure 5: the figure, its attacks and its heads."""
