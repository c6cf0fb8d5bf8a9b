"""Training: the loop, optimization, and what is reported on the way."""
