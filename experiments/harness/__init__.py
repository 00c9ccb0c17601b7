"""The harness that runs any figure and reports the results."""
