"""Reads a project and never changes it; ``facts`` is what the rules ask.

read
    Files, names, classes: what stands where and what it refers to.
model
    What a module is made of: lists of blocks, the loops over them, parameters.
training
    What a script does with a module: roles of variables, ranks, collectives, values of parameters.

``model`` and ``training`` know nothing of each other.
"""
