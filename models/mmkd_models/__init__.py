"""What travels with a student's weights: needs torch and transformers, knows nothing of mmkd."""
