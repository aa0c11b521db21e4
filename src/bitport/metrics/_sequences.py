"""Word error rate: the edits that turn what was heard into what was said.

    WER = Σ (substitutions + deletions + insertions) / Σ words of the labels      (Levenshtein 1966)

Legend: N samples, T positions, L labels per sample, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitport.errors import MetricError

from ._metric import Metric, Outputs
from ._reading import are_integers, refuse_nan, single

_Words = list[Any]


def word_error_rate(*, blank: int = 0, separator: int | None = None) -> Metric:
    """The metric `wer`: word errors per word of the labels; 0 is perfect, and it may exceed 1.

    Labels are token ids `[N, L]`; negative ones (−100) are padding. Outputs are either token ids `[N, T]`
    (integers, negative ones are padding), compared as they are, or CTC logits `[N, T, V]`, decoded greedily:
    the likeliest token of each position, repeats collapsed, blanks dropped (Graves et al. 2006).

    Args:
        blank: the CTC blank's id.
        separator: the id of the token between words, where tokens are characters. Without it every token is a
            word.
    """

    def collect(outputs: Outputs, labels: Any) -> Tensor:
        return _edits(outputs, labels, blank, separator)

    return Metric("wer", False, dataset=_rate, collect=collect)


def _rate(found: Tensor, _: None) -> float:
    """Word error rate over token ids [N, T], or CTC logits [N, T, V] decoded greedily with blank 0."""
    edits, words = found.sum(0).tolist()
    if words == 0:
        raise MetricError("the labels hold no words")
    return float(edits / words)


def _edits(outputs: Outputs, labels: Any, blank: int, separator: int | None) -> Tensor:
    """(edits, words of the labels) per sample: `[N, 2]`"""
    found, wanted = single(outputs), torch.as_tensor(labels).to("cpu")
    if not are_integers(wanted) or wanted.dim() != 2 or len(wanted) != len(found):
        raise MetricError(
            f"labels are {wanted.dtype} {list(wanted.shape)} for {len(found)} samples: token ids [N, L] were "
            "expected, padded with −100"
        )
    ctc = found.is_floating_point()
    if found.dim() != 3 if ctc else found.dim() != 2:
        raise MetricError(
            f"outputs are {found.dtype} {list(found.shape)}: token ids [N, T] or CTC logits [N, T, V] were expected"
        )
    refuse_nan(found)
    heard = [_collapsed(row, blank) for row in found.argmax(-1).numpy()] if ctc else list(found.numpy())
    pairs = (
        (_words(ours, separator), _words(theirs, separator))
        for ours, theirs in zip(heard, wanted.numpy(), strict=True)
    )
    return torch.tensor(
        [[distance(ours, theirs), len(theirs)] for ours, theirs in pairs], dtype=torch.float64
    )


def _collapsed(tokens: npt.NDArray[Any], blank: int) -> npt.NDArray[Any]:
    """A CTC path as a sequence: repeats first, then blanks, so that "a blank a" stays two."""
    first = np.concatenate([[True], tokens[1:] != tokens[:-1]])[: len(tokens)]
    kept: npt.NDArray[Any] = tokens[first & (tokens != blank)]
    return kept


def _words(tokens: npt.NDArray[Any], separator: int | None) -> _Words:
    kept = [int(token) for token in tokens if token >= 0]
    if separator is None:
        return kept
    words: list[tuple[int, ...]] = []
    start = 0
    for end in [*(i for i, token in enumerate(kept) if token == separator), len(kept)]:
        if end > start:
            words.append(tuple(kept[start:end]))
        start = end + 1
    return words


def distance(found: _Words, wanted: _Words) -> int:
    """The least number of substitutions, deletions and insertions between two sequences."""
    numbers = {word: i for i, word in enumerate(dict.fromkeys([*found, *wanted]))}
    ours = np.array([numbers[word] for word in found], np.int64)
    steps = np.arange(len(ours) + 1)
    row = steps.copy()
    for count, word in enumerate(wanted, 1):
        best = np.concatenate([[count], np.minimum(row[1:] + 1, row[:-1] + (ours != numbers[word]))])
        # an insertion costs one per position: a running minimum once the positions are taken off
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])
