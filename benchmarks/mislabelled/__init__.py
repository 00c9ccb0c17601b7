"""A benchmark with planted wrong labels. It compares the rankings of `audit` with cleanlab's."""
