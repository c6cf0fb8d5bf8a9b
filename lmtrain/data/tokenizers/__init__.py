"""Texts to ids and back: the tokenizers, how they are learnt, and how they look words up."""
