"""The tests of a net and its training set that `influence.check` runs."""
