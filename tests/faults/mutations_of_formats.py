"""Guards of formats, of memory, and of what people type and hand over (see mutations.py)."""

from __future__ import annotations

from tests.faults.mutations import Mutation

_HOSTILE = "tests/faults/test_hostile.py::"

MUTATIONS = (
    # ------------------------------------------------------------------------------------- formats
    Mutation(
        "a result far from plain rounding is not published",
        "proof/plain.py",
        "    return found >= wanted - max(ALLOWED_DB, ALLOWED_SHARE * wanted)\n",
        "    return True\n",
        "tests/proof/test_plain.py::test_broken_parameters_are_noticed",
    ),
    Mutation(
        "outputs that are no numbers are further than any",
        "proof/plain.py",
        "        return math.isnan(plain)\n",
        "        return True\n",
        "tests/proof/test_plain.py::test_results_that_are_no_numbers_are_noticed",
    ),
    Mutation(
        "scales of packed weights fit their shape and type",
        "plan/packed.py",
        "    if stored.dtype != dtype or tuple(stored.shape) != wanted:\n",
        "    if False:\n",
        "tests/plan/test_packed.py::test_forged_tensors_are_refused",
    ),
    Mutation(
        "scales of packed weights are positive numbers",
        "plan/packed.py",
        "    if not bool((torch.isfinite(scale) & (scale > 0)).all()):\n",
        "    if False:\n",
        "tests/plan/test_packed.py::test_forged_tensors_are_refused",
    ),
    Mutation(
        "zero points of a plan are codes",
        "plan/model.py",
        "        if not bool(((tie.zero_point >= tie.format.low) & (tie.zero_point <= tie.format.high)).all()):\n",
        "        if False:\n",
        "tests/plan/test_model.py::test_forged_arrays_are_refused",
    ),
    Mutation(
        "statistics are pairs of finite moments",
        "artifact.py",
        "if mean is None or deviation is None or not _are_moments(mean, deviation):",
        "if mean is None or deviation is None:",
        "tests/test_recover.py::test_malformed_statistics_are_refused",
    ),
    Mutation(
        "nothing is corrected that two layers share",
        "recover.py",
        "    if weight is None or weight.tensor is None or _shared(graph, weight.tensor):\n",
        "    if weight is None or weight.tensor is None:\n",
        "tests/test_recover.py::test_a_tied_weight_is_left_as_it_is",
    ),
    Mutation(
        "products with small floats are no integer products",
        "proof/integer.py",
        "return all(fmt.is_int for fmt in stored) and (",
        "return (",
        "tests/proof/test_integer.py::test_a_product_counts_only_where_both_operands_are_integers",
    ),
    Mutation(
        "what is lost beside an outlier is told",
        "steps/quantize.py",
        "    if found.lost:\n",
        "    if False:\n",
        "tests/faults/test_odd_formats.py::test_an_outlier_is_told_in_every_format",
    ),
    Mutation(
        "a scale raised for a bias is one that its type stores",
        "steps/calibrate.py",
        "            raised = stored(raised, weight.format.scale, up=True)\n",
        "",
        "tests/faults/test_odd_formats.py::test_a_scale_that_is_raised_for_its_bias_can_still_be_stored",
    ),
    Mutation(
        "float16 keeps the scales that it can",
        "numerics/scales.py",
        "if least < _SMALLEST_FLOAT16 or top > largest_number(layout(Format.parse(name))):",
        "if False:",
        "tests/faults/test_odd_formats.py::test_scales_beyond_float16_are_refused_by_name",
    ),
    Mutation(
        "ranges taken while running are those of the runtime's operator",
        "targets/onnxruntime/table.py",
        '        dynamic=Holds(exact=("int8",)),',
        "        dynamic=None,",
        "tests/faults/test_odd_formats.py::test_what_the_runtime_can_not_hold_is_refused_with_what_it_can",
    ),
    Mutation(
        "a weight of several grids is rounded on none",
        "plan/constants.py",
        "        if all(_same_grid(ties[0], other) for other in ties[1:]):\n",
        "        if True:\n",
        "tests/plan/test_modes.py::test_a_weight_that_two_layers_share_has_a_grid_for_each_that_differs",
    ),
    # ------------------------------------------------------------------------------------- GPTQ
    Mutation(
        "a row that plain rounding serves better keeps it",
        "numerics/gptq.py",
        "    wins = other.loss < best.loss\n",
        "    wins = torch.ones_like(other.loss, dtype=torch.bool)\n",
        "tests/numerics/test_gptq.py::test_no_row_is_worse_than_plain_rounding",
    ),
    Mutation(
        "a result of GPTQ that is worse is not kept",
        "steps/gptq.py",
        "        if after < best:\n",
        "        if True:\n",
        "tests/steps/test_gptq.py::test_a_result_that_is_worse_is_left_out",
    ),
    Mutation(
        "a Hessian that isn't definite is damped more",
        "numerics/hessian.py",
        "LADDER = (1.0, 10.0, 100.0)",
        "LADDER = (0.0,)",
        "tests/numerics/test_hessian.py::test_a_damped_hessian_is_definite",
    ),
    Mutation(
        "a bias keeps the scales that it needs",
        "steps/gptq.py",
        "        return None if bool((raised <= 2.0**-100).all()) else by_rows(raised, rows)\n",
        "        return None\n",
        "tests/steps/test_gptq.py::test_a_bias_that_needs_coarse_scales_keeps_them",
    ),
    Mutation(
        "a block that was learned to no gain stays as it was",
        "steps/reconstruct.py",
        "            if not bool(torch.isfinite(loss.detach())):\n",
        "            if False:\n",
        "tests/steps/test_reconstruct.py::test_a_block_that_diverges_stays_as_it_was",
    ),
    Mutation(
        "what was learned is kept only where GPTQ is further",
        "steps/reconstruct.py",
        "    return learned if kept else solved\n",
        "    return learned\n",
        "tests/steps/test_reconstruct.py::test_the_better_of_it_and_gptq_is_kept",
    ),
    # ------------------------------------------------------------------------------------- words, callables
    Mutation(
        "a limit of loss is a number that a report can hold",
        "api.py",
        "if max_drop is not None and not 0 <= max_drop <= LARGEST_DROP:",
        "if max_drop is not None and not 0 <= max_drop:",
        _HOSTILE + "test_callables_and_words_that_misbehave",
    ),
    Mutation(
        "a metric's output is one of the network's",
        "metrics/__init__.py",
        "            if outputs and output not in outputs:\n",
        "            if False:\n",
        _HOSTILE + "test_the_outputs_of_a_metric_are_the_network_s",
    ),
    Mutation(
        "an example holds a sample",
        "frontends/pytorch.py",
        "        if size == 0:\n",
        "        if False:\n",
        _HOSTILE + "test_an_example_without_a_sample_is_refused",
    ),
    Mutation(
        "data whose callable leaves the program doesn't end the command",
        "data/source.py",
        "                except (Exception, SystemExit) as error:\n                    raise DataError(\n",
        "                except (RuntimeError, ValueError) as error:\n                    raise DataError(\n",
        _HOSTILE + "test_callables_and_words_that_misbehave",
    ),
    # ------------------------------------------------------------------------------------- golden samples
    Mutation(
        "a golden sample has every input and output",
        "artifact.py",
        "    if name not in arrays:\n",
        "    if False:\n",
        _HOSTILE + "test_a_golden_sample_that_is_not_the_network_s",
    ),
    Mutation(
        "a golden sample fits the network's inputs",
        "artifact.py",
        "        return tuple(check_inputs(found, graph.inputs))\n",
        "        return tuple(found)\n",
        _HOSTILE + "test_a_golden_sample_that_is_not_the_network_s",
    ),
    # ------------------------------------------------------------------------------------- memory
    Mutation(
        "memory is asked for before any work",
        "api.py",
        "        preflight.ask(graph, first.inputs)\n",
        "",
        "tests/faults/test_operations.py::test_too_little_memory_is_one_line_and_the_artifact_stays",
    ),
    Mutation(
        "the limit of the control group counts",
        "proof/preflight.py",
        '    found += [(left, "the control group\'s limit") for left in _groups(proc, groups)]\n',
        "",
        "tests/proof/test_preflight.py::test_what_is_left_is_the_least_of_machine_group_and_limit",
    ),
    # ------------------------------------------------------------------------------------- moved scales
    Mutation(
        "scales move out of a layer only if its weights are its own",
        "graph/pairs.py",
        "    if uses[id(graph.tensor(tensor))] != 1:\n",
        "    if False:\n",
        "tests/graph/test_pairs.py::test_tied_parameters_are_left_alone",
    ),
    Mutation(
        "scales that change the float function are left out",
        "steps/equalize.py",
        "    if not change <= SAME:\n",
        "    if False:\n",
        "tests/steps/test_equalize.py::test_a_change_of_the_float_function_is_refused",
    ),
    Mutation(
        "scales that don't help are left out",
        "steps/equalize.py",
        "    if not after < before and before < WORTHLESS:\n",
        "    if False:\n",
        "tests/steps/test_equalize.py::test_a_candidate_that_errs_more_leaves_nothing_behind",
    ),
    Mutation(
        "the proof looks at the weights behind moved scales",
        "plan/rescaled.py",
        "    if not plan.rescaled and not plan.low_rank:\n",
        "    if True:\n",
        "tests/plan/test_rescaled.py::test_the_counterpart_computes_the_same_through_other_weights",
    ),
    Mutation(
        "scales of a plan are finite and positive",
        "plan/model.py",
        "    if scales.dim() != 1 or not bool((torch.isfinite(scales) & (scales > 0)).all()):\n",
        "    if False:\n",
        "tests/plan/test_rescaled.py::test_forged_scales_are_refused",
    ),
    Mutation(
        "a product that doesn't help is left out",
        "steps/low_rank.py",
        "        if errors[how] < best:\n",
        "        if True:\n",
        "tests/steps/test_low_rank.py::test_a_product_that_errs_more_leaves_nothing_behind",
    ),
    Mutation(
        "the proof's float network has nothing beside its layers",
        "plan/rescaled.py",
        "    return torch.zeros(rank, inputs), torch.zeros(outputs, rank)\n",
        "    return torch.ones(rank, inputs), torch.ones(outputs, rank)\n",
        "tests/plan/test_rescaled.py::test_the_counterpart_has_what_stands_beside_layers_as_zeros",
    ),
)
