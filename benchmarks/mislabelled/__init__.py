"""How many planted wrong labels each ranking of `audit` finds, beside cleanlab."""
