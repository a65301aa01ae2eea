"""Data: sources to tokenized UL2 shards, and exact reading of them by row number."""
