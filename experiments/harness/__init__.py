"""The harness that runs any figure: options, records, verdicts, report."""
