"""Texts to ids and back: the tokenizers, how they are learnt, and what they look up."""
