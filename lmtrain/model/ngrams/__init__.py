"""N-grams, with which a model sees the last few tokens directly: embedded n-grams and counted n-grams."""
