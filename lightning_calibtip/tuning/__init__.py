"""BatchNorm re-tuning and bias tuning."""
