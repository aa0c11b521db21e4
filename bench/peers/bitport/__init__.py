"""bitport itself, judged by what ONNX Runtime computes."""
