"""bitport against other tools: `python -m bench.peers.contest [--write docs/benchmarks.md]`.

The same networks, data and seeds for all; every tool in an environment of its own, which is made here. What has run
already and hasn't changed is not run again. Everything lies in --folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from bench.table import publish_section
from bitport.targets._base import host

from . import cells, page, records
from .cells import CELLS, Cell
from .common import TESTED_AT_ONCE, UNSUPPORTED, built
from .judge import Entry, Standing, pooled, scores
from .records import Record, Result

Records = Mapping[tuple[str, int], Record]  # by network and seed

HERE = Path(__file__).parent
RECORDS = HERE / "records"
ROOT = HERE.parents[1]
OWN = "bitport"
EFFORTS = ("plain", "fast", "balanced", "best")
LIMIT = 900  # seconds that a job may take
TAIL = 2000  # characters of a log that are kept


def peers() -> list[str]:
    """The tools that there is a `run.py` for, in alphabetical order."""
    return sorted(path.parent.name for path in HERE.glob("*/run.py") if path.parent.name != OWN)


@dataclass(frozen=True)
class Job:
    """One run of one entrant."""

    entrant: str
    network: str
    seed: int
    cell: Cell
    effort: str | None = None

    @property
    def name(self) -> str:
        return self.entrant if self.effort is None else f"{self.entrant}-{self.effort}"

    @property
    def row(self) -> str:
        """What the result is called in a record of the network."""
        return f"{self.name}: {self.cell.name}"

    def place(self, folder: Path) -> Path:
        return (
            folder / "results" / self.name / f"{self.network}-{self.seed}-{self.cell.name.replace(' ', '_')}"
        )


def jobs(
    entrants: Sequence[str], networks: Sequence[str], wanted: Sequence[str], seeds: Sequence[int]
) -> Iterator[Job]:
    """All runs, seed after seed, so that an early end leaves whole seeds."""
    for seed in seeds:
        for network in networks:
            for cell in CELLS[network]:
                if wanted and cell.name not in wanted:
                    continue
                for entrant in entrants:
                    efforts = EFFORTS if entrant == OWN else (None,)
                    yield from (Job(entrant, network, seed, cell, effort) for effort in efforts)


# --------------------------------------------------------------------------------------------- environments


@cache
def environment(name: str, folder: Path) -> tuple[Path | None, str]:
    """A tool's Python, made where it isn't there, or None where it can't be made; and what failed of making it.

    `requirements.txt` is tried first, then `requirements-2.txt`, if there, and so on.
    """
    if name == OWN:
        return Path(sys.executable), ""
    place = folder / "env" / name
    python, mark = place / "bin" / "python", place / "made"
    failures = folder / "env" / f"{name}.failed"
    choices = sorted((HERE / name).glob("requirements*.txt"), key=lambda path: path.stem)
    if mark.exists() and mark.read_text() in [path.read_text() for path in choices]:
        return python, failures.read_text() if failures.exists() else ""
    failures.unlink(missing_ok=True)
    said = ""
    for requirements in choices:
        if not python.exists():
            venv.create(place, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        log = made.stdout + made.stderr
        (folder / "env" / f"{name}.log").write_text(log)
        if made.returncode == 0:
            mark.write_text(requirements.read_text())
            return python, said
        said += f"{requirements.name}: {log[-TAIL:]}\n"
        failures.write_text(said)
    return None, said or "it has no requirements"


@cache
def sources(name: str) -> str:
    """A digest of what an entrant's results depend on."""
    files = [HERE / "common.py", ROOT / "bench" / "subjects.py", *sorted((HERE / name).glob("*"))]
    if any("import choice" in path.read_text() for path in (HERE / name).glob("*.py")):
        files.append(HERE / "choice.py")
    if name == OWN:
        files += sorted((ROOT / "src").rglob("*.py"))
    found = hashlib.sha256()
    for path in files:
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()


@cache
def commit() -> str:
    """The commit that is run, with a + where files differ from it; nothing outside a repository."""
    told = [
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        for words in (
            ("rev-parse", "--short", "HEAD"),
            ("status", "--porcelain", "src", "bench", f":!{RECORDS.relative_to(ROOT)}"),
        )
    ]
    return told[0] + ("+" if told[1] else "")


# --------------------------------------------------------------------------------------------- one run


def run(job: Job, folder: Path, *, limit: int = LIMIT, again: bool = False) -> Result:
    """The result of a job: what its run left, or {"unsupported": why}, or {"failed": end of the log}.

    again: what failed is run once more, too (a busy machine runs out of time).
    """
    out = job.place(folder)
    record = out / "record.json"
    key = hashlib.sha256(f"{asdict(job)}{sources(job.entrant)}".encode()).hexdigest()
    if record.exists():
        found: Result = json.loads(record.read_text())
        if found.get("key") == key and not (again and "failed" in found):
            return found
    out.mkdir(parents=True, exist_ok=True)
    result = {**_ran(job, out, folder, limit), "key": key, "commit": commit()}
    record.write_text(json.dumps(result, indent=1))
    return result


def _ran(job: Job, out: Path, folder: Path, limit: int) -> Result:
    python, why = environment(job.entrant, folder)
    if python is None:
        return {"failed": f"its environment can't be made: {why}"}
    data = cells.data_of(job.network, job.seed, folder)
    told = {
        "network": job.network,
        "seed": job.seed,
        "effort": job.effort,
        "state": str(cells.state_of(job.network, job.seed, folder)),
        "cell": asdict(job.cell),
        "calibration": str(data["calibration"]),
        "test": str(data["test"]),
        "out": str(out),
    }
    (out / "job.json").write_text(json.dumps(told, indent=1))
    command = [str(python), "-m", f"bench.peers.{job.entrant}.run", str(out / "job.json")]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    surroundings = {**os.environ, **threads, "CUDA_VISIBLE_DEVICES": ""}
    with (out / "log").open("w") as log:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                env=surroundings,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return {"failed": f"it took more than {limit} s"}
    end = (out / "log").read_text(errors="replace")[-TAIL:]
    if code == UNSUPPORTED:
        return {"unsupported": end.strip().splitlines()[-1] if end.strip() else ""}
    if code or not (out / "result.json").exists():
        return {"failed": end or f"it ended with {code}"}
    result: Result = json.loads((out / "result.json").read_text())
    return result


# --------------------------------------------------------------------------------------------- judging


def scored(job: Job, folder: Path, result: Result) -> Result:
    """A result with the scores of the outputs that its run left, which are too large to be kept themselves."""
    outputs = job.place(folder) / "outputs.npy"
    if "seconds" not in result or "scores" in result:
        return result
    labels = np.load(cells.data_of(job.network, job.seed, folder)["labels"])
    found = np.load(outputs)
    if np.isfinite(found).all():
        result = {**result, "scores": records.pack(scores(found, labels))}
    else:
        result = {"failed": "its outputs are not finite", "key": result["key"]}
    (job.place(folder) / "record.json").write_text(json.dumps(result, indent=1))
    outputs.unlink()
    return result


def fresh(network: str, seed: int, folder: Path) -> Record:
    """A record of a float network that nobody has run in yet; a twin computes what its original does."""
    data, state = cells.data_of(network, seed, folder), cells.state_of(network, seed, folder)
    model, test = built(network, state), torch.from_numpy(np.load(data["test"]))
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in torch.split(test, TESTED_AT_ONCE)]).numpy()
    reference = records.pack(scores(outputs, np.load(data["labels"])))
    return Record(records.digest(state), str(host()["cpu"]), reference)


def entry(runs: Sequence[Job], found: Records) -> Entry:
    """What one entrant did in one cell, over its seeds."""
    references, others, results = [], [], []
    for job in runs:
        record = found[job.network, job.seed]
        result = record.results.get(job.row, {"unsupported": "it has not run"})
        for key in ("unsupported", "failed"):
            if key in result:
                return Entry(reason=f"{key}: {result[key]}")
        references.append(records.unpack(record.reference))
        others.append(records.unpack(result["scores"]))
        results.append(result)
    seconds = [float(result["seconds"]) for result in results]
    made = pooled(references, others, seconds, text=runs[0].network == "gpt")
    return replace(made, method=str(results[-1].get("method", "")), where=str(results[-1].get("where", "")))


def standings(every: Sequence[Job], found: Records) -> dict[tuple[str, Cell], Standing]:
    """How each cell stands, in the order of the jobs."""
    by_cell: dict[tuple[str, Cell], dict[str, list[Job]]] = {}
    for job in every:
        by_cell.setdefault((job.network, job.cell), {}).setdefault(job.name, []).append(job)
    made = {}
    for (network, cell), entrants in by_cell.items():
        ours = {
            runs[0].effort or "": entry(runs, found) for runs in entrants.values() if runs[0].entrant == OWN
        }
        others = {name: entry(runs, found) for name, runs in entrants.items() if runs[0].entrant != OWN}
        made[network, cell] = Standing(network == "gpt", ours, others)
    return made


def versions(every: Sequence[Job], found: Records) -> dict[str, dict[str, str]]:
    """What each entrant ran with, by its name; ours with the commits as well."""
    told: dict[str, dict[str, str]] = {}
    commits: set[str] = set()
    for job in every:
        result = found[job.network, job.seed].results.get(job.row, {})
        if "versions" in result:
            told.setdefault(job.entrant, dict(result["versions"]))
            commits |= {str(result["commit"])} if job.entrant == OWN and "commit" in result else set()
    if commits:
        told[OWN]["commit"] = " and ".join(sorted(commits))
    return told


# --------------------------------------------------------------------------------------------- all of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/contest"))
    parser.add_argument("--entrants", help="names, with commas; default: bitport and all peers")
    parser.add_argument("--networks", default=",".join(CELLS))
    parser.add_argument("--cells", default="", help="names, with semicolons; default: all")
    parser.add_argument("--seeds", default=",".join(map(str, cells.SEEDS)), help="those on the page")
    parser.add_argument(
        "--recorded", action="store_true", help="what the records hold isn't run, though code changed"
    )
    parser.add_argument(
        "--kept",
        action="store_true",
        help="the page of what the records hold, network by network; nothing is run",
    )
    parser.add_argument("--record", action="store_true", help="keep what ran in the records")
    parser.add_argument(
        "--at-once", type=int, default=1, help="runs side by side: their seconds are no timings then"
    )
    parser.add_argument("--again", action="store_true", help="run what failed once more")
    parser.add_argument("--write", type=Path, help="also write the section to this page")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    entrants = arguments.entrants.split(",") if arguments.entrants else [OWN, *peers()]
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    wanted = [name for name in arguments.cells.split(";") if name]
    networks = arguments.networks.split(",")
    every = list(jobs(entrants, networks, wanted, seeds))
    found = _recorded(networks, seeds) if arguments.recorded or arguments.kept else {}
    if arguments.kept:
        every = [job for job in every if (job.network, job.seed) in found]
    todo = [job for job in every if (job.network, job.seed) not in found]
    troubles = {}
    for name in entrants if todo else ():
        python, why = environment(name, folder)
        if why:
            troubles[name] = why
        sys.stderr.write(f"{name}: {'ready' if python else 'no environment'}\n")
    for key in dict.fromkeys((job.network, job.seed) for job in todo):
        found[key] = fresh(*key, folder)
    with ThreadPoolExecutor(max_workers=arguments.at_once) as pool:
        results = pool.map(lambda job: run(job, folder, again=arguments.again), todo)
        last = {(job.network, job.seed): index for index, job in enumerate(todo, 1)}
        for index, (job, result) in enumerate(zip(todo, results, strict=True), 1):
            result = scored(job, folder, result)
            found[job.network, job.seed].results[job.row] = result
            state = next(
                (key for key in ("failed", "unsupported") if key in result),
                f"{result.get('seconds', 0):.1f} s",
            )
            sys.stderr.write(
                f"{index}/{len(todo)} {job.name} {job.network} {job.seed} {job.cell.name}: {state}\n"
            )
            if arguments.record and index == last[job.network, job.seed]:  # only what is whole
                records.write(records.place(RECORDS, job.network, job.seed), found[job.network, job.seed])
    cpus = sorted({record.cpu for record in found.values()})
    ran: dict[str, list[int]] = {}
    for network, seed in dict.fromkeys((job.network, job.seed) for job in every):
        ran.setdefault(network, []).append(seed)
    text = page.section(standings(every, found), versions(every, found), ran, troubles, cpus)
    publish_section(text, arguments.write, page.HEADING)


def _recorded(networks: Sequence[str], seeds: Sequence[int]) -> dict[tuple[str, int], Record]:
    """What there are records of."""
    keys = [(network, seed) for network in networks for seed in seeds]
    kept = {key: records.read(records.place(RECORDS, *key)) for key in keys}
    return {key: record for key, record in kept.items() if record is not None}


if __name__ == "__main__":
    main()
