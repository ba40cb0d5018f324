"""Training scripts in the styles that people write, run before and after conversion."""
