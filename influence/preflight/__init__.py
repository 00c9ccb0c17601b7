"""The questions that `influence.check` asks of a net and its training set."""
