"""Ids to batches: rows, their order in an epoch, and the loader that makes them ready."""
