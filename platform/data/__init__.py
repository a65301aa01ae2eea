"""What the commands say of data builds, and building ahead of a run."""
