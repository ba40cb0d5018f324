"""Blocks as CUDA graphs: which can be recorded, the recordings, and what is compared before each replay."""
