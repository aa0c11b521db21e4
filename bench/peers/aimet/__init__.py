"""AIMET: cross-layer equalization, AdaRound, sequential MSE."""
