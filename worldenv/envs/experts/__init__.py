"""Scripted experts: they see where everything is, and know one way to do each task."""
