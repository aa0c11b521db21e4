"""Guards, each with a change that switches it off and the quickest test that has to fail then.

A guard that no test misses is a guard that somebody will remove. `test_mutations.py` applies each change to a copy of
the package; this file only lists them.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """guard: what is switched off. file: below src/bitport. text: occurs there once. test: fails without the guard."""

    guard: str
    file: str
    text: str
    instead: str
    test: str


_CAPTURE = "tests/frontends/test_pytorch.py::"
_STORE = "tests/test_store.py::"
_RECORDS = "tests/test_records.py::"
_FILES = "tests/data/test_files.py::"
_SOURCE = "tests/data/test_source.py::"
_QUANTIZE = "tests/numerics/test_quantize.py::"
_NUMBERS = "tests/faults/test_numbers.py::"
_STRUCTURE = "tests/faults/test_structure.py::"
_RECIPE = "tests/recipe/test_model.py::"
_RUNTIME = "tests/targets/test_onnxruntime_target.py::"
_DECIDE = "tests/plan/test_decide.py::"

MUTATIONS = (
    # ------------------------------------------------------------------------------------- files
    Mutation(
        "pickles may name no other globals than those of tensors",
        "graph/_pt2_scan.py",
        "        if found not in ALLOWED_GLOBALS:\n",
        "        if False:\n",
        _CAPTURE + "test_a_canary_among_the_constants_is_not_executed",
    ),
    Mutation(
        "weights that a file declares to be pickled are looked at",
        "graph/_pt2_scan.py",
        '        elif leaf in pickled or leaf.endswith(".pt"):\n',
        "        elif False:\n",
        _CAPTURE + "test_a_canary_as_pickled_weight_is_not_executed",
    ),
    Mutation(
        "programs call tensor operators only",
        "graph/_pt2_scan.py",
        "    if bad:\n",
        "    if False:\n",
        _CAPTURE + "test_targets_that_are_no_tensor_operators_are_refused",
    ),
    Mutation(
        "size expressions are arithmetic",
        "graph/_pt2_scan.py",
        'if "expr_str" in entry and not is_plain_expression(entry["expr_str"]):',
        "if False:",
        _CAPTURE + "test_size_expressions_and_tree_specs_can_not_execute",
    ),
    Mutation(
        "members of an archive stay inside it",
        "graph/_pt2_scan.py",
        '            or ".." in parts\n',
        "",
        _CAPTURE + "test_archives_that_are_none",
    ),
    Mutation(
        "a .pt2 unpacks to no more than it can hold",
        "graph/_pt2_scan.py",
        "if info.file_size > _SMALL and info.file_size > MAX_RATIO * max(info.compress_size, 1):",
        "if False:",
        _CAPTURE + "test_bombs_are_refused_before_they_unpack",
    ),
    Mutation(
        "compiled code is not read",
        "graph/_pt2_scan.py",
        'elif inner.startswith("data/aotinductor") or leaf.endswith((".so", ".dll", ".dylib", ".cubin")):',
        "elif False:",
        _CAPTURE + "test_archives_that_are_none",
    ),
    Mutation(
        "an .npz holds plain numbers",
        "data/files.py",
        'if dtype.kind not in "biuf":',
        "if False:",
        _FILES + "TestNpz::test_no_pickle_is_executed",
    ),
    Mutation(
        "an .npz unpacks to a bounded size",
        "data/files.py",
        "        if total > limit:\n",
        "        if False:\n",
        _FILES + "TestHostileArchives::test_a_bomb_is_refused_before_it_unpacks",
    ),
    Mutation(
        "an array holds as many bytes as its shape says",
        "data/files.py",
        "if math.prod(shape) * dtype.itemsize != member.file_size - stream.tell():",
        "if False:",
        _FILES + "TestHostileArchives::test_a_shape_that_lies",
    ),
    Mutation(
        "a picture is bounded",
        "data/images.py",
        'warnings.simplefilter("error", Image.DecompressionBombWarning)',
        'warnings.simplefilter("ignore")\n                Image.MAX_IMAGE_PIXELS = None',
        "tests/data/test_images.py::test_a_picture_bomb_is_refused",
    ),
    Mutation(
        "records are bounded in size",
        "records.py",
        "    if len(content) > MAX_BYTES:\n",
        "    if False:\n",
        _RECORDS + "TestReading::test_the_size_is_capped",
    ),
    Mutation(
        "records are bounded in depth",
        "records.py",
        "    if _depth(record) > MAX_DEPTH:\n",
        "    if False:\n",
        _RECORDS + "TestReading::test_hostile_files",
    ),
    Mutation(
        "a record has each key once",
        "records.py",
        "    if len(record) != len(pairs):\n",
        "    if False:\n",
        _RECORDS + "TestReading::test_hostile_files",
    ),
    Mutation(
        "unknown keys of a recipe are refused",
        "recipe/check.py",
        "        if key not in allowed:\n",
        "        if False:\n",
        _RECIPE + "TestParse::test_what_is_wrong_is_named_with_its_path",
    ),
    Mutation(
        "recipes are bounded in size",
        "recipe/model.py",
        "            if len(content) > MAX_BYTES:\n",
        "            if False:\n",
        _RECIPE + "TestOf::test_files_that_cannot_be_read",
    ),
    # ------------------------------------------------------------------------------------- names
    Mutation(
        "paths of this machine leave the records",
        "records.py",
        r'text = re.sub(re.escape(prefix) + r"(?![\w.-])", _MARK, text)',
        "continue",
        _RECORDS + "TestScrub::test_this_machines_folders_go_even_with_spaces",
    ),
    Mutation(
        "names are text in the page",
        "page/page.py",
        "autoescape=True",
        "autoescape=False",
        "tests/test_page.py::test_hostile_names_are_only_text",
    ),
    Mutation(
        "names are text in the picture of the network",
        "page/network.py",
        "from html import escape\n",
        "escape = str\n",
        "tests/test_page_network.py::test_hostile_names_are_escaped_and_short",
    ),
    Mutation(
        "control and bidirectional characters are shown, not obeyed",
        "wording.py",
        'unicodedata.category(c)[0] not in "CZ"',
        "unicodedata",
        "tests/test_wording.py::test_plain_shows_what_would_act",
    ),
    # ------------------------------------------------------------------------------------- weights, numbers
    Mutation(
        "NaN and infinite weights are refused when loading",
        "graph/weights.py",
        "        if nans or finite:\n",
        "        if False:\n",
        _CAPTURE + "test_bad_weights_are_named_and_counted",
    ),
    Mutation(
        "complex weights are refused",
        "graph/weights.py",
        "        if tensor.is_complex():\n",
        "        if False:\n",
        _STRUCTURE + "test_complex_weights_and_inputs_are_refused",
    ),
    Mutation(
        "weights that were set to zero are named",
        "graph/weights.py",
        "            said.append(\n",
        "            str(\n",
        _NUMBERS + "test_nonfinite_weights_become_zero_where_that_is_asked_for",
    ),
    Mutation(
        "statistics are never set to zero",
        "graph/weights.py",
        "or not tensor.is_floating_point() or _is_statistic(name):",
        "or not tensor.is_floating_point():",
        _NUMBERS + "test_statistics_are_not_set_to_zero",
    ),
    Mutation(
        "weights are looked at again when compressing",
        "api.py",
        "    check_weights(graph.gm)  # they may",
        "    # they may",
        "tests/test_bad_input.py::test_weights_that_went_bad_after_loading_are_named",
    ),
    Mutation(
        "networks of other precisions are refused",
        "api.py",
        "        if dtype.is_floating_point and dtype != torch.float32:\n",
        "        if False:\n",
        _STRUCTURE + "test_other_precisions_are_refused_with_the_remedy",
    ),
    Mutation(
        "a range of zeros has the scale 1",
        "numerics/quantize.py",
        "    scale = torch.where(step == 0, torch.ones_like(scale), scale)\n",
        "",
        _QUANTIZE + "test_qparams_examples",
    ),
    Mutation(
        "ranges include 0",
        "numerics/quantize.py",
        "    lower, upper = lower.clamp(max=0.0), upper.clamp(min=0.0)\n",
        "",
        _QUANTIZE + "test_qparams_examples",
    ),
    Mutation(
        "scales have a ceiling",
        "numerics/quantize.py",
        "step.clamp(SMALLEST_SCALE, largest).float()",
        "step.clamp(min=SMALLEST_SCALE).float()",
        _QUANTIZE + "test_huge_ranges_are_clipped_on_both_sides_alike",
    ),
    Mutation(
        "scales have a floor",
        "numerics/quantize.py",
        "step.clamp(SMALLEST_SCALE, largest).float()",
        "step.clamp(max=largest).float()",
        "tests/faults/test_guards.py::test_scales_of_the_smallest_ranges_have_a_floor",
    ),
    Mutation(
        "ranges are finite and in order",
        "numerics/quantize.py",
        "if not bool((torch.isfinite(lower) & torch.isfinite(upper) & (lower <= upper)).all()):",
        "if False:",
        _QUANTIZE + "test_qparams_refuse_what_has_no_answer",
    ),
    Mutation(
        "a bias leaves room for its sums",
        "numerics/quantize.py",
        "largest = _INT32_MAX - min(sums, 2**30)",
        "largest = _INT32_MAX",
        _NUMBERS + "test_a_bias_leaves_room_for_the_sums_that_it_is_added_to",
    ),
    Mutation(
        "a large bias raises the weight's scale",
        "steps/calibrate.py",
        "raised = raise_weight_scale_for_bias(graph.tensor(edge.producer).detach(), x_scale, w_scale, sums)",
        "raised = w_scale",
        "tests/steps/test_steps.py::test_a_large_bias_on_tiny_weights_raises_the_weights_scale",
    ),
    Mutation(
        "variances are positive",
        "numerics/fold.py",
        "    if bool(wrong.any()):\n",
        "    if False:\n",
        "tests/numerics/test_fold.py::test_variance_that_is_not_positive_is_refused",
    ),
    Mutation(
        "sums fit the 32-bit accumulator",
        "targets/onnxruntime/table.py",
        "if terms * LARGEST_ACTIVATION * LARGEST_WEIGHT > INT32_LIMIT:",
        "if False:",
        _RUNTIME + "test_too_long_sums_stay_float",
    ),
    Mutation(
        "weights have 7 bits where pairs of products saturate",
        "targets/onnxruntime/table.py",
        "weight_limit=None if has_integer_dot_product() else 63",
        "weight_limit=None",
        _RUNTIME + "test_weights_are_narrow_where_products_could_saturate",
    ),
    Mutation(
        "a tied weight is rounded for one reader only where it has one",
        "plan/constants.py",
        "        if all(_same_grid(ties[0], other) for other in ties[1:]):\n",
        "        if True:\n",
        _STRUCTURE + "test_a_tied_table_is_stored_once_where_its_readers_want_the_same",
    ),
    Mutation(
        "an override matches something",
        "plan/options.py",
        "        if not hits:\n",
        "        if False:\n",
        _DECIDE + "test_an_override_that_matches_nothing_is_refused",
    ),
    Mutation(
        "formats are those that the runtime holds",
        "rules.py",
        "        held = self.dynamic if dynamic and self.dynamic else self.activations\n"
        "        objection = held.objection(fmt)\n",
        "        objection = None\n",
        _DECIDE + "test_formats_that_the_target_can_not_hold_are_refused",
    ),
    # ------------------------------------------------------------------------------------- data
    Mutation(
        "one-shot iterators are refused",
        "data/source.py",
        "    if isinstance(data, Iterator):\n",
        "    if False:\n",
        _SOURCE + "TestReading::test_a_one_shot_iterator_is_refused_with_the_remedy",
    ),
    Mutation(
        "a loader that hangs is ended",
        "data/patience.py",
        "signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)",
        "self._held = True",
        "tests/data/test_patience.py::test_opening_may_hang_too",
    ),
    Mutation(
        "a slow loader is told",
        "data/patience.py",
        "if waited >= TOLD_SECONDS and told != self._since:",
        "if False:",
        "tests/data/test_patience.py::test_a_slow_loader_is_told_once_and_goes_on",
    ),
    Mutation(
        "data on another scale than the example is told",
        "proof/doubts.py",
        "if ours >= OTHER_SCALE * theirs or theirs >= OTHER_SCALE * ours:",
        "if False:",
        _STRUCTURE + "test_data_on_another_scale_than_the_example_is_told",
    ),
    Mutation(
        "an agreement that says little is told",
        "proof/doubts.py",
        'if metric != "agreement" or samples < ENOUGH_TO_TELL or len(classes) != 1:',
        "if True:",
        _STRUCTURE + "test_one_class_for_everything_is_told_where_agreement_is_all_there_is",
    ),
    Mutation(
        "NaN is refused in evaluation data",
        "data/source.py",
        'if bad and self.role != "calibration":',
        "if False:",
        _SOURCE + "TestFaults::test_nan_is_counted_and_refused",
    ),
    Mutation(
        "few batches only may be dropped",
        "data/source.py",
        "if dropped > MAX_DROPPED_SHARE * (index + 1):",
        "if False:",
        _SOURCE + "TestFaults::test_a_rare_nan_batch_is_left_out_of_calibration",
    ),
    Mutation(
        "a batch with NaN activations is left out",
        "steps/calibrate.py",
        "            if spoilt:\n                dropped.append((read, spoilt[0]))\n            else:\n",
        "            if spoilt:\n                dropped.append((read, spoilt[0]))\n            if True:\n",
        _NUMBERS + "test_a_batch_with_nan_activations_is_dropped_whole_and_counted",
    ),
    Mutation(
        "few batches only may have NaN activations",
        "steps/calibrate.py",
        "    if len(dropped) > MANY_BAD * read:\n",
        "    if False:\n",
        _NUMBERS + "test_more_than_a_hundredth_of_such_batches_is_an_error",
    ),
    Mutation(
        "a failed gate is an error",
        "api.py",
        '    if record["verdict"]["passed"]:\n        return Artifact(place)\n',
        "    if True:\n        return Artifact(place)\n",
        "tests/test_contract.py::test_a_failed_gate_without_an_earlier_result_makes_no_folder",
    ),
    Mutation(
        "a failed result is not published",
        "api.py",
        '        if record["verdict"]["passed"]:\n            place = workspace.publish()\n',
        "        if True:\n            place = workspace.publish()\n",
        "tests/test_contract.py::test_a_failed_gate_without_an_earlier_result_makes_no_folder",
    ),
    Mutation(
        "weights beside a model file are found",
        "targets/onnxruntime/_target.py",
        "            options.add_session_config_entry(WEIGHTS_FOLDER, str(folder))\n",
        "",
        "tests/targets/onnxruntime/test_external_data.py::"
        "test_every_stage_finds_weights_that_lie_beside_the_file",
    ),
    # ------------------------------------------------------------------------------------- folders, runs
    Mutation(
        "files are held against the manifest",
        "store.py",
        "    if any(faults.values()):\n",
        "    if False:\n",
        _STORE + "TestManifest::test_each_fault_is_named",
    ),
    Mutation(
        "links in an artifact are refused",
        "store.py",
        "                elif not stat.S_ISDIR(mode):\n",
        "                elif False:\n",
        _STORE + "TestManifest::test_links_are_refused",
    ),
    Mutation(
        "an artifact is checked when it is opened",
        "artifact.py",
        "        store.verify_manifest(path)\n",
        "",
        "tests/test_artifact.py::test_a_changed_file_is_named",
    ),
    Mutation(
        "two runs don't share a folder",
        "store.py",
        "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        _STORE + "TestLock::test_twice_in_one_process",
    ),
    Mutation(
        "a lock that is a link is not followed",
        "store.py",
        "os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC",
        "os.O_RDWR | os.O_CREAT | os.O_CLOEXEC",
        _STORE + "TestProtection::test_a_lock_that_is_a_link_is_not_followed",
    ),
    Mutation(
        "another program's lock file stays",
        "store.py",
        "if content and not (content.startswith(_LOCK_START) or _LOCK_START.startswith(content)):",
        "if False:",
        _STORE + "TestProtection::test_a_file_that_is_called_like_the_lock",
    ),
    Mutation(
        "strange files are not deleted with an artifact",
        "store.py",
        "    if strangers:\n",
        "    if False:\n",
        _STORE + "TestProtection::test_strange_files_in_an_artifact_are_not_deleted_with_it",
    ),
    Mutation(
        "a folder that came in between is not replaced",
        "store.py",
        "            _refuse_foreign(place)\n            flush(self.path)\n",
        "            flush(self.path)\n",
        _STORE + "TestProtection::test_a_folder_that_came_in_between_is_not_touched_either",
    ),
    Mutation(
        "everything is on the disk before it is published",
        "store.py",
        "            flush(self.path)\n",
        "",
        _STORE + "TestPublish::test_everything_is_flushed_before_the_exchange",
    ),
    Mutation(
        "the exchange is one step",
        "store.py",
        "_AT_FDCWD, _RENAME_EXCHANGE = -100, 2",
        "_AT_FDCWD, _RENAME_EXCHANGE = -100, 64",
        "tests/test_store_killed.py::test_the_exchange_is_one_step",
    ),
    Mutation(
        "room is asked for first",
        "store.py",
        "if self._need_bytes is not None and free < self._need_bytes:",
        "if False:",
        _STORE + "TestDisk::test_room_is_asked_for_first",
    ),
    Mutation(
        "a checkpoint of another run is refused",
        "checkpoint.py",
        "        if differing:\n",
        "        if False:\n",
        "tests/faults/test_resume.py::test_changed_weights_and_versions_are_refused",
    ),
    Mutation(
        "a checkpoint that is a link is not followed",
        "checkpoint.py",
        "        if self.place.is_symlink():\n",
        "        if False:\n",
        "tests/faults/test_resume.py::test_a_link_is_not_followed",
    ),
)
