"""A model as a quantized network: observed, planned, applied; its states and its checkpoint."""
