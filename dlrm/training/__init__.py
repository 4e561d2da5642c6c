"""Training of a DLRM: a run from its options to its report, the loop, optimizers, checkpoints, logs."""
