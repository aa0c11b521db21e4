"""Brevitas: layer quantization, GPTQ or Qronos, bias correction."""
