import json
import math

import pytest

from examples.llm.program.events import RunResult
from examples.llm.program.metrics_log import MetricsLog, read_metrics
from examples.llm.program.results import finished_result, write_result


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(0, part="held-out", loss=3.0, scores={"accuracy": 0.5})
        for step in (1, 2, 3):
            log.write(step, loss=3.0 - step)
            assert list(read_metrics(path))[-1] == {"step": step, "loss": 3.0 - step}  # at once
    return path


def test_a_run_that_goes_on_measures_nothing_twice(path):
    with MetricsLog(path, steps_done=2) as log:
        log.write(0, part="held-out", loss=3.0, scores={"accuracy": 0.5})
        log.write(3, loss=0.0)
        log.write(3, part="held-out", loss=1.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line.get("part")) for line in lines] == [
        (0, "held-out"), (1, None), (2, None), (3, None), (3, "held-out"),
    ]  # fmt: skip


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4, "loss": 1.0}', "\x00\x00"])
def test_a_torn_last_line_is_left_out(path, torn):
    with path.open("a") as file:
        file.write(torn)
    with MetricsLog(path, steps_done=9) as log:
        log.write(4, loss=5.0)
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2, 3, 4]


def test_a_new_run_begins_a_new_file(path):
    MetricsLog(path).__exit__()
    assert path.read_text() == ""


def test_what_is_no_number_is_null(path):
    with MetricsLog(path) as log:
        log.write(1, loss=float("nan"), scores={"perplexity": float("inf")})
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "scores": {"perplexity": None}}


def test_a_result_that_is_no_number_is_null_until_it_is_read(tmp_path):
    result = RunResult(
        method="sgd", seed=0, loss_before=1.0, loss_after=math.nan, scores_before={},
        scores_after={"perplexity": math.inf}, losses=[1.0, math.nan], step_seconds=[0.5, 0.5],
        state_bytes=0, peak_bytes=0, kept_step=2, continuation="",
        evaluations=[{"step": 2, "loss": math.nan, "scores": {"perplexity": 3.0}}],
    )  # fmt: skip
    write_result(result, {"rank": None}, tmp_path)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    content = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert content["loss_after"] is None and content["losses"] == [1.0, None]
    found = finished_result(tmp_path, {"rank": None})
    assert math.isnan(found.loss_after) and math.isnan(found.losses[1])
    assert math.isnan(found.scores_after["perplexity"]) and math.isnan(found.evaluations[0]["loss"])
    assert found.evaluations[0]["scores"] == {"perplexity": 3.0} and found.loss_before == 1.0
