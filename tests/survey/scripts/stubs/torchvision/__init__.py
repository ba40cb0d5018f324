"""Stands in for torchvision: what the scripts take from it, and a MNIST of 32 synthetic pictures."""

from . import datasets, transforms, utils

__all__ = ["datasets", "transforms", "utils"]
