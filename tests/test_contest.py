"""The contest's arithmetic: losses, ties, medians, who could not run; its jobs and their keys; the page; the twins."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import subjects
from bench.peers import cells, contest, page, records
from bench.peers.cells import Cell
from bench.peers.contest import Job
from bench.peers.judge import Entry, Standing, at_or_above, loss, pooled, scores
from bench.table import CONTEST, publish, publish_section

RIGHT = np.ones(1000)


def wrong(count: int, start: int = 0) -> Any:
    found = RIGHT.copy()
    found[start : start + count] = 0
    return found


def entrant(count: int, start: int = 0, seconds: float = 1.0) -> Entry:
    return pooled([RIGHT], [wrong(count, start)], [seconds], text=False)


# --------------------------------------------------------------------------- scores and losses


def test_images_are_right_or_wrong() -> None:
    outputs = np.array([[0.1, 0.9], [0.8, 0.2]], dtype=np.float32)
    assert scores(outputs, np.array([1, 1])).tolist() == [1.0, 0.0]


def test_texts_are_scored_by_bits_a_byte() -> None:
    outputs = np.zeros((3, 5, 4), dtype=np.float32)  # four bytes, all alike: two bits each
    found = scores(outputs, np.zeros((3, 5), dtype=np.int64))
    assert np.allclose(found, -2.0)
    assert loss(found, 1.01 * found, text=True).drop == pytest.approx(1.0)  # one percent more bits


def test_losses_are_in_points_and_paired() -> None:
    found = loss(RIGHT, wrong(20), text=False)
    assert found.drop == pytest.approx(2.0) and 1.0 < found.low < 2.0 < found.high < 3.5


def test_seeds_are_pooled_sample_by_sample() -> None:
    found = pooled([RIGHT, RIGHT], [wrong(10), wrong(30)], [1.0, 3.0], text=False)
    assert found.loss is not None and found.loss.drop == pytest.approx(2.0) and found.loss.n == 2000
    assert found.seconds == 2.0
    assert [each.drop for each in found.by_seed] == pytest.approx([1.0, 3.0])
    assert all(each.n == 1000 and each.low < each.drop < each.high for each in found.by_seed)


# --------------------------------------------------------------------------- who is ahead


def standing(ours: int, start: int, *peers: int | str) -> Standing:
    others = {
        f"peer{index}": Entry(reason=found) if isinstance(found, str) else entrant(found)
        for index, found in enumerate(peers)
    }
    own = entrant(ours, start)
    return Standing(False, {"balanced": own, "best": own}, others)


@pytest.mark.parametrize(
    ("ours", "start", "peers", "median", "ahead_of_median", "ahead_of_best", "word"),
    [
        (5, 0, (40, 60, 80), 6.0, True, True, "ahead"),
        (120, 0, (40, 60, 80), 6.0, False, False, "behind"),
        (70, 0, (10, 70, 80), 7.0, True, False, "behind"),
        (42, 500, (40, 60, 80), 6.0, True, True, "tied"),  # as many, of other samples
        (65, 0, (10, 60, 80, 90), 7.0, False, False, "behind"),  # of two in the middle the better one counts
        (65, 400, (10, 60, 80, 90), 7.0, True, False, "behind"),  # tied with it
        (5, 0, (40, "unsupported: no"), 4.0, True, True, "ahead"),
        (5, 0, (60, 40, "failed: log"), 5.0, True, True, "ahead"),
    ],
)
def test_standings(
    ours: int, start: int, peers: Any, median: float, ahead_of_median: bool, ahead_of_best: bool, word: str
) -> None:
    found = standing(ours, start, *peers)
    assert found.median_loss == pytest.approx(median)
    middle = found.against(found.median_peer, "balanced")
    assert middle is not None and at_or_above(middle) is ahead_of_median
    gap = found.against(found.best_peer, "best")
    assert gap is not None and at_or_above(gap) is ahead_of_best and page._verdict(gap).endswith(word)


def test_nobody_ran() -> None:
    found = standing(5, 0, "failed: x", "unsupported: y")
    assert found.best_peer is None and found.median_peer is None and found.median_loss is None
    assert found.against(found.best_peer, "best") is None


def test_an_effort_that_did_not_run_is_held_against_nobody() -> None:
    found = standing(5, 0, 40)
    assert found.against("peer0", "best") is not None and found.against("peer0", "fast") is None


def test_the_page_tells_gaps_failures_and_versions() -> None:
    cell = Cell("W4A4", 4, 4)
    found = {
        ("thin", cell): standing(5, 0, 40, "unsupported: it has no 4 bits"),
        ("vit", cell): standing(120, 0, 40, "failed: Traceback\n  File\nValueError: planted"),
    }
    versions = {"peer0": {"torch": "9.9"}, "bitport": {"onnxruntime": "7.7"}}
    text = page.section(
        found, versions, {"vit": [0]}, {"peer0": "requirements.txt: log\nERROR: planted too"}, ["a CPU"]
    )
    assert text.startswith(CONTEST)
    assert "peer0: 4.00 (" in text and ": ahead |" in text and ": behind |" in text
    assert "`best` above the best peer, or tied with it, in 1 of 2 cells" in text
    assert "(behind: vision transformer W4A4)" in text
    assert "torch 9.9" in text and "**bitport** (onnxruntime 7.7)" in text
    assert "environment: ERROR: planted too" in text and "Seed by seed" not in text
    assert "unsupported: it has no 4 bits" in text and "failed: ValueError: planted" in text


def test_the_page_tells_every_seed() -> None:
    own, other = (
        pooled([RIGHT, RIGHT], [wrong(a), wrong(b)], [1.0, 1.0], text=False) for a, b in ((10, 30), (50, 70))
    )
    found = {("thin", Cell("W4A4", 4, 4)): Standing(False, {"best": own}, {"peer": other})}
    text = page.section(found, {}, {"vit": [0, 1], "mobile": [0, 1], "gpt": [1]}, {}, ["a CPU"])
    by_seed = text.partition("Seed by seed (0, 1; byte GPT: 1)")[2].splitlines()
    row = next(line for line in by_seed if "| W4A4 |" in line)
    told = [[each.split(" ")[0] for each in cell.strip().split(" · ")] for cell in row.split("|")[3:-1]]
    assert told == [["–"], ["1.00", "3.00"], ["5.00", "7.00"]]


def test_a_section_is_replaced_and_survives_the_rest_of_its_page(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "page.md"
    publish("# Benchmarks\n\none\n", path)
    publish_section(f"{CONTEST}\n\nfirst\n", path, CONTEST)
    publish_section(f"{CONTEST}\n\nsecond\n", path, CONTEST)
    publish("# Benchmarks\n\ntwo\n", path)
    assert path.read_text() == f"# Benchmarks\n\ntwo\n\n{CONTEST}\n\nsecond\n"
    assert "second" in capsys.readouterr().out


# --------------------------------------------------------------------------- jobs


def test_every_cell_is_run_by_everyone_seed_after_seed() -> None:
    found = list(contest.jobs(["bitport", "other"], ["thin", "gpt"], [], [0, 1]))
    assert [job.seed for job in found] == sorted(job.seed for job in found)
    assert len(found) == 2 * (4 + 6) * (len(contest.EFFORTS) + 1)
    assert len({job.place(Path()) for job in found}) == len(found)
    (only,) = contest.jobs(["other"], ["thin"], ["W4A4"], [0])
    assert only.cell.activations == 4


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    seen: list[Job] = []

    def run(job: Job, out: Path, folder: Path, limit: int) -> dict[str, Any]:
        seen.append(job)
        return {"seconds": 1.0}

    monkeypatch.setattr(contest, "_ran", run)
    return seen


def test_what_has_run_is_not_run_again_until_something_changes(
    ran: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("other", "thin", 0, Cell("W4A4", 4, 4))
    first = contest.run(job, tmp_path)
    assert contest.run(job, tmp_path) == first and len(ran) == 1
    contest.run(Job("other", "thin", 0, Cell("W4A4", 4, 8)), tmp_path)
    assert len(ran) == 2
    monkeypatch.setattr(contest, "sources", lambda name: "changed")
    contest.run(job, tmp_path)
    assert len(ran) == 3


def test_what_failed_is_run_again_on_request_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = iter([{"failed": "too slow"}, {"seconds": 1.0}])
    monkeypatch.setattr(contest, "_ran", lambda *given: next(results))
    job = Job("other", "thin", 0, Cell("W4A4", 4, 4))
    assert "failed" in contest.run(job, tmp_path) and "failed" in contest.run(job, tmp_path)
    assert contest.run(job, tmp_path, again=True)["seconds"] == 1.0
    assert (
        contest.run(job, tmp_path, again=True)["seconds"] == 1.0
    )  # nothing failed: it isn't run a third time


@pytest.mark.parametrize(
    ("script", "limit", "wanted"),
    [
        ("import sys; sys.stderr.write('no way\\n'); sys.exit(3)", 60, {"unsupported": "no way"}),
        ("raise ValueError('planted')", 60, {"failed": "ValueError: planted"}),
        ("import time; time.sleep(30)", 1, {"failed": "it took more than 1 s"}),
        ("pass", 60, {"failed": "it ended with 0"}),
    ],
)
def test_how_a_run_can_end(
    script: str, limit: int, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {contest.sys.executable} -c "{script}"\n')
    python.chmod(0o755)
    monkeypatch.setattr(contest, "environment", lambda name, folder: (python, ""))
    monkeypatch.setattr(cells, "state_of", lambda *given: tmp_path)
    monkeypatch.setattr(cells, "data_of", lambda *given: dict.fromkeys(("calibration", "test"), tmp_path))
    found = contest.run(Job("hqq", "thin", 0, Cell("W4A4", 4, 4)), tmp_path, limit=limit)
    ((kind, said),) = wanted.items()
    assert said in found[kind]
    record = json.loads(
        (Job("hqq", "thin", 0, Cell("W4A4", 4, 4)).place(tmp_path) / "record.json").read_text()
    )
    assert record == found


def test_a_tool_without_an_environment_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "environment", lambda name, folder: (None, "no such version"))
    found = contest.run(Job("hqq", "thin", 0, Cell("W4A4", 4, 4)), tmp_path)
    assert "no such version" in found["failed"]


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tool `planted` with two files of requirements, a pip that fails where they say "bad"; what it was asked for."""
    seen: list[str] = []
    monkeypatch.setattr(contest, "HERE", tmp_path / "peers")
    (tmp_path / "peers" / "planted").mkdir(parents=True)
    (tmp_path / "folder" / "env").mkdir(parents=True)
    contest.environment.cache_clear()

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append(Path(command[-1]).name)
        bad = "bad" in Path(command[-1]).read_text()
        return subprocess.CompletedProcess(command, int(bad), "", "ERROR: no such version" if bad else "")

    monkeypatch.setattr(contest.subprocess, "run", run)
    monkeypatch.setattr(contest.venv, "create", lambda place, **options: place.mkdir(exist_ok=True))
    return seen


@pytest.mark.parametrize(
    ("first", "second", "asked", "works"),
    [
        ("good", "good too", ["requirements.txt"], True),
        ("bad", "good", ["requirements.txt", "requirements-2.txt"], True),
        ("bad", "bad too", ["requirements.txt", "requirements-2.txt"], False),
    ],
)
def test_the_second_requirements_are_tried_where_the_first_fail(
    first: str, second: str, asked: list[str], works: bool, pip: list[str], tmp_path: Path
) -> None:
    tool, folder = tmp_path / "peers" / "planted", tmp_path / "folder"
    (tool / "requirements.txt").write_text(first)
    (tool / "requirements-2.txt").write_text(second)
    python, said = contest.environment("planted", folder)
    assert pip == asked and (python is not None) is works
    assert ("requirements.txt: ERROR: no such version" in said) is (first == "bad")
    contest.environment.cache_clear()  # as in another process
    assert contest.environment("planted", folder) == (python, said)
    assert len(pip) == len(asked) * (1 if works else 2)  # what is made isn't made again


# --------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("make", "rescale"),
    [(subjects.ThinNet, subjects.rescaled), (subjects.MobileNet, subjects.rescaled_mobile)],
)
def test_a_twin_is_the_same_function_with_channels_far_apart(make: Any, rescale: Any) -> None:
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.weight.data.uniform_(0.8, 1.2)
    model.eval()
    x, _ = subjects.digits(16, 2, test=True)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        before = model(x)
        twin = rescale(model)
        after = twin(x)
    assert torch.allclose(before, after, rtol=0, atol=1e-4 * float(before.abs().max()))
    weights = [norm.weight.detach().abs() for norm in norms]
    spread = max(float(weight.max() / weight.min()) for weight in weights)
    assert spread > 20


# --------------------------------------------------------------------------- records


@pytest.mark.parametrize("found", [wrong(13), -np.linspace(0, 3, 96), np.zeros(3), np.ones(9)])
def test_scores_survive_their_record(found: Any) -> None:
    kept = records.unpack(records.pack(found))
    assert kept.dtype == np.float64 and np.allclose(kept, found, atol=1e-6) and len(kept) == len(found)


def test_a_record_is_told_apart_by_the_weights_of_its_network(tmp_path: Path) -> None:
    states = [{"a": torch.ones(3)}, {"a": torch.ones(3)}, {"a": torch.zeros(3)}, {"b": torch.ones(3)}]
    for index, state in enumerate(states):
        torch.save(state, tmp_path / f"{index}.pt")
    first, same, *others = (records.digest(tmp_path / f"{index}.pt") for index in range(4))
    assert first == same and first not in others and others[0] != others[1]


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job whose run has left outputs for four images, three of them right."""
    np.save(tmp_path / "labels.npy", np.array([0, 1, 0, 1]))
    monkeypatch.setattr(cells, "data_of", lambda *given: {"labels": tmp_path / "labels.npy"})
    job = Job("other", "thin", 0, Cell("W4A4", 4, 4))
    job.place(tmp_path).mkdir(parents=True)
    np.save(job.place(tmp_path) / "outputs.npy", np.eye(2, dtype=np.float32)[[0, 1, 0, 0]])
    return job


def test_outputs_are_scored_once_and_not_kept(judged: Job, tmp_path: Path) -> None:
    found = contest.scored(judged, tmp_path, {"seconds": 1.0, "key": "k"})
    assert records.unpack(found["scores"]).tolist() == [1, 1, 1, 0]
    assert not (judged.place(tmp_path) / "outputs.npy").exists()
    assert contest.scored(judged, tmp_path, found) == found
    assert json.loads((judged.place(tmp_path) / "record.json").read_text()) == found


def test_outputs_that_are_not_finite_have_failed(judged: Job, tmp_path: Path) -> None:
    np.save(judged.place(tmp_path) / "outputs.npy", np.full((4, 2), np.nan, dtype=np.float32))
    found = contest.scored(judged, tmp_path, {"seconds": 1.0, "key": "k"})
    assert found == {"failed": "its outputs are not finite", "key": "k"}


def test_records_of_several_seeds_make_one_table(tmp_path: Path) -> None:
    cell = Cell("W4A4", 4, 4)
    every = [Job(name, "thin", seed, cell, effort) for seed in (0, 1) for name, effort in
             (("bitport", "best"), ("peer", None), ("late", None))]  # fmt: skip
    for seed in (0, 1):
        ours = {"scores": records.pack(wrong(5)), "versions": {"x": "1"}, "commit": f"abc{seed}"}
        theirs = {"scores": records.pack(wrong(40 + seed)), "versions": {"y": "2"}}
        results = {
            "bitport-best: W4A4": {"seconds": 1.0, **ours},
            "peer: W4A4": {"seconds": 2.0, **theirs},
        }
        kept = records.Record("digest", "a CPU", records.pack(RIGHT), results)
        records.write(records.place(tmp_path, "thin", seed), kept)
    found = {("thin", seed): records.read(records.place(tmp_path, "thin", seed)) for seed in (0, 1)}
    (standing,) = contest.standings(every, found).values()
    assert standing.best_peer == "peer" and standing.peers["late"].reason.startswith(
        "unsupported: it has not run"
    )
    assert standing.ours["best"].loss.drop == pytest.approx(0.5) and standing.ours["best"].loss.n == 2000
    assert contest.versions(every, found) == {
        "bitport": {"x": "1", "commit": "abc0 and abc1"},
        "peer": {"y": "2"},
    }
