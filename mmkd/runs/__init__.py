"""A recipe from start to end: checks before the first step, stages, resuming, evaluation."""
