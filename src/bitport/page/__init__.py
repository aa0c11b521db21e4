"""The report: renders the records of an artifact folder, computes nothing."""

from __future__ import annotations

from .page import render

__all__ = ["render"]
