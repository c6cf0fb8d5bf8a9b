"""The files of a run: where they lie, who writes them, and how a trained model is loaded from them."""
