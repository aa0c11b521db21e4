"""The contest as a section of a page: every gap, those that are lost too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.table import CONTEST
from bitport.numerics.intervals import Interval
from bitport.targets._base import host

from .cells import TESTED, TESTED_TEXTS, TITLES, Cell
from .judge import Entry, Standing

HEADING = CONTEST
EFFORTS = ("plain", "fast", "balanced", "best")
Standings = Mapping[tuple[str, Cell], Standing]


def section(found: Standings, versions: Mapping[str, Mapping[str, str]], seeds: Sequence[int]) -> str:
    """Markdown: how it was measured, the table, who is ahead, what each peer did, what failed."""
    peers = sorted({name for standing in found.values() for name in standing.peers})
    parts = [
        _intro(seeds),
        _table(found),
        _counts(found),
        _peers(found, peers),
        _failures(found, versions, peers),
    ]
    return "\n".join(parts)


def _intro(seeds: Sequence[int]) -> str:
    return f"""{HEADING}

Made by `make contest`: other tools on the same networks, calibration data and seeds ({len(seeds)}), each in an
environment of its own (`bench/peers/`). {host()["cpu"]}, one thread each. Loss against float with its paired 95 %
interval over all seeds: in points of accuracy on {TESTED:,} generated images a seed, or in percent of the bits a byte
on {TESTED_TEXTS} stretches of text. Seconds are the median of quantizing alone. bitport's outputs are those of ONNX
Runtime, all tensors between layers in 8 bits; peers' mostly those of their own simulation, additions and gates in
float. *Against the best*: what `best` loses against the best peer; below 0 it is ahead, an interval with 0 is a tie.
"""


def _table(found: Standings) -> str:
    lines = [
        f"| network | cell | {' | '.join(EFFORTS)} | median peer | best peer | against the best |",
        f"|---|---|{'---|' * len(EFFORTS)}---|---|---|",
    ]
    for (network, cell), standing in found.items():
        own = [_entry(standing.ours.get(effort, Entry())) for effort in EFFORTS]
        middle, best, gap = standing.median_loss, standing.best_peer, standing.against_best("best")
        row = [
            TITLES[network] if network != "mobile-twin" else "its rescaled twin (depthwise)",
            cell.name,
            *own,
        ]
        row.append("–" if middle is None else f"{middle:.2f}")
        row.append("none ran" if best is None else f"{best}: {_entry(standing.ran[best])}")
        row.append("–" if gap is None else _verdict(gap))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _counts(found: Standings) -> str:
    """How often we are ahead, by the words of the goal."""
    said = []
    for effort, what in (("balanced", "the median peer"), ("best", "the best peer")):
        verdicts = [
            standing.beats_median(effort) if effort == "balanced" else standing.beats_best(effort)
            for standing in found.values()
        ]
        judged = [verdict for verdict in verdicts if verdict is not None]
        said.append(f"- `{effort}` at or above {what}, or tied, in {sum(judged)} of {len(judged)} cells")
    return "\n".join(said) + "\n"


def _peers(found: Standings, peers: Sequence[str]) -> str:
    lines = [f"| network | cell | {' | '.join(peers)} |", f"|---|---|{'---|' * len(peers)}"]
    for (network, cell), standing in found.items():
        row = [_entry(standing.peers.get(name, Entry())) for name in peers]
        lines.append(f"| {TITLES[network]} | {cell.name} | {' | '.join(row)} |")
    return "What each peer loses:\n\n" + "\n".join(lines) + "\n"


def _failures(found: Standings, versions: Mapping[str, Mapping[str, str]], peers: Sequence[str]) -> str:
    lines = ["Versions, methods, and what a tool could not do:", ""]
    for name in peers:
        told = ", ".join(f"{package} {number}" for package, number in versions.get(name, {}).items())
        entries = [standing.peers[name] for standing in found.values() if name in standing.peers]
        methods = "; ".join(dict.fromkeys(entry.method for entry in entries if entry.method))
        reasons = dict.fromkeys(_short(entry.reason) for entry in entries if entry.reason)
        line = f"- **{name}** ({told or 'did not run'}): {methods or 'nothing ran'}"
        lines.append(line + (f". {'; '.join(reasons)}" if reasons else ""))
    return "\n".join(lines) + "\n"


def _short(reason: str) -> str:
    """The last line that says something, of a log."""
    kind, _, rest = reason.partition(": ")
    told = [line.strip() for line in rest.splitlines() if line.strip()]
    return f"{kind}: {told[-1][:160] if told else ''}"


def _entry(entry: Entry) -> str:
    if entry.loss is None:
        return entry.reason.partition(":")[0] or "–"
    return f"{entry.loss.drop:.2f} ({entry.loss.low:.2f} … {entry.loss.high:.2f}), {entry.seconds:.1f} s"


def _verdict(gap: Interval) -> str:
    word = "tied" if gap.low <= 0 <= gap.high else "ahead" if gap.high < 0 else "behind"
    return f"{gap.drop:+.2f} ({gap.low:.2f} … {gap.high:.2f}): {word}"
