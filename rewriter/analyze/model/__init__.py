"""What modules are made of: lists of blocks, how they are built, the loops over them, parameters."""
