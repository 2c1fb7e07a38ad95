"""The training loop and its parts: loss, optimizer, train step, checkpoints, metrics."""
