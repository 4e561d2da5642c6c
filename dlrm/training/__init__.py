"""Training a DLRM: the loop, optimizers, checkpoints, logs."""
