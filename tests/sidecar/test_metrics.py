"""The metrics as Prometheus reads them: text over HTTP."""

import re
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jdistill.sidecar.metrics import Metrics
from jdistill.wire.types import ServerState


@pytest.fixture
def scrape():
    """Returns `scrape(metrics)` -> {(name, labels): value}, {family: its HELP}, by a real HTTP request."""
    served = []

    def get(metrics):
        port = metrics.serve("127.0.0.1", 0)
        served.append(metrics)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
            families = list(text_string_to_metric_families(reply.read().decode()))
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }
        return samples, {family.name: family.documentation for family in families}

    yield get
    for metrics in served:
        metrics.close()


def test_every_metric_is_exported_under_its_name_with_unit_and_help_text(scrape):
    metrics = Metrics()
    metrics.watch(queued_tokens=lambda: 7, running_tokens=lambda: 11, open_calls=lambda: 2)
    metrics.call_ended("ScoreSequences", "OK", 0.03)
    metrics.call_ended("ScoreSequences", "OK", 3.0)
    metrics.call_ended("ScoreSequences", "RESOURCE_EXHAUSTED", 0.0)
    metrics.call_left_queue(0.3)
    metrics.call_cancelled()
    metrics.sequences_scored(1, 20, 12)
    metrics.sequences_scored(3, 30, 27)
    metrics.bytes_sent(1000)
    metrics.engine_failed("ENGINE_DEAD")
    metrics.state_changed(ServerState.SLEEPING)
    samples, helps = scrape(metrics)
    assert samples["jdistill_calls_total", (("code", "OK"), ("method", "ScoreSequences"))] == 2
    assert samples["jdistill_calls_total", (("code", "RESOURCE_EXHAUSTED"), ("method", "ScoreSequences"))] == 1
    method = ("method", "ScoreSequences")
    assert samples["jdistill_call_duration_seconds_sum", (method,)] == pytest.approx(3.03)
    assert samples["jdistill_call_duration_seconds_bucket", (("le", "0.05"), method)] == 2
    assert samples["jdistill_call_duration_seconds_bucket", (("le", "5.0"), method)] == 3
    assert samples["jdistill_queue_duration_seconds_bucket", (("le", "0.25"),)] == 0
    assert samples["jdistill_queue_duration_seconds_bucket", (("le", "0.5"),)] == 1
    assert samples["jdistill_cancelled_calls_total", ()] == 1
    assert samples["jdistill_scored_sequences_total", ()] == 4
    assert samples["jdistill_scored_tokens_total", ()] == 50
    assert samples["jdistill_scored_positions_total", ()] == 39
    assert samples["jdistill_sent_bytes_total", ()] == 1000
    assert samples["jdistill_engine_errors_total", (("reason", "ENGINE_DEAD"),)] == 1
    assert samples["jdistill_queued_tokens", ()] == 7
    assert samples["jdistill_running_tokens", ()] == 11
    assert samples["jdistill_open_calls", ()] == 2
    assert samples["process_resident_memory_bytes", ()] > 1 << 20
    ours = {n: text for n, text in helps.items() if n.startswith("jdistill_") and not n.endswith("_created")}
    assert len(ours) == 13 and all(re.fullmatch(r"[A-Z].{10,}\.", text) for text in ours.values()), ours


def test_exactly_one_state_is_true_and_it_is_the_last(scrape):
    metrics = Metrics()
    for state in ServerState:
        metrics.state_changed(state)
    samples, _ = scrape(metrics)
    states = {dict(labels)["jdistill_state"]: value for (name, labels), value in samples.items() if "_state" in name}
    assert states == {"loading": 0, "serving": 0, "sleeping": 0, "draining": 1}


def test_two_services_in_one_process_count_apart():
    first, second = Metrics(), Metrics()
    first.bytes_sent(5)
    assert first.registry.get_sample_value("jdistill_sent_bytes_total") == 5
    assert second.registry.get_sample_value("jdistill_sent_bytes_total") == 0


def test_closing_frees_the_metrics_port_and_a_port_in_use_is_an_error():
    first, second = Metrics(), Metrics()
    port = first.serve("127.0.0.1", 0)
    with pytest.raises(OSError, match="in use"):
        second.serve("127.0.0.1", port)
    first.close()
    first.close()
    assert second.serve("127.0.0.1", port) == port
    second.close()
