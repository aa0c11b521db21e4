"""Guards of the LiteRT target, as `mutations.py` has them."""

from __future__ import annotations

from .mutations import Mutation

_READING = "targets/litert/reading.py"
_FILES = "tests/targets/test_litert_files.py::test_parts_that_do_not_belong_together"
_TESTS = "tests/targets/test_litert_target.py::"

MUTATIONS = (
    Mutation(
        "a tensor of a .tflite has as many numbers as its shape says",
        _READING,
        "    if data is not None and len(data) != size:\n",
        "    if False:\n",
        _FILES,
    ),
    Mutation(
        "a tensor of a .tflite is no larger than LiteRT can count",
        _READING,
        "    if size > LARGEST:\n",
        "    if False:\n",
        _FILES,
    ),
    Mutation(
        "an operator of a .tflite reads tensors that are there",
        _READING,
        "                if not -1 <= index < count:\n",
        "                if False:\n",
        _FILES,
    ),
    Mutation(
        "zero points of a .tflite are integers of their type",
        _READING,
        "    if not all(low <= zero <= high for zero in zeros):\n",
        "    if False:\n",
        _FILES,
    ),
    Mutation(
        "an operator that only moves numbers gives as many as it takes",
        _READING,
        "            if math.prod(_list(taken.shape)) != math.prod(_list(given.shape)):\n",
        "            if False:\n",
        _FILES,
    ),
    Mutation(
        "a .tflite from elsewhere is tried before LiteRT reads it",
        "targets/litert/_target.py",
        '        _trial.tried(folder / self.model_file, PROBE, {"kernels": self.options["kernels"]}, "LiteRT")\n',
        "",
        "tests/targets/test_trial.py::test_a_file_that_ends_the_process_ends_another_one",
    ),
    Mutation(
        "an input of another shape is refused before LiteRT reads it",
        "targets/litert/_target.py",
        "        size not in (-1, given) for size, given in zip(wanted, value.shape, strict=True)\n",
        "        False for size, given in zip(wanted, value.shape, strict=True)\n",
        _TESTS + "test_a_shape_or_type_that_it_does_not_take",
    ),
    Mutation(
        "an operator that LiteRT runs in floats is no integer operator",
        "targets/litert/inspect.py",
        "        if wanted not in ran:\n",
        "        if False:\n",
        _TESTS + "test_an_integer_layer_that_runs_in_float_is_told",
    ),
    Mutation(
        "a weight that is wide in a .tflite is told",
        "targets/litert/inspect.py",
        "        if stored > promised:\n",
        "        if False:\n",
        _TESTS + "test_a_weight_that_is_wide_in_the_file_is_told",
    ),
    Mutation(
        "numbers of a type that LiteRT hasn't are refused by name",
        "targets/litert/_build.py",
        "    if dtype not in TYPES:\n",
        "    if False:\n",
        _TESTS + "test_what_it_would_compute_wrongly_is_refused",
    ),
    Mutation(
        "weights that another runtime has no kernels for are refused by name",
        "plan/retarget.py",
        "        if why is not None:\n",
        "        if False:\n",
        "tests/targets/test_every_runtime.py::test_weights_that_another_runtime_has_no_kernels_for_are_named",
    ),
)
