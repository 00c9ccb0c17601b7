"""Tools that all other folders use, such as checkpoints, warnings and progress bars."""
