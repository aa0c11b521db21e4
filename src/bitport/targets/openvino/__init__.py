"""OpenVINO (CPU): u8 activations, s8 weights per channel, float biases, lowered to integers by the runtime itself."""

from __future__ import annotations

from ._target import OpenVino

TARGET = OpenVino
