"""From the quantized model to what runs: ONNX files for engines, packed files, integer arithmetic."""
