"""What a training script needs around the loss (floor 7): momentum and mixing, and alpha of the Bayesian loss."""
