"""Ids on disk: how a token store is built by several processes, and how it is read."""
