"""Neural Compressor: weights alone with GPTQ or plainly; int8 through PT2E."""
