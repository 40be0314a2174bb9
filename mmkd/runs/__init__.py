"""Run a recipe: checks before the first step, stages, resuming, evaluation."""
