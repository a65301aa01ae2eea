"""OpenMoE model: configuration, layers, router, losses, optimizer, training step, checkpoints."""
