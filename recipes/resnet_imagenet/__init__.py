"""Networks trained on ImageNet."""
