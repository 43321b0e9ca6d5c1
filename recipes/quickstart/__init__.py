"""From nothing to a quantized network in one command."""
