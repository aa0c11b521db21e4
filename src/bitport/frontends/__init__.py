"""Front ends: from a framework's model to a `Graph`. Frameworks other than torch are imported inside
functions."""

from __future__ import annotations
