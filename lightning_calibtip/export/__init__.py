"""From the quantized model to what runs and what is stored: ONNX files for engines, packed files, integer arithmetic."""
