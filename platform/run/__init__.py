"""One run: its driver, its directory, and the proof and account of what happened."""
