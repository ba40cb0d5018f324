"""Real training scripts, converted and run whole on two ranks, against the original on one process."""
