"""What is looked at in a model's first steps, and said once: what several ranks would do otherwise than one."""
