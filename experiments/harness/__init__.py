"""The harness that runs any figure. It handles options, records, verdicts and reports."""
