"""The metrics files: documented names, finite numbers, and the same bytes after a kill."""

import json

import numpy as np
import pytest

from jdistill.student import metrics
from jdistill.student.metrics import MetricsWriter


def write_steps(writer, steps):
    for step in steps:
        writer.write(step, {"loss": np.float32(1 / (step + 1)), "reward": step / 3}, {"step_s": 0.5 + step})


@pytest.mark.parametrize("cut", [1, 10, 10_000])
def test_files_continue_exactly_after_a_kill_within_a_line(tmp_path, cut):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        directory.mkdir()
        writer = MetricsWriter(directory)
        write_steps(writer, range(6))
        writer.close()
    for name in ("metrics.jsonl", "timings.jsonl"):  # step 5 half written, the checkpoint is of step 3
        text = (killed / name).read_text()
        (killed / name).write_text(text[:-cut] if cut < len(text) else text + '{"step": 6, "lo')
    writer = MetricsWriter(killed)
    writer.truncate_to(3)
    assert [line["step"] for line in metrics.read(killed / "metrics.jsonl")] == [0, 1, 2, 3]
    write_steps(writer, range(4, 6))
    writer.close()
    for name in ("metrics.jsonl", "timings.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(p.name for p in killed.iterdir()) == ["metrics.jsonl", "timings.jsonl"]


def test_each_line_is_flushed_at_once_and_timings_are_in_their_own_file(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(7, {"loss": np.float32(0.1)}, {"step_s": 2.0})
    (line,) = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line == {"step": 7, "loss": float(np.float32(0.1))}
    assert metrics.read(tmp_path / "timings.jsonl") == [{"step": 7, "step_s": 2.0}]
    writer.truncate_to(-1)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    writer.close()


def test_an_undocumented_name_or_a_non_finite_number_writes_nothing(tmp_path):
    writer = MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match=r"metric lozz is not documented: add it to student/metrics.py's METRICS"):
        writer.write(1, {"lozz": 1.0}, {})
    with pytest.raises(ValueError, match="TIMINGS"):
        writer.write(1, {"loss": 1.0}, {"loss": 1.0})
    with pytest.raises(ValueError, match="a metric that has no value is left out, never NaN"):
        writer.write(1, {"loss": float("nan")}, {"step_s": 1.0})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (tmp_path / "timings.jsonl").read_text() == ""


def test_no_name_is_both_reproducible_and_a_timing():
    assert not set(metrics.METRICS) & set(metrics.TIMINGS)
    assert all(metric.meaning and metric.unit for metric in (metrics.METRICS | metrics.TIMINGS).values())
