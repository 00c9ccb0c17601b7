"""The questions that `influence.preflight.check` asks of a net and its training set."""
