"""Optimisation, checkpoints and evaluation: what the training loops share."""
