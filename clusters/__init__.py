"""Where Ray runs: this machine now, clusters from YAML later."""
