"""Extractive question answering on SQuAD v1.1 by BERT and its like."""
