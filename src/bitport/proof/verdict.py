"""The verdict on a measurement record: the gates that were asked for, and one plain sentence.

The sentence never flatters: what was rejected or undecided comes first, a network that isn't faster is called
"not faster", and a value that wasn't measured is said to be missing, with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import wording

Record = Mapping[str, Any]


def judge(record: Record, gates: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Judge a measurement record (the schema of `measurements.json`).

    Args:
        record: at least `target` and `recipe`; every section may be missing or null with its reason.
        gates: further gates beside accuracy, each `{name, value, limit, verdict}` with verdict `holds`,
            `fails` or `undecided`.

    Returns: `passed` (every gate holds; True when nothing was asked for), `sentence`, `gates`.
    """
    every = [*accuracy_gate(record), *(dict(gate) for gate in gates)]
    return {
        "passed": all(gate["verdict"] == "holds" for gate in every),
        "sentence": sentence(record, every),
        "gates": every,
    }


def accuracy_gate(record: Record) -> list[dict[str, Any]]:
    """The gate on the metric's drop; none where no limit was set."""
    task = _section(record, "task")
    if task.get("verdict") is None:
        return []
    return [
        {"name": "accuracy", "value": task["drop"], "limit": task.get("max_drop"), "verdict": task["verdict"]}
    ]


def sentence(record: Record, gates: Sequence[Mapping[str, Any]]) -> str:
    """What came out, in one sentence of plain words."""
    missed = [gate for gate in gates if gate["verdict"] != "holds" and gate["name"] != "accuracy"]
    failed = [wording.plain(gate["name"]) for gate in missed if gate["verdict"] == "fails"]
    open_ = [wording.plain(gate["name"]) for gate in missed if gate["verdict"] != "fails"]
    accuracy = _section(record, "task").get("verdict")
    head = ""
    if failed or accuracy == "fails":
        head = "rejected: "
    elif open_ or accuracy == "undecided":
        head = "undecided: "
    costs = _listed([part for part in (_size(record), _arithmetic(record), _speed(record)) if part])
    parts = [_accuracy(record), costs]
    if failed:
        parts.append(f"missed: {', '.join(failed)}")
    if open_:
        parts.append(f"not decided: {', '.join(open_)}")
    return head + "; ".join(part for part in parts if part) + "."


def metric_label(name: str) -> str:
    """The metric as people write it: top1 → top-1."""
    return "top-1" if name == "top1" else wording.plain(name)


def subject(record: Record) -> str:
    """`int8 on onnxruntime`: the recipe and the runtime."""
    recipe = record.get("recipe")
    name = recipe.get("name") if isinstance(recipe, Mapping) else recipe
    return f"{wording.plain(name or 'the result')} on {wording.plain(record.get('target') or 'no runtime')}"


def _accuracy(record: Record) -> str:
    task = _section(record, "task")
    if task.get("drop") is None:
        reason = task.get("drop_reason") or record.get("task_reason") or "no evaluation data was given"
        return f"{subject(record)}: accuracy not measured ({wording.plain(reason)})"
    drop, (low, high) = task["drop"], task["ci95"]
    binary, limit = bool(task.get("binary")), task.get("max_drop")
    label = metric_label(task["metric"])

    def amount(value: Any) -> str:
        return f"{wording.change(value, binary)}{' points' if binary else ''}"

    between = f"95 %: {wording.losses((low, high), binary)}"
    kept = f"{wording.bound(high, binary)}{' points' if binary else ''} of the float network (95 % sure)"
    if task.get("verdict") == "holds":
        return f"{subject(record)} keeps {label} within {kept}"
    lost = f"{'loses' if drop >= 0 else 'gains'} {amount(abs(drop))} of {label}"
    if task.get("verdict") == "fails":
        return f"{subject(record)} {lost} ({between}), more than the {amount(limit)} allowed"
    if task.get("verdict") == "undecided":
        needed = task.get("samples_needed")
        decide = f": about {wording.about(needed)} samples would decide" if needed else ""
        return (
            f"{subject(record)} {lost} on {wording.count(task.get('samples'))} samples, "
            f"too few to tell whether the limit of {amount(limit)} holds ({between}){decide}"
        )
    return f"{subject(record)} keeps {label} within {kept}, no limit was set"


def _size(record: Record) -> str:
    ratio = _section(record, "size").get("ratio")
    return f"its file is {wording.times(ratio)} the size" if ratio is not None else ""


def _arithmetic(record: Record) -> str:
    """Said of networks whose weights are stored narrow and multiplied as floats: fewer bits alone gain no speed."""
    integer = _section(record, "integer")
    return (
        "it computes in floats as before" if record.get("storage") and integer.get("mac_share") == 0 else ""
    )


def _listed(parts: list[str]) -> str:
    return ", and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def _speed(record: Record) -> str:
    latency = _section(record, "latency")
    if latency.get("speedup") is None:
        return "its speed was not measured"
    on = f"on {wording.threads(latency.get('threads'))}"
    speedup = wording.times(latency["speedup"])
    if latency.get("verdict") == "faster":
        return f"it runs {speedup} as fast {on}"
    if latency.get("verdict") == "slower":
        return f"it is slower than float ({speedup} its speed {on})"
    return f"it is not faster than float ({speedup} its speed {on})"


def _section(record: Record, name: str) -> Mapping[str, Any]:
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}
