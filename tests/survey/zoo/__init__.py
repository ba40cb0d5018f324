"""Real models from packages, converted from the source they ship and verified. Not part of the ordinary tests."""
