"""Guards of ONNX files, read in or run, as `mutations.py` has them."""

from __future__ import annotations

from .mutations import Mutation

_FILE = "frontends/onnx/_external.py"
_READER = "frontends/onnx/_reading.py"
_READING = "tests/frontends/onnx/test_reading.py::"
_FORGED = "tests/targets/onnxruntime/test_forged.py::"

MUTATIONS = (
    Mutation(
        "external data of an ONNX file lies under a plain path",
        _FILE,
        '    if odd or any(part in ("..", ".") for part in parts):\n',
        "    if False:\n",
        _READING + "test_external_data_elsewhere_is_refused",
    ),
    Mutation(
        "no link to external data is followed",
        _FILE,
        'getattr(os, "O_NOFOLLOW", 0) |',
        "0 |",
        _READING + "test_links_and_what_is_no_file_are_refused",
    ),
    Mutation(
        "a file of external data has one name",
        _FILE,
        " or found.st_nlink > 1:",
        ":",
        _READING + "test_links_and_what_is_no_file_are_refused",
    ),
    Mutation(
        "external data is as long as its tensor says",
        _FILE,
        "        if offset + length > found.st_size:\n",
        "        if False:\n",
        _READING + "test_external_data_that_does_not_fit_is_refused",
    ),
    Mutation(
        "external data has the keys of ONNX alone",
        _FILE,
        "        if entry.key not in KEYS or entry.key in told:\n",
        "        if False:\n",
        _READING + "test_external_data_that_does_not_fit_is_refused",
    ),
    Mutation(
        "a tensor has as many bytes as its shape takes",
        _READER,
        'tensor.HasField("raw_data") and len(tensor.raw_data) != count * size:',
        "False:",
        _READING + "test_damage_is_told_by_the_tensor",
    ),
    Mutation(
        "a node reads only what is there before it",
        _READER,
        "        if missing:\n",
        "        if False:\n",
        _READING + "test_graphs_that_are_none",
    ),
    Mutation(
        "names of a model file are text",
        "targets/onnxruntime/inspect.py",
        "        if not isinstance(name, str):",
        "        if False:",
        _FORGED + "test_a_name_that_is_no_text",
    ),
    Mutation(
        "integer ends of a model file are described whole",
        "targets/onnxruntime/ends.py",
        "        if not isinstance(end, dict) or {key: type(value) for key, value in end.items()} != FIELDS:\n",
        "        if False:\n",
        _FORGED + "test_metadata_of_ends",
    ),
    Mutation(
        "notes of a model file about its weights are shapes",
        "targets/onnxruntime/inspect.py",
        '        if not all(isinstance(note, dict) and _is_shape(note.get("shape")) for note in notes.values()):\n',
        "        if False:\n",
        _FORGED + "test_metadata_of_weights",
    ),
)
