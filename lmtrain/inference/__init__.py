"""What a trained model does: it writes text, scores it, fills blanks, gives vectors, and is exported."""
