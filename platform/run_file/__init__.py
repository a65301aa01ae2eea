"""The run file: one RunSpec, and every number that follows from it."""
