"""ExecuTorch (CPU, XNNPACK): s8 activations, s8 weights per channel, int32 biases, compiled ahead into one file."""

from __future__ import annotations

from ._target import ExecuTorch

TARGET = ExecuTorch
