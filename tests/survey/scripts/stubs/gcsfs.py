"""Stands in for gcsfs, of which nothing is used for local files."""
