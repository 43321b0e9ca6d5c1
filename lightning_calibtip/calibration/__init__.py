"""The calibration set, its logits, and replay: the inputs of one unit after the other."""
