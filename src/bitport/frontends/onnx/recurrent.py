"""RNN, GRU and LSTM: torch's layers where they compute the same, a loop over the steps otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._calls import Array, Call, Value, operator, tensor

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
ORDER = {"RNN": [0], "GRU": [1, 0, 2], "LSTM": [0, 2, 3, 1]}  # torch's gates, by their place in ONNX
ACTIVATIONS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
LAYERS: dict[str, type[nn.RNNBase]] = {"RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}
FUNCTIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}
# inputs: X, W, R, B, sequence_lens, initial_h, initial_c, P
LENGTHS, HIDDEN, CELL, PEEPHOLES = 4, 5, 6, 7


def _directions(call: Call) -> int:
    return 2 if call.attr("direction", "forward") == "bidirectional" else 1


def _activations(call: Call) -> list[str]:
    found = call.attr("activations")
    names = ACTIVATIONS[call.kind] * _directions(call) if found is None else found
    return [name.lower() for name in names]


def _check(call: Call) -> None:
    for name in ("clip", "input_forget", "activation_alpha", "activation_beta"):
        if call.attr(name):
            call.refuse(f"its attribute {name}")
    unknown = set(_activations(call)) - set(FUNCTIONS)
    if unknown:
        call.refuse(f"the activation {min(unknown)}")


def _layer(call: Call, known: Mapping[int, Array]) -> nn.Module | None:
    """torch's layer, where weights are known and everything is as torch has it."""
    _check(call)
    weights, recurrent, biases = known.get(1), known.get(2), known.get(3)
    usual = [name.lower() for name in ACTIVATIONS[call.kind]] * _directions(call)
    relu = call.kind == "RNN" and set(_activations(call)) == {"relu"}
    if weights is None or recurrent is None or not (relu or _activations(call) == usual):
        return None
    if PEEPHOLES in known and bool(np.any(known[PEEPHOLES] != 0)):
        return None
    if call.kind == "GRU" and not call.attr("linear_before_reset", 0):
        return None
    if call.attr("direction", "forward") == "reverse":
        return None
    hidden = recurrent.shape[-1]
    options: dict[str, Any] = {"nonlinearity": "relu"} if relu else {}
    made = LAYERS[call.kind](
        weights.shape[-1], hidden, bias=biases is not None, bidirectional=_directions(call) == 2, **options
    )
    for direction in range(_directions(call)):
        suffix = "_l0_reverse" if direction else "_l0"
        parts = {"weight_ih": weights[direction], "weight_hh": recurrent[direction]}
        if biases is not None:
            half = biases.shape[-1] // 2
            parts |= {"bias_ih": biases[direction][:half], "bias_hh": biases[direction][half:]}
        for name, part in parts.items():
            gates = np.split(part, GATES[call.kind], 0)
            value = np.concatenate([gates[place] for place in ORDER[call.kind]], 0)
            setattr(made, name + suffix, nn.Parameter(torch.from_numpy(value)))
    return Recurrent(call, made)


class Recurrent(nn.Module):
    """torch's layer with ONNX's inputs and outputs."""

    def __init__(self, call: Call, layer: nn.RNNBase) -> None:
        super().__init__()
        self.call, self.layer = call, layer

    def forward(self, *values: Value) -> Any:
        given = [*values, *[None] * (8 - len(values))]
        x = tensor(given[0])
        batched = bool(self.call.attr("layout", 0))
        x = x.transpose(0, 1) if batched else x
        _full_length(self.call, given[LENGTHS], x.shape[0])
        hidden, cell = (_start(given[slot], batched) for slot in (HIDDEN, CELL))
        if self.call.kind == "LSTM":
            zeros = x.new_zeros(_directions(self.call), x.shape[1], self.layer.hidden_size)
            states = (zeros if hidden is None else hidden, zeros if cell is None else cell)
            y, (h, c) = self.layer(x, states if (hidden, cell) != (None, None) else None)
            last: tuple[Tensor, ...] = (h, c)
        else:
            y, h = self.layer(x, hidden)
            last = (h,)
        every = y.reshape(y.shape[0], y.shape[1], _directions(self.call), -1).transpose(1, 2)
        return _told(self.call, every, last)


def _start(value: Value, batched: bool) -> Tensor | None:
    if value is None:
        return None
    return tensor(value).transpose(0, 1) if batched else tensor(value)


def _told(call: Call, every: Tensor, last: tuple[Tensor, ...]) -> Any:
    """Outputs in ONNX's layout. every: [T, D, N, H]; last: [D, N, H] each."""
    if call.attr("layout", 0):
        every, last = every.permute(2, 0, 1, 3), tuple(part.transpose(0, 1) for part in last)
    return (every, *last)[: max(1, call.outputs)] if call.outputs > 1 else every


def _full_length(call: Call, lengths: Value, steps: Any) -> None:
    if lengths is None:
        return
    found = call.ints(lengths, "sequence lengths")
    if any(length != steps for length in found):
        call.refuse("sequences shorter than the longest one")


@operator("LSTM", "GRU", "RNN", layer=_layer)
def recurrent(call: Call, *values: Value) -> Any:
    """Step by step, for the forms that torch's layers don't have; as many steps as the example has."""
    _check(call)
    given = [*values, *[None] * (8 - len(values))]
    x, w, r = (tensor(value) for value in given[:3])
    batched = bool(call.attr("layout", 0))
    x = x.transpose(0, 1) if batched else x
    _full_length(call, given[LENGTHS], x.shape[0])
    hidden, cell = (_start(given[slot], batched) for slot in (HIDDEN, CELL))
    zeros = x.new_zeros(x.shape[1], r.shape[-1])
    every, lasts, cells = [], [], []
    for d in range(_directions(call)):
        turned = call.attr("direction", "forward") == "reverse" or d == 1
        b = x.new_zeros(2 * w.shape[1]) if given[3] is None else tensor(given[3])[d]
        peep = None if given[PEEPHOLES] is None else tensor(given[PEEPHOLES])[d]
        names = _activations(call)[d * len(ACTIVATIONS[call.kind]) :]
        h = zeros if hidden is None else hidden[d]
        c = zeros if cell is None else cell[d]
        outs = []
        for step in reversed(range(x.shape[0])) if turned else range(x.shape[0]):
            h, c = _step(call, x[step], h, c, w[d], r[d], b, peep, names)
            outs.append(h)
        every.append(torch.stack(outs[::-1] if turned else outs))
        lasts.append(h)
        cells.append(c)
    last = (torch.stack(lasts), torch.stack(cells)) if call.kind == "LSTM" else (torch.stack(lasts),)
    return _told(call, torch.stack(every, 1), last)


def _step(
    call: Call, x: Tensor, h: Tensor, c: Tensor, w: Tensor, r: Tensor, b: Tensor, peep: Tensor | None, names: list[str]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wb, rb = b.chunk(2)
    f = [FUNCTIONS[name] for name in names]
    if call.kind == "RNN":
        return f[0](x @ w.T + wb + h @ r.T + rb), c
    if call.kind == "GRU":
        wz, wr, wn = (x @ w.T + wb).chunk(3, -1)
        rz, rr, rn = (h @ r.T + rb).chunk(3, -1)
        z, reset = f[0](wz + rz), f[0](wr + rr)
        if call.attr("linear_before_reset", 0):
            n = f[1](wn + reset * rn)
        else:
            n = f[1](wn + (reset * h) @ r.chunk(3)[2].T + rb.chunk(3)[2])
        return (1 - z) * n + z * h, c
    i, o, g, n = (x @ w.T + wb + h @ r.T + rb).chunk(4, -1)  # input, output, forget, cell
    p = [torch.zeros(())] * 3 if peep is None else peep.chunk(3)
    new = f[0](g + p[2] * c) * c + f[0](i + p[0] * c) * f[1](n)
    return f[0](o + p[1] * new) * f[2](new), new
