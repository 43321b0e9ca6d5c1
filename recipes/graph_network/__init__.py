"""Graph networks, trained in a minute and quantized."""
