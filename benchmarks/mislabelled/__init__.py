"""A benchmark of wrong labels: the share that each ranking of `audit` finds, beside cleanlab's."""
