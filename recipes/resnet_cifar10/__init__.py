"""ResNet-20/32/44/56 on CIFAR-10."""
