"""The JAX side: rollout, batch, train step, checkpoints, metrics and the loop."""
