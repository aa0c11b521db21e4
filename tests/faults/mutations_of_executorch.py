"""Guards of the ExecuTorch target, as `mutations.py` has them."""

from __future__ import annotations

from .mutations import Mutation

_TESTS = "tests/targets/test_executorch_target.py::"

MUTATIONS = (
    Mutation(
        "an input is handed to ExecuTorch by its memory, in order",
        "targets/executorch/_target.py",
        "    return value.detach().clone(memory_format=torch.contiguous_format)\n",
        "    return value.detach()\n",
        _TESTS + "test_an_input_is_read_by_its_memory",
    ),
    Mutation(
        "an input of another shape is refused before ExecuTorch reads it",
        "targets/executorch/_target.py",
        "    if not fits:\n",
        "    if False:\n",
        _TESTS + "test_inputs_of_another_shape",
    ),
    Mutation(
        "a file that this process didn't write is tried in another",
        "targets/_trial.py",
        "    if digest in _known:\n",
        "    if True:\n",
        "tests/targets/test_trial.py::test_once_for_the_same_bytes",
    ),
    Mutation(
        "a .pte from elsewhere is tried before ExecuTorch reads it",
        "targets/executorch/_target.py",
        '        _trial.tried(path, PROBE, {}, "ExecuTorch")\n',
        "",
        "tests/targets/test_trial.py::test_a_file_that_ends_the_process_ends_another_one",
    ),
    Mutation(
        "what a .pte doesn't tell of itself isn't looked up",
        "targets/executorch/_target.py",
        '    if not whole or not all(map(_is_input, note["inputs"])):\n',
        "    if False:\n",
        _TESTS + "test_a_note_that_bitport_did_not_write",
    ),
    Mutation(
        "integers narrower than 8 bits are clamped, which XNNPACK would leave out",
        "targets/executorch/decomposed.py",
        "        if (low, high) == (LOW, HIGH):\n",
        "        if True:\n",
        _TESTS + "test_narrow_formats_are_carried_in_8_bits",
    ),
    Mutation(
        "an operator that computes floats in a delegate is no integer operator",
        "targets/executorch/inspect.py",
        '    return f"{kind} {precision}"\n',
        '    return f"{kind} {STATIC}"\n',
        _TESTS + "test_an_integer_layer_that_runs_in_float_is_told",
    ),
    Mutation(
        "the pool of threads isn't taken from under a network that is loaded",
        "targets/executorch/_target.py",
        "    if len(_sessions):\n",
        "    if False:\n",
        _TESTS + "test_one_pool_of_threads_for_the_process",
    ),
    Mutation(
        "the largest biases don't wrap when the exporter rounds them",
        "targets/executorch/arithmetic.py",
        ".clamp(-limit, limit)",
        "",
        _TESTS + "test_the_largest_biases_do_not_wrap",
    ),
)
