"""Files to texts: which files, their digests, their formats, and excerpts of large ones."""
