"""Model Compression Toolkit: gradient-based post-training quantization."""
