"""torchao: PyTorch's own quantization."""
