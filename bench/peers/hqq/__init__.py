"""HQQ, half-quadratic quantization of weights."""
