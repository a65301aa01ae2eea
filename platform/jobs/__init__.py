"""Many runs: queued, scheduled, started on Ray clusters, and told as a story."""
