"""What a training script needs around the loss (floor 7): batches beyond the encoder's memory, momentum and mixing, a
learned scale, alpha of the Bayesian loss."""
