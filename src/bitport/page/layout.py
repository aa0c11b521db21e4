"""Where the boxes of a layered drawing stand: ranks, columns of ranks, order and places within a rank.

After Sugiyama, Tagawa & Toda 1981: each node stands below all that feed it; an edge over several ranks passes them
as a chain of bends; bends and nodes are ordered by the mean place of their neighbours, and moved as near to it as
their widths allow. A long network is cut into columns where few edges cross.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

BEND = 10.0
_SWEEPS = 6


@dataclass
class Column:
    """One column of a drawing.

    Attributes:
        x: centre of each node; `width` is from 0 to the right end of the rightmost.
        rank: row of each node, from 0.
        lines: for each edge inside the column its way, (x, row) from the upper node to the lower.
        enters: (source outside, node) for each edge from an earlier column; `leaves` likewise to a later one.
    """

    x: dict[int, float] = field(default_factory=dict)
    rank: dict[int, int] = field(default_factory=dict)
    width: float = 0.0
    ranks: int = 0
    lines: list[list[tuple[float, int]]] = field(default_factory=list)
    enters: list[tuple[int, int]] = field(default_factory=list)
    leaves: list[tuple[int, int]] = field(default_factory=list)


def columns(
    count: int, edges: Sequence[tuple[int, int]], width: float, gap: float, longest: int
) -> list[Column]:
    """Lay out nodes 0 … count−1, edges (a, b) with a < b, in columns of at most `longest` ranks."""
    rank = _ranks(count, edges)
    ranks = max(rank, default=-1) + 1
    home: list[int] = []
    for index, (start, end) in enumerate(pairwise(_cuts(rank, ranks, edges, longest))):
        home += [index] * (end - start)
    parts = [Column() for _ in range((home[-1] + 1) if home else 0)]
    first = [home.index(i) for i in range(len(parts))]
    inside: list[list[tuple[int, int]]] = [[] for _ in parts]
    members: list[list[int]] = [[] for _ in parts]
    for node in range(count):
        members[home[rank[node]]].append(node)
    for a, b in edges:
        above, below = home[rank[a]], home[rank[b]]
        if above == below:
            inside[above].append((a, b))
        else:
            parts[above].leaves.append((a, b))
            parts[below].enters.append((a, b))
    for index, part in enumerate(parts):
        part.rank = {node: rank[node] - first[index] for node in members[index]}
        part.ranks = max(part.rank.values()) + 1
        _place(part, inside[index], width, gap)
    return parts


def _ranks(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """The longest way from a source; a source itself stands right above the first that reads it."""
    rank = [0] * count
    after: dict[int, list[int]] = {}
    fed = {b for _, b in edges}
    for a, b in sorted(edges, key=lambda edge: edge[1]):
        rank[b] = max(rank[b], rank[a] + 1)
        after.setdefault(a, []).append(b)
    for node in range(count):
        if node not in fed and node in after:
            rank[node] = min(rank[reader] for reader in after[node]) - 1
    return rank


def _cuts(rank: Sequence[int], ranks: int, edges: Sequence[tuple[int, int]], longest: int) -> list[int]:
    """Ranks where columns begin, and the end. The columns are about equally long; of the places near the equal
    share the one that the fewest nodes are read across is taken."""
    last: dict[int, int] = {}
    for a, b in edges:
        last[a] = max(last.get(a, 0), rank[b])
    crossing = [0] * (ranks + 1)
    for a, end in last.items():
        for cut in range(rank[a] + 1, end + 1):
            crossing[cut] += 1
    number = -(-ranks // longest)
    cuts = [0]
    for left in range(number, 1, -1):
        share = (ranks - cuts[-1]) / left
        ideal = cuts[-1] + round(share)
        play = max(1, round(share / 4))
        # what is left must fit into the columns that are left
        low = max(cuts[-1] + 1, ideal - play, ranks - (left - 1) * longest)
        high = min(ideal + play, cuts[-1] + longest, ranks - left + 1)
        cuts.append(min(range(low, max(low, high) + 1), key=lambda at: (crossing[at], abs(at - ideal))))
    return [*cuts, ranks] if ranks else [0]


def _place(part: Column, edges: Sequence[tuple[int, int]], width: float, gap: float) -> None:
    rows: list[list[int]] = [[] for _ in range(part.ranks)]
    wide: dict[int, float] = {}
    above: dict[int, list[int]] = {}
    below: dict[int, list[int]] = {}
    for node, row in part.rank.items():
        rows[row].append(node)
        wide[node] = width
    chains: list[list[int]] = []
    bend = -1  # nodes count from 0 upwards, bends from −1 downwards
    for a, b in edges:
        chain = [a]
        for row in range(part.rank[a] + 1, part.rank[b]):
            chain.append(bend)
            rows[row].append(bend)
            wide[bend] = BEND
            bend -= 1
        chain.append(b)
        chains.append(chain)
        for upper, lower in pairwise(chain):
            below.setdefault(upper, []).append(lower)
            above.setdefault(lower, []).append(upper)
    x = _sweep(rows, wide, above, below, gap)
    left = min((x[item] - wide[item] / 2 for item in wide), default=0.0)
    part.x = {node: x[node] - left for node in part.rank}
    part.width = max((x[item] + wide[item] / 2 - left for item in wide), default=0.0)
    for (a, _), chain in zip(edges, chains, strict=True):
        part.lines.append([(x[item] - left, part.rank[a] + i) for i, item in enumerate(chain)])


def _sweep(
    rows: list[list[int]],
    wide: Mapping[int, float],
    above: Mapping[int, list[int]],
    below: Mapping[int, list[int]],
    gap: float,
) -> dict[int, float]:
    x: dict[int, float] = {}
    for row in rows:
        _pack(row, dict.fromkeys(row, 0.0), wide, gap, x)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        near = above if down else below
        for row in rows if down else rows[::-1]:
            wanted = {item: _mean([x[other] for other in near.get(item, ())], x[item]) for item in row}
            row.sort(key=lambda item: wanted[item])
            _pack(row, wanted, wide, gap, x)
    return x


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _pack(
    row: Sequence[int],
    wanted: Mapping[int, float],
    wide: Mapping[int, float],
    gap: float,
    x: dict[int, float],
) -> None:
    """The places nearest to the wanted ones, in least squares, at which nothing overlaps (pool adjacent violators)."""
    offset, offsets = 0.0, []
    for index, item in enumerate(row):
        if index:
            offset += (wide[row[index - 1]] + wide[item]) / 2 + gap
        offsets.append(offset)
    pools: list[tuple[float, int]] = []  # (sum of wanted places without the offsets, members)
    for item, shift in zip(row, offsets, strict=True):
        pools.append((wanted[item] - shift, 1))
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, members = pools.pop()
            pools[-1] = (pools[-1][0] + total, pools[-1][1] + members)
    places = [total / members for total, members in pools for _ in range(members)]
    for item, shift, place in zip(row, offsets, places, strict=True):
        x[item] = place + shift
