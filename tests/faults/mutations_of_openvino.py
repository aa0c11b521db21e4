"""Guards of the OpenVINO target, as `mutations.py` has them."""

from __future__ import annotations

from .mutations import Mutation

_TESTS = "tests/targets/test_openvino_target.py::"

MUTATIONS = (
    Mutation(
        "an input of another shape is refused, which OpenVINO would read as its own",
        "targets/openvino/_target.py",
        '        raise TargetError(f"input {name!r} has shape {value.shape}; the file takes {wanted.to_string()}")\n',
        "        pass\n",
        _TESTS + "test_inputs_of_another_shape",
    ),
    Mutation(
        "a layer whose kernel computes floats is no integer layer",
        "targets/openvino/inspect.py",
        'if info["primitiveType"].endswith("_I8") else kind',
        'if info["runtimePrecision"] in ("u8", "i8") else kind',
        _TESTS + "test_an_integer_layer_that_runs_in_float_is_told",
    ),
    Mutation(
        "a weight that is wide in the file is told",
        "targets/openvino/inspect.py",
        "        if stored > promised:\n",
        "        if False:\n",
        _TESTS + "test_a_weight_that_is_wide_in_the_file_is_told",
    ),
    Mutation(
        "what OpenVINO adds before it rounds isn't planned as rounded",
        "targets/openvino/table.py",
        'fuses=frozenset({"conv"})',
        "fuses=frozenset()",
        _TESTS + "test_the_file_computes_what_it_computes_under_taps",
    ),
    Mutation(
        "grouped convolutions that OpenVINO computes wrongly stay in float",
        "targets/openvino/table.py",
        "WRONG_FROM = 16\n",
        "WRONG_FROM = 10_000\n",
        _TESTS + "test_long_kernels_in_groups_stay_float",
    ),
    Mutation(
        "names in a file don't tell how many operators the process has made",
        "targets/openvino/_target.py",
        '            node.set_friendly_name(f"{kind}_{counts[kind]}")\n',
        "            pass\n",
        _TESTS + "test_files_are_the_same_to_the_byte_and_tell_nothing_of_the_machine",
    ),
    Mutation(
        "a runtime that isn't installed is told before any work",
        "api.py",
        "    runtime.check_installed()\n",
        "",
        "tests/targets/test_every_runtime.py::test_without_the_package",
    ),
    Mutation(
        "what OpenVINO says of a damaged file is told by inspect, too",
        "targets/openvino/_target.py",
        "        with self._reading():\n            written = _core()",
        "        if True:\n            written = _core()",
        _TESTS + "test_a_forged_file_is_refused",
    ),
)
