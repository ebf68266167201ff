"""Trainers of several ranks: rows of logits whose columns lie on different ranks (vocab.py)."""
