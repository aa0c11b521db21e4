"""ONNX Runtime's own quantization tools."""
