"""The code that runs any experiment and reports its results."""
