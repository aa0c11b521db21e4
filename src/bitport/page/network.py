"""The network as a picture: boxes coloured by precision, drawn as plain SVG that style sheet and script share.

Operators that are part of another's kernel are drawn with it. A network of many operators is drawn as its modules;
each kind of module is then drawn once by itself, beside the names of those built alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any, Literal

from markupsafe import Markup

from .. import wording
from .layout import Column, columns

MOST_BOXES = 70
MOST_MODULES = 48
_MOVES_SHOWN = 40  # in larger networks a reshape is drawn with the operator before it
_LONGEST = 12
_BYTES = 300_000  # of drawings of single modules; plotly leaves little more of the page's 6 MB
_WIDTH, _HEIGHT, _GAP, _PITCH, _MARGIN = 148, 40, 16, 70, 14
_LETTERS = 19

Shade = Literal["int", "wide", "stored", "float", "other", "io"]
_SHADES: Mapping[Shade, str] = {
    "int": "integers of at most 8 bits",
    "wide": "wider integers",
    "stored": "narrow weights, computed in float",
    "float": "float",
    "other": "indices and masks",
    "io": "inputs and outputs",
}


@dataclass
class Box:
    """What is drawn as one box: an operator with those folded into it, or a module of several boxes. `label` is
    shown where the name would say nothing."""

    name: str
    nodes: list[Mapping[str, Any]]
    label: str = ""
    boxes: list[Box] = field(default_factory=list)

    @property
    def head(self) -> Mapping[str, Any]:
        return self.nodes[0]


Links = list[tuple[int, int]]


@dataclass(frozen=True)
class Module:
    """A module drawn by itself: its name, others built alike, its drawing."""

    name: str
    alike: int
    drawing: Markup


@dataclass(frozen=True)
class Picture:
    """`legend`: (shade, words, number of operators, not counting those that only move numbers where others work
    alike). `left_out`: modules that are not drawn by themselves."""

    drawing: Markup
    legend: list[tuple[str, str, int]]
    modules: list[Module]
    left_out: int
    operators: int


def picture(network: object) -> Picture | None:
    """Draw the `network` section of a record; None where there is none."""
    if not isinstance(network, Mapping) or not network.get("nodes"):
        return None
    nodes = network["nodes"]
    links = [(int(a), int(b)) for a, b in network.get("edges") or () if 0 <= int(a) < int(b) < len(nodes)]
    boxes, links = _fold(nodes, links)
    modules: list[Module] = []
    left_out = 0
    if len(boxes) > MOST_BOXES:
        whole, inner = boxes, links
        boxes, links = _grouped(boxes, links)
        modules, left_out = _modules(whole, inner, boxes)
    return Picture(_draw(boxes, links), _legend(nodes), modules, left_out, len(nodes))


def shade(node: Mapping[str, Any]) -> Shade:
    """The colour class of an operator."""
    precision = str(node.get("precision"))
    if node.get("role") in ("input", "output"):
        return "io"
    if node.get("role") == "index":
        return "other"
    if precision == "float":
        return "stored" if node.get("weights") else "float"
    bits = "".join(c for c in precision.partition("[")[0] if c.isdigit())
    return "wide" if bits and int(bits) > 8 else "int"


# ------------------------------------------------------------------------------------------------ what is drawn


def _fold(nodes: Sequence[Mapping[str, Any]], links: Links) -> tuple[list[Box], Links]:
    """Operators drawn with the one that feeds them: part of its kernel, or (in large networks) mere moves."""
    sources: dict[int, list[int]] = {}
    for a, b in links:
        sources.setdefault(b, []).append(a)
    home = list(range(len(nodes)))
    for i, node in enumerate(nodes):
        feeds = sources.get(i, [])
        if len(feeds) != 1:
            continue  # joining several would make circles
        host = nodes[home[feeds[0]]]
        moves = node.get("role") == "move" and len(nodes) > _MOVES_SHOWN and host.get("role") != "input"
        if moves or node.get("role") == "fused":
            home[i] = home[feeds[0]]
    heads = {i: n for n, i in enumerate(sorted(set(home)))}
    boxes = [Box("", []) for _ in heads]
    for i, node in enumerate(nodes):
        boxes[heads[home[i]]].nodes.append(node)
    for box in boxes:
        box.name = str(box.head.get("name"))
    met = {(heads[home[a]], heads[home[b]]) for a, b in links}
    return boxes, sorted((a, b) for a, b in met if a != b)


def _grouped(boxes: Sequence[Box], links: Links) -> tuple[list[Box], Links]:
    """Modules instead of operators: as deep in the module tree as the number of boxes allows."""
    paths = [str(box.head.get("module") or "").split(".") for box in boxes]
    depth = max(map(len, paths))
    while depth > 0:
        labels = _stretches(boxes, paths, depth)
        if len(set(labels)) <= MOST_MODULES:
            break
        depth -= 1
    else:  # a flat module of hundreds of children: pieces of equal length
        size = -(-len(boxes) // MOST_MODULES)
        labels = [i // size for i in range(len(boxes))]
    made: dict[int, Box] = {}
    for box, path, label in zip(boxes, paths, labels, strict=True):
        group = made.setdefault(label, Box("", []))
        group.boxes.append(box)
        group.nodes += box.nodes
        group.name = group.name or (".".join(path[:depth]) if depth else "")
    order = {label: i for i, label in enumerate(made)}
    seen = 0
    for group in made.values():
        if len(group.boxes) == 1:
            group.name, group.boxes = group.boxes[0].name, []
        elif not group.name:
            group.name = f"{group.boxes[0].name} … {group.boxes[-1].name}"
            group.label = f"{seen + 1} to {seen + len(group.boxes)}"
        seen += len(group.boxes) or 1
    met = {(order[labels[a]], order[labels[b]]) for a, b in links}
    return list(made.values()), sorted((a, b) for a, b in met if a != b)


def _stretches(boxes: Sequence[Box], paths: Sequence[Sequence[str]], depth: int) -> list[int]:
    """The number of the stretch of each box: neighbours of one module at `depth`. Stretches, and not modules,
    because a module that is left and entered again would make a circle."""
    labels: list[int] = []
    last = None
    for box, path in zip(boxes, paths, strict=True):
        alone = box.head.get("role") in ("input", "output")
        key = None if alone else ".".join(path[:depth])
        # what belongs to no module stands with what came before it
        if not labels or key is None or last is None or (key not in ("", last)):
            labels.append(labels[-1] + 1 if labels else 0)
            last = key
        else:
            labels.append(labels[-1])
            last = last or key
    return labels


def _modules(whole: Sequence[Box], links: Links, groups: Sequence[Box]) -> tuple[list[Module], int]:
    """Drawings of the modules, each kind once, until the bytes are spent."""
    place = {id(box): i for i, box in enumerate(whole)}
    after: dict[int, list[int]] = {}
    for a, b in links:
        after.setdefault(a, []).append(b)
    kinds: dict[tuple[Any, ...], list[Box]] = {}
    inner: dict[tuple[Any, ...], Links] = {}
    for group in groups:
        if group.boxes:
            first, last = place[id(group.boxes[0])], place[id(group.boxes[-1])]
            inside = [
                (a - first, b - first) for a in range(first, last + 1) for b in after.get(a, ()) if b <= last
            ]
            built = tuple(
                tuple((n.get("op"), n.get("precision"), n.get("role")) for n in b.nodes) for b in group.boxes
            )
            kinds.setdefault((built, tuple(inside)), []).append(group)
            inner[(built, tuple(inside))] = inside
    made: list[Module] = []
    spent = left_out = 0
    for kind, alike in kinds.items():
        small = len(alike[0].boxes) <= 2 * MOST_BOXES and spent < _BYTES
        drawing = _draw(alike[0].boxes, inner[kind]) if small else Markup()
        if drawing and spent + len(drawing) <= _BYTES:
            made.append(Module(alike[0].name, len(alike) - 1, drawing))
            spent += len(drawing)
        else:
            left_out += 1
    return made, left_out


def _legend(nodes: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, int]]:
    found: dict[Shade, list[Mapping[str, Any]]] = {}
    for node in nodes:
        found.setdefault(shade(node), []).append(node)
    rows = []
    for name, words in _SHADES.items():
        if name in found and name != "io":
            precisions = sorted({str(node.get("precision")) for node in found[name]})
            shown = ", ".join(precisions) if name in ("int", "wide") else words
            # as the other sections count: a reshape between float operators is no work left in float
            working = [node for node in found[name] if node.get("role") != "move"] or found[name]
            rows.append((str(name), wording.plain(shown, 60), len(working)))
    return rows


# ------------------------------------------------------------------------------------------------ drawing


def _draw(boxes: Sequence[Box], links: Links) -> Markup:
    """One SVG for each column, so that they stand side by side on a desk and one below the other on a phone."""
    parts = columns(len(boxes), links, _WIDTH, _GAP, _LONGEST)
    numbers: dict[int, int] = {}
    for part in parts:
        for source, _ in part.leaves:
            numbers.setdefault(source, len(numbers) + 1)
    prefix = _prefix([box.name for box in boxes])
    return Markup("").join(_column(part, boxes, numbers, prefix) for part in parts)


def _column(part: Column, boxes: Sequence[Box], numbers: Mapping[int, int], prefix: str) -> Markup:
    width = round(part.width) + 2 * _MARGIN
    height = _top(part.ranks - 1) + _HEIGHT + _MARGIN + 5
    out = [
        f'<svg class="net" role="group" aria-label="operators" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">'
    ]
    out += [f'<path d="{_path(line)}"/>' for line in part.lines]
    out += [_box(boxes[node], x + _MARGIN, _top(part.rank[node]), prefix) for node, x in part.x.items()]
    entering = {(numbers[source], node) for source, node in part.enters}
    leaving = {(numbers[source], source) for source, _ in part.leaves}
    for stubs, side in ((entering, 1), (leaving, -1)):
        seen: Counter[int] = Counter()
        for number, node in sorted(stubs):
            x = part.x[node] + _MARGIN + side * (_WIDTH / 2 - 12 - 18 * seen[node])
            y = _top(part.rank[node]) + (-8 if side > 0 else _HEIGHT + 8)
            seen[node] += 1
            out.append(
                f'<g class="stub"><circle cx="{x:.0f}" cy="{y}" r="8"/>'
                f'<text x="{x:.0f}" y="{y + 3.5}">{number}</text></g>'
            )
    out.append("</svg>")
    return Markup("".join(out))


def _top(row: int) -> int:
    return row * _PITCH + _MARGIN + 5


def _path(line: Sequence[tuple[float, int]]) -> str:
    """From the lower side of the upper box, past the bends, to the upper side of the lower one."""
    points = []
    for i, (x, row) in enumerate(line):
        if i:
            points.append((x + _MARGIN, _top(row)))
        if i < len(line) - 1:
            points.append((x + _MARGIN, _top(row) + _HEIGHT))
    text = f"M{points[0][0]:.0f} {points[0][1]}"
    for (x0, y0), (x1, y1) in pairwise(points):
        middle = (y0 + y1) / 2
        text += f"V{y1}" if x0 == x1 else f"C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {y1}"
    return text


def _box(box: Box, x: float, top: int, prefix: str) -> str:
    left = x - _WIDTH / 2
    name = box.name.removeprefix(prefix) or box.name
    short = escape(box.label or wording.tail(wording.plain(name, 400), _LETTERS))
    kind = "group" if box.boxes else shade(box.head)
    words = escape(_words(box))
    lines = (13, 25) if box.boxes else (17, 31)
    return (
        f'<g class="box {kind}" tabindex="-1" role="img" aria-label="{words}"><title>{words}</title>'
        f'<rect x="{left:.0f}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" rx="7"/>'
        f"{_bar(box, left + 8, top + _HEIGHT - 9) if box.boxes else ''}"
        f'<text x="{x:.0f}" y="{top + lines[0]}">{short}</text>'
        f'<text class="what" x="{x:.0f}" y="{top + lines[1]}">{escape(wording.plain(_what(box), 28))}</text></g>'
    )


def _bar(box: Box, left: float, top: float) -> str:
    """The shares of a module's operators by colour."""
    counts = Counter(shade(node) for node in _working(box))
    total, length = sum(counts.values()), _WIDTH - 16
    text = ""
    for name in _SHADES:
        if counts[name]:
            wide = length * counts[name] / total
            text += f'<rect class="bar {name}" x="{left:.1f}" y="{top:.0f}" width="{wide:.1f}" height="5"/>'
            left += wide
    return text


def _working(box: Box) -> list[Mapping[str, Any]]:
    """What a module's bar and words count: operators that compute, or all where none does."""
    return [n for n in box.nodes if n.get("role") == "compute"] or box.nodes


def _number(box: Box) -> str:
    count = len(_working(box))
    return f"{count} operator{'' if count == 1 else 's'}"


def _what(box: Box) -> str:
    if box.boxes:
        floats = sum(shade(node) == "float" for node in _working(box))
        return _number(box) + (f", {floats} in float" if floats else "")
    node = box.head
    if node.get("role") in ("input", "output"):
        return f"{node.get('op')}"
    fused = [str(n.get("op")).removeprefix("other:") for n in box.nodes if n.get("role") == "fused"]
    return f"{' + '.join([str(node.get('op')).removeprefix('other:'), *fused])} · {_operands(node)}"


def _operands(node: Mapping[str, Any]) -> str:
    """`int8 × int4`: what an operator reads, times its weights where they have another format."""
    precision, weights = str(node.get("precision")), node.get("weights")
    return precision if weights in (None, precision) else f"{precision} × {weights}"


def _words(box: Box) -> str:
    """Everything that there is to say, for pointers, keyboards and screen readers."""
    name = wording.plain(box.name, 120)
    if box.boxes:
        floats = [n for n in _working(box) if shade(n) == "float"]
        listed = ", ".join(wording.plain(n.get("name"), 60) for n in floats[:3])
        more = f" and {len(floats) - 3} more" if len(floats) > 3 else ""
        return f"{name}: {_number(box)}; " + (f"in float: {listed}{more}" if floats else "none in float")
    return "; ".join(filter(None, (_fact(node) for node in box.nodes)))


def _fact(node: Mapping[str, Any]) -> str:
    name, op = (
        wording.plain(node.get("name"), 120),
        wording.plain(str(node.get("op")).removeprefix("other:"), 40),
    )
    role, precision = node.get("role"), wording.plain(_operands(node), 40)
    if role in ("input", "output"):
        return f"{name}: {op}, {precision}"
    if role == "fused":
        return f"{name}: {op}, done by the same kernel"
    if role == "move":
        return f"{name}: {op}, moves {precision}"
    if role == "index":
        return f"{name}: {op}, makes {precision} indices or masks"
    kernel = f" by {wording.plain(node['kernel'], 60)}" if node.get("kernel") else ""
    reason = f": {wording.plain(node['reason'], 200)}" if node.get("reason") else ""
    return f"{name}: {op}, computed in {precision}{kernel}{reason}"


def _prefix(names: Sequence[str]) -> str:
    """What all names share, up to a dot: it tells nobody anything inside one drawing."""
    parts = [name.split(".")[:-1] for name in names]
    if len(parts) < 2:
        return ""
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return "".join(f"{part}." for part in shared)
