"""One runtime a file (or small folder): its rules, its exporter, its runner, its arithmetic.

`bitport.targets()` is a function of the fixed interface, and Python binds this package to the same name. So the
package can be called, and the two never take each other's place.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self) -> dict[str, dict[str, Any]]:
        """Known targets: name → `summary`, `available`, and what it `needs` when it isn't."""
        found: dict[str, dict[str, Any]] = import_module("bitport.api").targets()
        return found


sys.modules[__name__].__class__ = _Callable
