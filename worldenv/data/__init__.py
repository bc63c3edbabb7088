"""Episodes: the one on-disk format, and how episodes come into it."""
