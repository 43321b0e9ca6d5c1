"""What a quantized layer is: affine arithmetic, observers, quantizers, observed structure, BatchNorm folding."""
