"""Why quantization costs what it costs: layer by layer, with causes and remedies."""
