"""Named arrays, checkpoints, warnings, progress bars and byte budgets for all other folders."""
