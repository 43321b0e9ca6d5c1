"""Quantizing by what mistakes cost: breast cancer, digits and CIFAR-10."""
