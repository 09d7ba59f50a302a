"""Judging a model: held-out loss."""
