"""Traces and metrics of one process: a `Telemetry` object, made once in ``main.py`` and passed down.

Covers OpenTelemetry spans (exported over OTLP/HTTP only when an endpoint is configured), trace context in
control messages and in frame headers, and the registry behind ``/metrics``. Not here: counting
(shared/metrics.py) and the HTTP side (shared/lifecycle.py).
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from shared.errors import ConfigError
from shared.metrics import Sample, SnapshotCollector

NO_TRACE = (bytes(16), bytes(8))
"""Trace and span id of a frame that nobody traces."""
Attribute = str | int | float | bool
_W3C = TraceContextTextMapPropagator()


class Telemetry:
    """What one instance tells of itself. Spans cost next to nothing when there is no endpoint.

    Args:
        kind: service kind; ``service.name`` becomes ``moemesh-<kind>``.
        endpoint: OTLP/HTTP base URL or full URL of the traces signal; empty: no spans are made.
        ratio: share of traces without a sampled or unsampled parent that are recorded, 0 to 1.
        trace_layers: mark every exchange of a sampled request, not only the first one.
        exporter: instead of OTLP, e.g. in memory.

    Raises ConfigError for an unusable endpoint or ratio.
    """

    def __init__(
        self,
        kind: str,
        instance: str,
        mesh: str,
        *,
        endpoint: str = "",
        ratio: float = 1.0,
        trace_layers: bool = False,
        exporter: SpanExporter | None = None,
    ) -> None:
        if not 0 <= ratio <= 1:
            raise ConfigError("--trace-ratio", f"{ratio} is not between 0 and 1")
        exporter = exporter or (_otlp_exporter(endpoint) if endpoint else None)
        self.trace_layers = trace_layers
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._provider: TracerProvider | None = None
        if exporter is not None:
            self._provider = _provider(f"moemesh-{kind}", instance, mesh, ratio, exporter)
        self._tracer = self._provider.get_tracer("moemesh") if self._provider else trace.NoOpTracer()

    # ---- spans ------------------------------------------------------------------------------------------

    @property
    def tracing(self) -> bool:
        """True when spans go anywhere."""
        return self._provider is not None

    def start(self, name: str, parent: Context | None = None, **attributes: Attribute) -> Span:
        """A started span; the caller ends it. ``parent`` comes from `extract`, `under` or `from_frame`."""
        return self._tracer.start_span(name, parent or Context(), attributes=attributes)

    @contextmanager
    def span(self, name: str, parent: Context | None = None, **attributes: Attribute) -> Iterator[Span]:
        """A span around a block; an exception is recorded in it and goes on."""
        span = self.start(name, parent, **attributes)
        with trace.use_span(span, end_on_exit=True):
            yield span

    def record(
        self,
        name: str,
        frame: tuple[bytes, bytes],
        start_ns: int,
        end_ns: int,
        **attributes: Attribute,
    ) -> None:
        """A span of work that is over (``time.time_ns``), under the span in a frame's header, if any."""
        if self._provider is None or frame == NO_TRACE:
            return
        span = self._tracer.start_span(name, from_frame(frame), attributes=attributes, start_time=start_ns)
        span.end(end_ns)

    def frame(self, span: Span, first: bool = False) -> tuple[bytes, bytes]:
        """Trace and span id for a frame header; NO_TRACE when this exchange is not to be seen.

        Only sampled spans are, and without ``trace_layers`` only the ``first`` exchange of a request: a span
        per layer and step is too many for every day.
        """
        context = span.get_span_context()
        if not context.trace_flags.sampled or not (first or self.trace_layers):
            return NO_TRACE
        return context.trace_id.to_bytes(16, "big"), context.span_id.to_bytes(8, "big")

    # ---- metrics ----------------------------------------------------------------------------------------

    def collect(self, read: Callable[[], Iterable[Sample]]) -> None:
        """Show what ``read`` returns on ``/metrics``; it runs in the thread that scrapes."""
        self.registry.register(SnapshotCollector(read))

    def render(self) -> tuple[bytes, str]:
        """Body and content type for ``/metrics``."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def shutdown(self, deadline_s: float = 2.0) -> bool:
        """Send the spans that are left; False when the deadline passed first. Idempotent."""
        provider, self._provider = self._provider, None
        if provider is None:
            return True
        # The SDK takes no deadline here and may wait long for a silent collector: leave it behind in a daemon.
        flush = threading.Thread(target=provider.shutdown, name="telemetry-flush", daemon=True)
        flush.start()
        flush.join(deadline_s)
        return not flush.is_alive()


def inject(span: Span) -> dict[str, str]:
    """W3C headers of ``span`` for a control message (`Submit.trace`); empty without a trace."""
    headers: dict[str, str] = {}
    _W3C.inject(headers, under(span))
    return headers


def extract(headers: Mapping[str, str]) -> Context:
    """The remote parent in W3C headers (lower-case names); empty when there is none or it is malformed."""
    return _W3C.extract(dict(headers), Context())


def under(span: Span) -> Context:
    """The context in which a new span becomes a child of ``span``."""
    return trace.set_span_in_context(span, Context())


def from_frame(frame: tuple[bytes, bytes]) -> Context:
    """The remote parent in a frame header (trace id 16 bytes, span id 8 bytes); empty for NO_TRACE."""
    if frame == NO_TRACE:
        return Context()
    trace_id, span_id = (int.from_bytes(part, "big") for part in frame)
    return under(NonRecordingSpan(SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(1))))


def _provider(name: str, instance: str, mesh: str, ratio: float, exporter: SpanExporter) -> TracerProvider:
    attributes = {"service.name": name, "service.instance.id": instance, "moemesh.mesh": mesh}
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(ratio), resource=Resource.create(attributes), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _otlp_exporter(endpoint: str) -> SpanExporter:
    """Raises ConfigError when ``endpoint`` is no HTTP URL."""
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise ConfigError("--otlp-endpoint", f"{endpoint!r} is not a URL like http://collector:4318")
    # Imported here: it brings an HTTP client and protobuf, which an instance without traces need not load.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint if url.path.strip("/") else endpoint.rstrip("/") + "/v1/traces")
