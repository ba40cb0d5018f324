"""Training scripts composed of idioms by chance, run before and after conversion."""
