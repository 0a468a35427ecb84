"""Recipe, batch, train step, sharding, checkpoints, metrics and the training loop."""
