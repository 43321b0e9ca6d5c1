"""Causal language models on texts, scored by perplexity."""
