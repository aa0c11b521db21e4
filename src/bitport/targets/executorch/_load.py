"""ExecuTorch's lines of an artifact's `run.py`: all from the class on, behind those of `_runner`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._runner import Run, Runner


class Network(Runner):
    """The network in ExecuTorch, whose Python runtime takes and gives tensors of torch (which it needs itself)."""

    def load(self, options: Mapping[str, Any]) -> Run:
        import logging
        import warnings

        logging.disable(logging.WARNING)  # what optional parts of its packages could not be loaded
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says of itself that it is experimental
            import torch
            from executorch.extension.pybindings import portable_lib
            from executorch.kernels import quantized
        logging.disable(logging.NOTSET)
        assert quantized is not None  # imported for the operators that it registers
        if portable_lib._threadpool_get_thread_count() != options["threads"]:
            portable_lib._unsafe_reset_threadpool(options["threads"])
        program = portable_lib._load_program(str(self.folder / "model.pte"))
        method = program.load_method("forward")

        def run(fed: Sequence[Any]) -> Sequence[Any]:
            given = [torch.from_numpy(np.ascontiguousarray(value)) for value in fed]
            return [value.numpy() for value in method(given)]

        return run
