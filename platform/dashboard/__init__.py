"""Pages to look at a run with."""
