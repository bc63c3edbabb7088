"""True environments: the embedded tabletop and LIBERO, with their scripted experts."""
