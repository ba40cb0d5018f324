"""Imported first, it lets each rank see one GPU, its own: scripts that name ``cuda:0`` then name their rank's.

``import bmtrain.own_gpu`` is to be the first line of the script that torchrun starts.
"""

from .device import see_own_gpu

see_own_gpu()
