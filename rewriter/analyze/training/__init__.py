"""What scripts do with models: roles of variables, ranks and collectives, where training starts, values."""
