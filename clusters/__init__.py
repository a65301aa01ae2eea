"""Where Ray runs: the cluster file, what Ray and KubeRay make of it, and a twin of a TPU cluster on this machine."""
