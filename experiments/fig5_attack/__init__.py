"""Figure 5, a figure with attacks and heads of its own."""
