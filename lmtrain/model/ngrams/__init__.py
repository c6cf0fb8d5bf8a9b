"""What a model knows of the last few tokens beside its recurrence: vectors of n-grams, and counted ones."""
