"""Reads Python projects: sources, names, classes, containers, loops, training scripts. Changes nothing."""
