"""The parts of Figure 5: figure, attacks and heads."""
