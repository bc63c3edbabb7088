"""Post-train a robot policy inside a learned video world."""

__version__ = "0.1.0"
