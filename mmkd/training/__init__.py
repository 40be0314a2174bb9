"""One stage: its parts, its steps, its checkpoints and its validation."""
