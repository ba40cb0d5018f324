"""Looks for calls of all ranks that converted code makes under tests which ranks may answer differently."""
