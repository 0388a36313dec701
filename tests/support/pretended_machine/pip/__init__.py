"""Stands before the real pip on the path."""
