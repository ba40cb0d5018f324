"""Files and what their names refer to: sources, notebooks, scopes, the modules and classes of a project."""
