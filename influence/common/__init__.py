"""What every other folder uses: named arrays, checkpoints, warnings, progress."""
