"""Evaluation: accuracy and attack success of a model, detection metrics of a score."""
