"""Memory is asked for before any work: what a run takes at least, what is left, and by whose limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import small
from tests.flow import Net, tokens
from torch import nn

import bitport
from bitport.errors import BitportError, NotEnoughMemory
from bitport.proof import preflight


def test_values_that_live_at_once_are_counted_and_views_are_not() -> None:
    net = Net(
        lambda m, x: (lambda y: torch.relu(y) + y.transpose(1, 2).reshape(y.shape))(m.a(x)),
        a=nn.Linear(12, 8),
    )
    graph = bitport.load(net, tokens(2))
    size = 5 * 6 * 8 * 4  # of one value of a batch of 5; y, its relu and the copy by reshape at most
    assert 2 * size <= preflight.live_bytes(graph, [tokens(5)]) <= 4 * size
    assert preflight.live_bytes(graph, [tokens(50)]) == 10 * preflight.live_bytes(graph, [tokens(5)])


def test_tied_weights_count_once() -> None:
    net = Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(12, 12), b=nn.Linear(12, 12))
    net.b.weight = net.a.weight
    assert preflight.weight_bytes(bitport.load(net, tokens(2))) == (12 * 12 + 24) * 4


def test_too_little_is_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = bitport.load(small.tiny(), small.patterns(1)[0])
    batch = [torch.empty(400_000, 1, 8, 8)]
    monkeypatch.setattr(preflight, "available", lambda: (3e8, "a limit"))
    said = (
        r"takes at least \d+\.\d GB of memory more than now \(weights 0\.0 GB, activations of a batch \d\.\d GB\), "
        r"and 0\.3 GB are left \(a limit\): use smaller batches; BITPORT_MEMORY_GB sets"
    )
    with pytest.raises(NotEnoughMemory, match=said):
        preflight.ask(graph, batch)
    preflight.ask(graph, [torch.empty(1, 1, 8, 8)])
    monkeypatch.setenv(preflight.LIMIT, "0")
    preflight.ask(graph, batch)
    monkeypatch.setenv(preflight.LIMIT, "400")
    preflight.ask(graph, batch)
    monkeypatch.setenv(preflight.LIMIT, "a lot")
    with pytest.raises(BitportError, match="BITPORT_MEMORY_GB = 'a lot': give the GB"):
        preflight.ask(graph, batch)


def test_a_small_run_is_never_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = bitport.load(small.tiny(), small.patterns(1)[0])
    monkeypatch.setattr(preflight, "available", lambda: (0.0, "a limit"))
    preflight.ask(graph, [torch.empty(16, 1, 8, 8)])


def test_weights_that_do_not_fit_have_another_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = bitport.load(Net(lambda m, x: m.a(x), a=nn.Linear(12, 2_000_000, bias=False)), tokens(2))
    monkeypatch.setattr(preflight, "available", lambda: (1e8, "a limit"))
    with pytest.raises(NotEnoughMemory, match=r"take a machine with more of it"):
        preflight.ask(graph, [tokens(1)])


def test_what_is_left_is_the_least_of_machine_group_and_limit(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 5000 kB\nSwapFree: 1000 kB\n")
    (proc / "self" / "cgroup").write_text("0::/user/job\n")
    assert preflight.available(proc, groups) == (6000 * 1024, "free on this machine")
    job = groups / "user" / "job"
    job.mkdir(parents=True)
    for folder, most, now, files in (
        (groups, "max", 10, 0), (job.parent, "3000", 2000, 0), (job, "2000", 1900, 500),
    ):  # fmt: skip
        (folder / "memory.max").write_text(most)
        (folder / "memory.current").write_text(str(now))
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {files}\n")
    assert preflight.available(proc, groups) == (600, "the control group's limit")
    (proc / "self" / "cgroup").write_text("4:cpu,memory:/job\n1:pids:/x\n")
    old = groups / "memory" / "job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("700")
    (old / "memory.usage_in_bytes").write_text("650")
    assert preflight.available(proc, groups) == (50, "the control group's limit")
    (proc / "meminfo").write_text("nothing of use")
    assert preflight.available(proc, groups)[0] == 50
