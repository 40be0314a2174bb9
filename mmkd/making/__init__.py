"""Answers that models write to questions about images, for records to train on."""
