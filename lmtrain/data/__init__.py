"""From text to batches: tokenizers, the token store, samplers."""
