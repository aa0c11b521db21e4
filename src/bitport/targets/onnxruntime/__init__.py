"""ONNX Runtime (CPU): u8 activations, s8 weights per channel, int32 biases, fused by the runtime itself."""

from __future__ import annotations

from ._target import OnnxRuntime

TARGET = OnnxRuntime
