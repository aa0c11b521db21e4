"""The contest as a section of a page: every gap, those that are lost too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.table import CONTEST
from bitport.numerics.intervals import Interval

from .cells import TESTED, TESTED_TEXTS, TITLES, Cell
from .judge import Entry, Standing, at_or_above

HEADING = CONTEST
EFFORTS = ("plain", "fast", "balanced", "best")
RIVALS = (("balanced", "median"), ("best", "best"))  # which effort is held against which peer
Standings = Mapping[tuple[str, Cell], Standing]


def section(
    found: Standings,
    versions: Mapping[str, Mapping[str, str]],
    seeds: Mapping[str, Sequence[int]],
    troubles: Mapping[str, str],
    cpus: Sequence[str],
) -> str:
    """Markdown: how it was measured, the table, who is ahead, what each peer did, what failed.

    seeds: those that each network ran with. troubles: what failed of making a tool's environment. cpus: the processors
    that it ran on.
    """
    peers = sorted({name for standing in found.values() for name in standing.peers})
    parts = [
        _intro(seeds, cpus),
        _table(found),
        _counts(found),
        *([_seeds(found, seeds)] if any(len(ran) > 1 for ran in seeds.values()) else []),
        _peers(found, peers),
        _failures(found, versions, peers, troubles),
    ]
    return "\n".join(parts)


def _said(seeds: Mapping[str, Sequence[int]]) -> str:
    """The seeds of most networks, and those of the others behind them."""
    told = {network: ", ".join(map(str, ran)) for network, ran in seeds.items()}
    usual = max(dict.fromkeys(told.values()), key=list(told.values()).count, default="none")
    others = [f"{TITLES[network]}: {ran}" for network, ran in told.items() if ran != usual]
    return "; ".join([usual, *others])


def _intro(seeds: Mapping[str, Sequence[int]], cpus: Sequence[str]) -> str:
    return f"""{HEADING}

Made by `make contest`: other tools on the same networks, calibration data and seeds ({_said(seeds)}), each in an
environment of its own (`bench/peers/`). {" and ".join(cpus)}, one thread each. Loss against float with its paired 95 %
interval over all seeds: in points of accuracy on {TESTED:,} generated images a seed, or in percent of the bits a byte
on {TESTED_TEXTS} stretches of text. Seconds are the median of quantizing alone. bitport's outputs are those of ONNX
Runtime, all tensors between layers in 8 bits; peers' mostly those of their own simulation, additions and gates in
float. *Against the median*: what `balanced` loses against the peer in the middle (of two, the better one); *against the
best*: what `best` loses against the best peer. Paired on the same samples; below 0 it is ahead, an interval with 0 is a
tie. Every sample of every seed counts as one pair.
"""


def _table(found: Standings) -> str:
    lines = [
        f"| network | cell | {' | '.join(EFFORTS)} | median peer | against the median | best peer | against the best |",
        f"|---|---|{'---|' * len(EFFORTS)}---|---|---|---|",
    ]
    for (network, cell), standing in found.items():
        own = [_entry(standing.ours.get(effort, Entry())) for effort in EFFORTS]
        middle, best = standing.median_loss, standing.best_peer
        gaps = [_gap(standing, effort, place) for effort, place in RIVALS]
        verdicts = ["–" if gap is None else _verdict(gap) for gap in gaps]
        row = [
            TITLES[network],
            cell.name,
            *own,
            "–" if middle is None else f"{middle:.2f}",
            verdicts[0],
            "none ran" if best is None else f"{best}: {_entry(standing.ran[best])}",
            verdicts[1],
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _counts(found: Standings) -> str:
    """How often we are ahead, by the words of the goal."""
    said = []
    for effort, place in RIVALS:
        gaps = {key: _gap(standing, effort, place) for key, standing in found.items()}
        judged = {key: at_or_above(gap) for key, gap in gaps.items() if gap is not None}
        behind = [f"{TITLES[network]} {cell.name}" for (network, cell), held in judged.items() if not held]
        told = f" (behind: {'; '.join(behind)})" if behind else ""
        counted = f"{sum(judged.values())} of {len(judged)} cells"
        said.append(f"- `{effort}` above the {place} peer, or tied with it, in {counted}{told}")
    return "\n".join(said) + "\n"


def _gap(standing: Standing, effort: str, place: str) -> Interval | None:
    return standing.against(standing.median_peer if place == "median" else standing.best_peer, effort)


def _seeds(found: Standings, seeds: Mapping[str, Sequence[int]]) -> str:
    lines = ["| network | cell | balanced | best | best peer |", "|---|---|---|---|---|"]
    for (network, cell), standing in found.items():
        best = standing.best_peer
        shown = [standing.ours.get(effort, Entry()) for effort, _ in RIVALS]
        shown.append(Entry() if best is None else standing.ran[best])
        losses = [" · ".join(_loss(each) for each in entry.by_seed) or "–" for entry in shown]
        lines.append("| " + " | ".join([TITLES[network], cell.name, *losses]) + " |")
    return f"Seed by seed ({_said(seeds)}):\n\n" + "\n".join(lines) + "\n"


def _peers(found: Standings, peers: Sequence[str]) -> str:
    lines = [f"| network | cell | {' | '.join(peers)} |", f"|---|---|{'---|' * len(peers)}"]
    for (network, cell), standing in found.items():
        row = [_entry(standing.peers.get(name, Entry())) for name in peers]
        lines.append(f"| {TITLES[network]} | {cell.name} | {' | '.join(row)} |")
    return "What each peer loses:\n\n" + "\n".join(lines) + "\n"


def _failures(
    found: Standings,
    versions: Mapping[str, Mapping[str, str]],
    peers: Sequence[str],
    troubles: Mapping[str, str],
) -> str:
    lines = ["Versions, methods, and what a tool could not do:", ""]
    for name in sorted({*versions} - {*peers}):
        lines.append(f"- **{name}** ({_told(versions[name])})")
    for name in peers:
        told = _told(versions.get(name, {}))
        entries = [standing.peers[name] for standing in found.values() if name in standing.peers]
        methods = "; ".join(dict.fromkeys(entry.method for entry in entries if entry.method))
        reasons = dict.fromkeys(_short(entry.reason) for entry in entries if entry.reason)
        if name in troubles:
            reasons[_short(f"environment: {troubles[name]}")] = None
        line = f"- **{name}** ({told or 'did not run'}): {methods or 'nothing ran'}"
        lines.append(line + (f". {'; '.join(reasons)}" if reasons else ""))
    return "\n".join(lines) + "\n"


def _told(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {number}" for package, number in versions.items())


def _short(reason: str) -> str:
    """The last line that says something, of a log."""
    kind, _, rest = reason.partition(": ")
    told = [line.strip() for line in rest.splitlines() if line.strip()]
    return f"{kind}: {told[-1][:160] if told else ''}"


def _entry(entry: Entry) -> str:
    if entry.loss is None:
        return entry.reason.partition(":")[0] or "–"
    return f"{_loss(entry.loss)}, {entry.seconds:.1f} s"


def _loss(found: Interval) -> str:
    return f"{found.drop:.2f} ({found.low:.2f} … {found.high:.2f})"


def _verdict(gap: Interval) -> str:
    word = "tied" if gap.low <= 0 <= gap.high else "ahead" if gap.high < 0 else "behind"
    return f"{gap.drop:+.2f} ({gap.low:.2f} … {gap.high:.2f}): {word}"
