"""Putting a trained model to use: generating text and scoring it."""
