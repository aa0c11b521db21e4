"""Guards of the Keras and TensorFlow front ends, as `mutations.py` has them."""

from __future__ import annotations

from .mutations import Mutation

_KERAS = "frontends/keras/_archive.py"
_ARCHIVE = "tests/frontends/keras/test_archive.py::"
_NETWORKS = "tests/frontends/tensorflow/test_networks.py::"

MUTATIONS = (
    Mutation(
        "a layer that holds code isn't loaded",
        _KERAS,
        "        if name in RUN_CODE:\n",
        "        if False:\n",
        _ARCHIVE + "test_code_and_foreign_classes_are_refused",
    ),
    Mutation(
        "a class that Keras doesn't bring isn't imported",
        _KERAS,
        "        if not plain or not own or registered not in (None, name):\n",
        "        if False:\n",
        _ARCHIVE + "test_code_and_foreign_classes_are_refused",
    ),
    Mutation(
        "a layer that reads files isn't loaded",
        _KERAS,
        "        if name in READ_FILES:\n",
        "        if False:\n",
        _ARCHIVE + "test_code_and_foreign_classes_are_refused",
    ),
    Mutation(
        "a member of a .keras file is one that Keras writes",
        _KERAS,
        "        if name not in (CONFIG, WEIGHTS, METADATA) or name in sizes:\n",
        "        if False:\n",
        _ARCHIVE + "test_odd_archives_are_told",
    ),
    Mutation(
        "a .keras file doesn't unpack to far more than it holds",
        _KERAS,
        "        if info.file_size > most or info.file_size > max(SMALL, RATIO * info.compress_size):\n",
        "        if False:\n",
        _ARCHIVE + "test_a_bomb_is_not_unpacked",
    ),
    Mutation(
        "weights of Keras lie in their own file",
        _KERAS,
        "            if not isinstance(link, h5py.HardLink) or seen > 10**6:\n",
        "            if False:\n",
        _ARCHIVE + "test_weights_that_lie_elsewhere_are_refused",
    ),
    Mutation(
        "weights of Keras aren't read from another file",
        _KERAS,
        "            if item.external or item.is_virtual:\n",
        "            if False:\n",
        _ARCHIVE + "test_weights_that_lie_elsewhere_are_refused",
    ),
    Mutation(
        "no link in a SavedModel is followed",
        "frontends/tensorflow/__init__.py",
        "        if place.is_symlink():\n",
        "        if False:\n",
        _NETWORKS + "test_links_in_a_folder_are_told",
    ),
    Mutation(
        "what doesn't bear the mark of a .tflite isn't handed to TensorFlow",
        "frontends/tensorflow/__init__.py",
        "    if head[4:8] != TFLITE or size > LARGEST_TFLITE:\n",
        "    if False:\n",
        _NETWORKS + "test_what_is_no_tflite_file_is_told",
    ),
)
