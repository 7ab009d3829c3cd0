import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from benchmarks.speed import page as pages
from benchmarks.speed.contestants import BASELINE, BY_NAME, CONTESTANTS, FUSED_BLOCK, PLAIN, SGD
from benchmarks.speed.jax_steps import ORDERS, JaxStep
from benchmarks.speed.jobs import Job
from benchmarks.speed.measure import groups, start
from benchmarks.speed.plan import FULL, PARTS, QUICK
from benchmarks.speed.rounds import Rounds, Runner, interleave
from benchmarks.speed.workloads import SMOLLM2, Workload, power_of_two, square

REPOSITORY = Path(__file__).parents[2]
WRITTEN = (pages.RESULTS, pages.PAGE, pages.FIGURE)


class FakeRunner(Runner):
    def __init__(self, log, name, seconds, clock):
        self.log, self.name, self.seconds, self.clock = log, name, seconds, clock

    def fill(self):
        self.clock.now += 1000  # must not be counted

    def step(self):
        self.log.append(self.name)
        self.clock.now += self.seconds


class FakeClock:
    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr("benchmarks.speed.rounds.time", clock)
    return clock


def test_contestants_take_turns_and_slow_ones_sit_out(clock):
    log = []
    runners = {
        name: FakeRunner(log, name, seconds, clock)
        for name, seconds in (("fast", 1.0), ("slow", 4.0))
    }
    seconds = interleave(runners, Rounds(seconds=8, least=2, most=4))
    assert seconds == {"fast": [1.0] * 4, "slow": [4.0] * 2}
    assert log[2:] == ["fast", "slow", "fast", "fast", "slow", "fast"]


def test_short_steps_are_averaged_over_a_sample(clock):
    log = []
    seconds = interleave({"a": FakeRunner(log, "a", 0.004, clock)}, Rounds(0.02, 1, 9))
    assert seconds["a"] == [pytest.approx(0.004)]
    assert len(log) == 1 + 5


def test_groups_fit_into_memory_with_their_references():
    contestants = [each for each in CONTESTANTS if "large" in each.parts and not each.peers]
    n = FULL.large.elements
    found = groups(contestants, FULL.large, limit=4 * 12 * n)
    assert len(found) > 1
    names = [[member.name for member in group] for group in found]
    assert all(group[0] == BASELINE and len(group) <= 4 for group in names)
    assert all(member.reference in [m.name for m in group] for group in found for member in group)
    assert {name for group in names for name in group} == {each.name for each in contestants}
    assert len(groups(contestants, FULL.large, limit=10**12)) == 1
    # Where nothing fits, in pairs.
    assert max(map(len, groups(contestants, FULL.large, limit=0))) == 3  # with optax.sgd


def test_groups_without_followers():
    for names in ([BASELINE], [BASELINE, SGD]):
        (group,) = groups([BY_NAME[name] for name in names], square(8), limit=10**9)
        assert [member.name for member in group] == names


def test_workloads():
    assert SMOLLM2.elements == 134_515_008  # of the published model
    assert len(SMOLLM2.shapes) == 1 + 30 * 9 + 1
    assert [power_of_two(k).elements for k in (15, 16)] == [2**15, 2**16]


def test_job_survives_json():
    for part in PARTS:
        for job in QUICK.jobs(part):
            assert Job.from_json(json.dumps(dataclasses.asdict(job))) == job


def test_every_part_has_its_contestants():
    for part in PARTS:
        names = {name for job in FULL.jobs(part) for name in job.contestants}
        assert BASELINE in names and FUSED_BLOCK in names
        assert (PLAIN["jax"] in names) == (part == "training")


@pytest.fixture
def users_settings():
    """JAX as the benchmark's processes have it; peers don't run under strict promotion."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(
    "contestant", [each for each in CONTESTANTS if not each.missing() and each.framework == "jax"],
    ids=lambda each: each.name,
)  # fmt: skip
def test_order_of_arguments_is_nothing_but_speed(contestant, users_settings):
    workload = Workload("small", ((48, 256), (256,)))
    runners = [JaxStep(contestant.make(), workload, order) for order in ORDERS]
    before = jax.tree.map(np.asarray, runners[0].held["params"])
    for runner in runners:
        runner.fill()
        runner.step()
    ours, theirs = (runner.held["params"] for runner in runners)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-7)
    for old, new in zip(before, ours):
        assert np.mean(old != np.asarray(new)) > 0.9


def test_adamw_moves_28_bytes_an_element(users_settings):
    runner = JaxStep(BY_NAME[BASELINE].make(), square(64))
    assert pages.bytes_moved(runner.nbytes) == 28 * 64**2 + 2 * 4  # and the count


def test_peer_that_raises_is_noted_and_an_own_error_is_raised():
    def make():
        raise RuntimeError("no such processor\nand more")

    job = QUICK.jobs("matrix")[0]
    own = dataclasses.replace(BY_NAME[BASELINE], name="a", make=make)
    refused = {}
    assert start(job, dataclasses.replace(own, peers=("jax",)), refused) is None
    assert refused == {"a": "RuntimeError: no such processor"}
    with pytest.raises(RuntimeError, match="no such processor"):
        start(job, own, refused)


def timed(seconds):
    return {
        "minimum": min(seconds),
        "median": float(np.median(seconds)),
        "seconds": seconds,
        "first_step": 1.5,
        "bytes": {"params": 4000, "state": 8000, "grads": 4000},
        "details": {"donated": "params, state, grads", "custom calls": ["kernel"]},
    }


@pytest.fixture
def results():
    bandwidth = {"bytes": 2**22, "minimum": 1e-4, "median": 2e-4, "seconds": [1e-4, 2e-4, 2e-4]}
    groups = [
        {
            "bandwidth": bandwidth,
            "contestants": {BASELINE: timed([2.0, 4.0, 4.0]), "adamw4bit": timed([1.0, 1.0, 1.0])},
        },
        {
            "bandwidth": bandwidth,
            "contestants": {BASELINE: timed([1.0, 2.0, 2.0]), FUSED_BLOCK: timed([0.5, 1.0, 1.0])},
        },
    ]
    job = {"workload": "one matrix", "elements": 1000, "leaves": 1, "cores": 2, "refused": {}}
    run = {"command": "command", "date": "today", "machine": "machine", "versions": {"jax": "1"}}
    part = {"run": run, "seconds": 3.0, "not installed": ["torch"]}
    return {"matrix": part | {"jobs": [job | {"groups": groups}]}}


def test_ratios_are_to_the_baseline_of_the_same_group(results):
    found = pages.collected(results["matrix"]["jobs"][0])
    assert {name: each["ratio"] for name, each in found.items()} == {
        BASELINE: 1.0, "adamw4bit": 0.5, FUSED_BLOCK: 0.5,
    }  # fmt: skip
    assert found["adamw4bit"]["median ratio"] == 0.25
    assert found[BASELINE]["minimum"] == 1.0 and found[BASELINE]["median"] == 2.0
    assert len(found[BASELINE]["seconds"]) == 6


def test_page_shows_what_was_measured(results):
    results["matrix"]["jobs"][0]["refused"]["bitsandbytes AdamW8bit"] = "RuntimeError: no"
    text = pages.page(results)
    row = next(line for line in text.splitlines() if line.startswith("| adamw4bit |"))
    # 28 bytes an element at 2^22 / 1e-4 bytes a second, against 1 ms an element.
    bound = 1e-3 / (28 / (2**22 / 1e-4))
    cells = ["0.50", "0.25", "1000000.00", "1000000.00", "8.00", "28.00", f"{bound:.1f}", "1.5"]
    assert row == f"| adamw4bit | {' | '.join(cells)} |"
    assert "Left out: torch, which was not installed; bitsandbytes AdamW8bit" in text
    assert "custom calls (`kernel`)" in text
    assert "array of 2 MiB" in text


def test_runs_with_the_same_setting_are_told_once(results):
    results["large"] = results["matrix"]
    assert pages.page(results).count("matrix, large (6 s)") == 1


@pytest.mark.slow
def test_quick_run_measures_every_part_and_writes_nothing(tmp_path):
    before = [path.read_bytes() if path.exists() else None for path in WRITTEN]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", "--quick"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert before == [path.read_bytes() if path.exists() else None for path in WRITTEN]
    titles = re.findall(r"^## (.+)$", process.stdout, re.MULTILINE)
    assert titles == [*pages.TITLES.values(), "How this was measured"]
    # A row in each of four tables of steps, six by size, processors and instructions, and one more.
    rows = re.findall(rf"^\| {re.escape(FUSED_BLOCK)} \|(.+)\|$", process.stdout, re.MULTILINE)
    assert len(rows) == 4 + 2 + 2 + 2 + 1
    assert all(re.fullmatch(r"[-+.\d |]+", row) for row in rows)


def test_figure_is_drawn(results, tmp_path, monkeypatch):
    for name in ("RESULTS", "PAGE", "FIGURE"):
        monkeypatch.setattr(pages, name, tmp_path / getattr(pages, name).name)
    results["scaling"] = results["matrix"]
    pages.write_page(results)
    assert pages.FIGURE.read_bytes().startswith(b"\x89PNG")
    assert pages.PAGE.read_text() == pages.page(results)
