"""Training of one stage: its setup, steps, checkpoints and validation."""
