"""kill −9 at random instants of whole compressions: the old artifact or the new one is whole, and work goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import small

KILLED = """
import functools, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import bitport
from bitport import api, checkpoint
from bitport.proof import cost
from tests import small
cost.latency = functools.partial(cost.latency, seconds=0.03, rounds=8)
cost.run_memory = lambda *_: 1
api.render = lambda folder: (folder / "report.html").write_text("<!doctype html>")
checkpoint.EVERY = 0.0  # a checkpoint behind every step: kills fall into their writing, too
place, instants = Path(sys.argv[1]), int(sys.argv[2])
out, old = place / "out", place / "old"
new = list(small.patterns(32, seed=8)[0].split(8))
REPRODUCIBLE = ("model.pt2", "graph.pt2", "plan.json", "recipe.toml", "reference/graph.pt2")

def run():
    small.compressed(out, data=new, effort="best")

def files(folder):
    content = small.content(folder)
    return {name: content[name] for name in REPRODUCIBLE if name in content}

small.compressed(old)
before = small.content(old)
run()  # the first of a process compiles and caches
started = time.monotonic()
run()
duration = time.monotonic() - started
wanted = files(out)
assert len(wanted) >= 4 and wanted != files(old)
random.seed(11)
seen = {"old": 0, "new": 0}
resumed = 0
for attempt in range(instants):
    shutil.rmtree(out)
    shutil.copytree(old, out)
    if attempt % 2:  # the other half goes on from what the last one left
        shutil.rmtree(place / ".out.checkpoint", ignore_errors=True)
    resumed += any((place / ".out.checkpoint").glob("0*"))
    child = os.fork()
    if child == 0:
        run()
        os._exit(0)
    # the first kill falls behind the publication, in case that random instants miss it
    time.sleep(2 * duration + 1 if attempt == 0 else random.uniform(0.0, 1.1 * duration))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    bitport.Artifact.load(out)  # every file is what its manifest says
    content = small.content(out)
    is_old = content == before
    assert is_old or files(out) == wanted, attempt
    seen["old" if is_old else "new"] += 1
run()
assert files(out) == wanted
left = sorted(entry.name for entry in place.iterdir())
assert left == ["old", "out"], left
print(seen["old"], seen["new"], resumed)
"""


@pytest.mark.slow
def test_kill_9_at_random_instants_of_a_compression(tmp_path: Path) -> None:
    instants = 50
    done = small.python(KILLED, tmp_path, instants, seconds=280)
    assert done.returncode == 0, done.stderr
    old, new, resumed = map(int, done.stdout.split())
    assert old + new == instants
    assert old >= instants // 4 and new >= 1
    assert resumed >= 1
