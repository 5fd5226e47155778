"""Guards the metrics text: names, kinds, and that a scrape sees the numbers of the moment."""

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from shared.metrics import CATALOGUE, Buckets, Sample, expert_samples, sample
from shared.telemetry import Telemetry


def scrape(telemetry: Telemetry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = telemetry.render()[0].decode()
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_metrics_show_the_snapshot_of_the_moment():
    telemetry = Telemetry("attention", "a", "test")
    state = {"running": 3, "sent": 10}
    telemetry.collect(
        lambda: [
            sample("running", state["running"]),
            sample("exchange_bytes", state["sent"], direction="sent"),
            sample("exchange_bytes", 5, direction="received"),
        ]
    )
    assert scrape(telemetry)["moemesh_running", ()] == 3
    state.update(running=4, sent=11)
    seen = scrape(telemetry)
    assert seen["moemesh_running", ()] == 4
    assert seen["moemesh_exchange_bytes_total", (("direction", "sent"),)] == 11
    assert seen["moemesh_exchange_bytes_total", (("direction", "received"),)] == 5


def test_a_histogram_counts_at_or_below_each_edge():
    buckets = Buckets((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        buckets.observe(value)
    telemetry = Telemetry("gateway", "g", "test")
    telemetry.collect(lambda: [sample("time_to_first_token_seconds", buckets)])
    seen, name = scrape(telemetry), "moemesh_time_to_first_token_seconds"
    assert [seen[f"{name}_bucket", (("le", edge),)] for edge in ("1.0", "2.0", "+Inf")] == [2, 3, 4]
    assert (seen[f"{name}_count", ()], seen[f"{name}_sum", ()]) == (4, 12.0)


def test_tokens_per_expert_carry_the_checkpoint_layer():
    counts = np.zeros((2, 4), np.int64)
    counts[1, 3] = 12
    telemetry = Telemetry("experts", "e", "test")
    telemetry.collect(lambda: expert_samples("expert_tokens", counts, (0, 5)))
    tokens = {k[1]: v for k, v in scrape(telemetry).items() if k[0] == "moemesh_expert_tokens_total"}
    assert tokens == {(("expert", "3"), ("layer", "5")): 12}


def test_every_metric_of_the_catalogue_renders():
    telemetry = Telemetry("gateway", "g", "test")
    telemetry.collect(lambda: [sample(n, Buckets() if CATALOGUE[n][0] == "histogram" else 1) for n in CATALOGUE])
    telemetry.collect(lambda: [Sample("special", "gauge", "Not in the catalogue.", {}, 2)])
    names = {name for name, _ in scrape(telemetry)}
    assert {"moemesh_special", "moemesh_kv_blocks_used", "moemesh_exchange_seconds_sum"} <= names
    assert "process_resident_memory_bytes" in names


def test_telemetry_objects_share_nothing():
    one, two = Telemetry("gateway", "g1", "test"), Telemetry("gateway", "g2", "test")
    one.collect(lambda: [sample("running", 1)])
    assert ("moemesh_running", ()) in scrape(one) and ("moemesh_running", ()) not in scrape(two)
