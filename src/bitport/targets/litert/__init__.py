"""LiteRT (TensorFlow Lite's successor) on CPU: s8 activations, s8 weights per channel, XNNPACK's kernels."""

from __future__ import annotations

from ._target import LiteRt

TARGET = LiteRt
