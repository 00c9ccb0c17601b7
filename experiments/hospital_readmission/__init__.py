"""The experiment of section 5.3: its figure and claims."""
