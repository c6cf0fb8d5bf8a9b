"""Ids on disk: token stores, how they are built by several processes, and how they are read."""
