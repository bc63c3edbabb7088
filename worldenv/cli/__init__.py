"""Commands: arguments in, an exit code out."""
