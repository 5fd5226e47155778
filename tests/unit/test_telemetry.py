"""Guards traces across processes (by message headers and frame headers) and their export."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shared.errors import ConfigError
from shared.telemetry import (
    NO_TRACE,
    Telemetry,
    extract,
    from_frame,
    inject,
    under,
)
from shared.transport.base import HEADER_BYTES, FrameKind, Header


def make(kind: str, **options) -> tuple[Telemetry, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    return Telemetry(kind, f"{kind}-1", "test", exporter=exporter, **options), exporter


def through_a_frame(frame: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """The ids after they travelled in a packed header."""
    buffer = np.zeros(HEADER_BYTES, np.uint8)
    Header(FrameKind.DISPATCH, 1, 2, 3, trace_id=frame[0], span_id=frame[1]).pack_into(buffer)
    header = Header.unpack_from(buffer)
    return header.trace_id, header.span_id


def ids(span: ReadableSpan) -> tuple[int, int, int | None]:
    """(trace id, span id, parent's span id) of a finished span."""
    assert span.context is not None
    return span.context.trace_id, span.context.span_id, span.parent.span_id if span.parent else None


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exporter.get_finished_spans()
    return span


def test_one_trace_runs_from_gateway_over_attention_to_experts():
    (gateway, at_gateway), (attention, at_attention), (experts, at_experts) = map(
        make, ("gateway", "attention", "experts")
    )
    with gateway.span("completion", model="demo") as request:
        headers = inject(request)
    with attention.span("request", extract(headers)) as request:
        frame = attention.frame(request, first=True)
    experts.record("exchange", through_a_frame(frame), 1_000, 2_000, layer=3)
    assert gateway.shutdown() and attention.shutdown() and experts.shutdown()

    first, second, third = only(at_gateway), only(at_attention), only(at_experts)
    trace_id, gateway_span, _ = ids(first)
    assert ids(first) == (trace_id, gateway_span, None)
    assert ids(second) == (trace_id, ids(second)[1], gateway_span)
    assert ids(third) == (trace_id, ids(third)[1], ids(second)[1])
    assert (third.start_time, third.end_time, dict(third.attributes or {})) == (1_000, 2_000, {"layer": 3})
    assert first.resource.attributes["service.name"] == "moemesh-gateway"
    assert first.resource.attributes["service.instance.id"] == "gateway-1"
    assert first.resource.attributes["moemesh.mesh"] == "test"


def test_only_trace_layers_marks_exchanges_after_the_first():
    quiet, _ = make("attention")
    thorough, _ = make("attention", trace_layers=True)
    with quiet.span("a") as a, thorough.span("b") as b:
        assert quiet.frame(a) == NO_TRACE != quiet.frame(a, first=True)
        assert thorough.frame(b) != NO_TRACE


def test_a_trace_that_the_ratio_left_out_is_left_out_everywhere():
    gateway, at_gateway = make("gateway", ratio=0.0)
    attention, at_attention = make("attention", ratio=1.0, trace_layers=True)
    experts, at_experts = make("experts")
    with gateway.span("completion") as request:
        headers = inject(request)
    with attention.span("request", extract(headers)) as request:
        frame = attention.frame(request, first=True)
    experts.record("exchange", frame, 1, 2)
    for telemetry in (gateway, attention, experts):
        telemetry.shutdown()
    assert frame == NO_TRACE
    assert not [
        *at_gateway.get_finished_spans(),
        *at_attention.get_finished_spans(),
        *at_experts.get_finished_spans(),
    ]


def test_without_an_endpoint_nothing_is_recorded_but_a_foreign_trace_passes_through():
    off = Telemetry("gateway", "g", "test")
    parent = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    with off.span("completion", extract({"traceparent": parent})) as request:
        assert inject(request) == {"traceparent": parent}
    with off.span("completion") as request:
        assert inject(request) == {}
        assert off.frame(request, first=True) == NO_TRACE
    assert not off.tracing and off.shutdown()


@pytest.mark.parametrize("headers", [{}, {"traceparent": "nonsense"}, {"traceparent": "00-" + "0" * 32 + "-1-01"}])
def test_malformed_headers_start_a_new_trace(headers):
    telemetry, exporter = make("gateway")
    telemetry.start("completion", extract(headers)).end()
    telemetry.shutdown()
    assert only(exporter).parent is None


def test_a_failing_block_is_recorded_and_the_error_goes_on():
    telemetry, exporter = make("gateway")
    with pytest.raises(ValueError, match="bad"), telemetry.span("completion"):
        raise ValueError("bad")
    telemetry.shutdown()
    assert not only(exporter).status.is_ok


def test_a_span_started_by_hand_can_have_children():
    telemetry, exporter = make("attention")
    request = telemetry.start("request", from_frame(NO_TRACE))
    telemetry.start("prefill", under(request)).end()
    request.end()
    telemetry.shutdown()
    child, parent = exporter.get_finished_spans()
    assert ids(child)[2] == ids(parent)[1]


def test_recording_without_a_trace_touches_nothing():
    telemetry, exporter = make("experts")
    telemetry.record("exchange", NO_TRACE, time.time_ns(), time.time_ns())
    telemetry.shutdown()
    assert not exporter.get_finished_spans()


# ---- OTLP -------------------------------------------------------------------------------------------------


class Collector(ThreadingHTTPServer):
    """An OTLP/HTTP receiver; ``hold`` keeps it from answering."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []
        self.hold = threading.Event()
        self.hold.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert isinstance(self.server, Collector)
        self.server.hold.wait(10)
        self.server.requests.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def collector():
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.hold.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("suffix", ["", "/", "/v1/traces"])
def test_shutdown_sends_what_is_left_over_otlp(collector: Collector, suffix: str):
    telemetry = Telemetry("experts", "e1", "test", endpoint=collector.url + suffix)
    with telemetry.span("exchange", layer=7):
        pass
    assert telemetry.shutdown(10)
    ((path, request),) = collector.requests
    (resource,) = request.resource_spans
    (span,) = resource.scope_spans[0].spans
    assert path == "/v1/traces" and span.name == "exchange"
    assert span.attributes[0].key == "layer" and span.attributes[0].value.int_value == 7
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "moemesh-experts"


def test_shutdown_does_not_wait_for_a_silent_collector(collector: Collector):
    collector.hold.clear()
    telemetry = Telemetry("experts", "e1", "test", endpoint=collector.url)
    with telemetry.span("exchange"):
        pass
    assert not telemetry.shutdown(0.05)
    assert not collector.requests
    assert telemetry.shutdown(0.05), "a second call has nothing left to do"


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://collector:4317", "http://"])
def test_an_unusable_endpoint_is_refused_by_name(endpoint: str):
    with pytest.raises(ConfigError, match="--otlp-endpoint"):
        Telemetry("gateway", "g", "test", endpoint=endpoint)


def test_a_ratio_out_of_range_is_refused_by_name():
    with pytest.raises(ConfigError, match="--trace-ratio"):
        make("gateway", ratio=1.5)
