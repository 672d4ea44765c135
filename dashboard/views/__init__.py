"""Doors for browsers: one page, one URL, one view; thin."""
