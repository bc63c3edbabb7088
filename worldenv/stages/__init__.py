"""The stages of a run, one file each, and what they share; their order stands in worldenv.train."""
