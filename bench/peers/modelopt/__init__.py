"""ModelOpt: fake quantization with max, MSE, SmoothQuant, AWQ."""
