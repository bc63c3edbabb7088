"""One file per stage that trains something."""
