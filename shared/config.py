"""Settings of every service: one frozen dataclass each, one default each, read once in ``main.py``.

A field becomes the flag ``--max-model-len`` and the variable ``MOEMESH_MAX_MODEL_LEN``; flags win over variables, which
win over defaults. An unknown flag, a wrong type or a value out of range stops the service with the setting's name.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from shared.elastic.eviction import Eviction
from shared.errors import ConfigError
from shared.scheduling.policies import Policy

ENV_PREFIX = "MOEMESH_"
C = TypeVar("C")
ActuatorName = Literal["none", "local", "compose", "kubernetes", "external"]


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a help text; ``help`` names the unit."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class MeshConfig:
    """What every service needs."""

    mesh: str = setting("default", "name of the mesh; keeps several meshes apart on one NATS")
    nats: str = setting("nats://127.0.0.1:4222", "URL of the NATS server")
    id: str = setting("", "instance id; empty: the service kind and six random hex digits")
    node: str = setting("", "name of this host; empty: the kernel's boot id")
    model: str = setting("", "checkpoint directory or hub id; empty: the embedded demo model")
    device: str = setting("auto", "torch device: auto, cpu, cuda, cuda:1")
    threads: int = setting(0, "compute threads; 0: all cores")
    keep_awake: bool = setting(False, "keep cores from halting during a step; pools that share cores: one session")
    cores: str = setting("", "cores of the compute threads, e.g. 0,2-3; empty: whichever is free")
    metrics_host: str = setting("127.0.0.1", "address of the HTTP side (/metrics, /health, /ready)")
    metrics_port: int = setting(0, "port of the HTTP side; 0: any free port")
    otlp_endpoint: str = setting("", "OTLP/HTTP endpoint for traces, e.g. http://collector:4318; empty: no export")
    trace_ratio: float = setting(1.0, "share of traces that are recorded, 0 to 1; a caller's decision is kept")
    trace_layers: bool = setting(False, "one span per layer and exchange in sampled traces (slow)")
    log_level: str = setting("info", "debug, info, warning or error")
    drain_s: float = setting(30.0, "seconds that running work may take after SIGTERM")


@dataclass(frozen=True)
class AttentionConfig(MeshConfig):
    dtype: str = setting(
        "auto", "compute dtype: auto (the checkpoint's), float32, bfloat16; must be the same in both pools"
    )
    max_model_len: int = setting(0, "longest sequence in tokens; 0: what the model allows")
    max_num_seqs: int = setting(64, "most sequences in one step")
    max_batched_tokens: int = setting(512, "most rows in one step; longer prompts are prefilled in chunks")
    mixed_prefill: int = setting(80, "most prompt rows in a step while most requests generate: bounds their pauses")
    micro_batches: int = setting(0, "parts of a step that take turns with the experts, 1 or 2; 0: what measures faster")
    max_waiting: int = setting(256, "most requests in the queue; more are refused")
    kv_memory: str = setting("1GiB", "memory of the KV cache, e.g. 512MiB")
    block_size: int = setting(16, "tokens per KV block")
    prefix_cache: bool = setting(True, "keep KV blocks for prompts that begin with the same tokens")
    group_wait: float = setting(
        0.1, "share of a step for which it waits for other instances of its node, to read weights once; 0: alone"
    )
    phase: Literal["auto", "one", "direct", "relay"] = setting(
        "auto", "how a node's rows reach the experts: each by itself, by a leader, by relays; auto: what is fastest"
    )
    gate: Literal["auto", "experts", "attention"] = setting("auto", "the side that gates; auto: what is fastest")
    combine: Literal["auto", "exact", "partial"] = setting(
        "auto", "exact: experts send every part, summed in a fixed order; partial: a sum per row; auto: exact on a CPU"
    )
    exchange_deadline: float = setting(2.0, "seconds to wait for the replies of one exchange before it is repeated")
    no_home_deadline: float = setting(30.0, "seconds that requests wait while an expert has no live home")
    ucx_tls: str = setting("", "UCX transports, e.g. tcp; empty: UCX chooses")
    pace: str = setting("", "device profile, by name or file, whose times this instance keeps; empty: none")
    monolith: bool = setting(False, "hold every expert in this process: no expert instances and no exchange")


@dataclass(frozen=True)
class ExpertsConfig(MeshConfig):
    slots: int = setting(0, "most replicas on this instance; 0: no limit")
    expert_memory: str = setting(
        "", "memory for experts, e.g. 6GiB: homes beyond it come and go with the load; empty: all homes stay loaded"
    )
    expert_store: Literal["auto", "shared", "private"] = setting(
        "auto",
        "shared: experts are read where the checkpoint is mapped, for all of a host; private: copied; auto: by need",
    )
    predictor: str = setting(
        "",
        "directory of load predictors; empty: predictors/ beside the model, if it is there; none: nothing is foreseen",
    )
    predict_ahead: int = setting(2, "layers ahead for which experts are started")
    eviction: Eviction = setting(Eviction.FORESEEN, "who makes room: foreseen (called last), lru (called longest ago)")  # noqa: RUF009
    keep_alive: float = setting(600.0, "seconds after its last call when an expert is stopped; 0: never")
    keep_alive_policy: Literal["fixed", "window", "histogram"] = setting(
        "fixed",
        "fixed: --keep-alive; window: that and a grace period of 30 s; histogram: by each expert's own idle times, "
        "which also say when it is started ahead, and --keep-alive while few are known",
    )
    max_batched_tokens: int = setting(512, "most rows in one exchange; must be the attention pool's")
    dtype: str = setting(
        "auto", "compute dtype: auto (the checkpoint's), float32, bfloat16; must be the same in both pools"
    )
    ucx_tls: str = setting("", "UCX transports, e.g. tcp; empty: UCX chooses")
    pace: str = setting("", "device profile, by name or file, whose times this instance keeps; empty: none")


@dataclass(frozen=True)
class SchedulerConfig(MeshConfig):
    homes: int = setting(0, "homes per expert; 0: every instance on CPU (weights are shared), one on GPU")
    lease_s: float = setting(5.0, "seconds after which another scheduler may take over")
    prepare_deadline: float = setting(120.0, "seconds in which instances load a new placement, else it is aborted")
    rebalance_s: float = setting(0.0, "seconds between looks for a better placement; 0: only by hand")
    expert_scaling_s: float = setting(2.0, "seconds between looks at the loads of elastic experts; 0: homes stay")
    target_layer_ms: float = setting(
        0.0, "elastic experts get the fewest homes with which a layer takes so long; 0: as even as memory allows"
    )
    target_prefill_layer_ms: float = setting(
        0.0, "milliseconds of steps that compute prompts, --target-layer-ms being of the others then; 0: one for both"
    )
    actuator: ActuatorName = setting(  # noqa: RUF009
        "none",
        "who starts and stops instances: none, local (`moemesh up`), compose (Docker Engine), kubernetes "
        "(Deployments), external (whoever reads /desired or moemesh_desired_instances)",
    )
    docker_socket: str = setting("/var/run/docker.sock", "socket of the Docker Engine, for --actuator compose")
    compose_project: str = setting(
        "", "project whose services attention and experts are scaled; empty: the scheduler's"
    )
    kubernetes_url: str = setting("https://kubernetes.default.svc", "API server, for --actuator kubernetes")
    kubernetes_namespace: str = setting("", "namespace of the Deployments; empty: that of the service account")
    attention_deployment: str = setting("moemesh-attention", "Deployment of the attention pool")
    experts_deployment: str = setting("moemesh-experts", "Deployment of the expert pool")
    autoscale: Literal["off", "observe", "on"] = setting(
        "off", "size the pools by demand: off; observe (only say what would be done); on"
    )
    profile: str = setting("", "file of `moemesh profile`, of this model on these machines: what autoscaling plans by")
    slo_tpot_ms: float = setting(0.0, "milliseconds that a token after the first may take, mean; for autoscaling")
    slo_ttft_ms: float = setting(0.0, "milliseconds that a first token may take, mean; for autoscaling; 0: any")
    autoscale_min_attention: int = setting(1, "fewest attention instances")
    autoscale_max_attention: int = setting(0, "most attention instances; 0: as many as the profile measured")
    autoscale_min_experts: int = setting(1, "fewest expert instances; 0: none after --autoscale-idle-s")
    autoscale_max_experts: int = setting(0, "most expert instances; 0: as many as the profile measured")
    autoscale_window_s: float = setting(10.0, "seconds of a window by which autoscaling judges and foresees")
    autoscale_cooldown_s: float = setting(60.0, "seconds for which fewer instances must be enough before others go")
    autoscale_idle_s: float = setting(300.0, "seconds without a request after which the expert pool may go to 0")
    policy: Policy = setting(Policy.ACTIVATED, "choice among homes: activated, tokens, random, first")  # noqa: RUF009


@dataclass(frozen=True)
class GatewayConfig(MeshConfig):
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on; 0: any free port")
    served_model_name: str = setting("", "model name in the API; empty: the directory's or hub id's name")
    max_model_len: int = setting(0, "longest sequence in tokens; 0: what the attention pool reports")
    api_key: str = setting("", "bearer token that /v1 requires; empty: none")
    max_body: str = setting("8MiB", "largest request body")
    max_queue: int = setting(512, "most open requests; more get 503 with retry-after")
    request_deadline: float = setting(600.0, "seconds that a request may take")
    no_attention_deadline: float = setting(60.0, "seconds that a request waits for another attention instance")


def load_config(cls: type[C], environ: Mapping[str, str], flags: Mapping[str, Any] | None = None) -> C:
    """Build ``cls`` from flags (None = not given), then ``MOEMESH_*`` variables, then defaults.

    Raises ConfigError with the setting's name.
    """
    given = {k: v for k, v in (flags or {}).items() if v is not None}
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for f in fields(cls):  # type: ignore[arg-type]
        variable = ENV_PREFIX + f.name.upper()
        raw = given.get(f.name, environ.get(variable, MISSING))
        if raw is MISSING:
            continue
        name = "--" + f.name.replace("_", "-") if f.name in given else variable
        try:
            values[f.name] = TypeAdapter(hints[f.name]).validate_python(raw)
        except ValidationError as error:
            raise ConfigError(name, f"{raw!r}: {error.errors()[0]['msg'].lower()}") from error
    return cls(**values)


def parse_cores(name: str, text: str) -> set[int]:
    """``"0,2-3"`` -> {0, 2, 3}; empty for none. Raises ConfigError for the setting ``name``."""
    try:
        ranges = [part.split("-") for part in text.split(",") if part.strip()]
        return {core for ends in ranges for core in range(int(ends[0]), int(ends[-1]) + 1)}
    except ValueError as error:
        raise ConfigError(name, f"{text!r} is not a list of cores like 0,2-3") from error


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(name: str, text: str) -> int:
    """``"512MiB"`` -> 536870912. Raises ConfigError for the setting ``name``."""
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text.strip()[len(digits) :].lower()
    try:
        return int(float(digits) * _UNITS[unit])
    except (ValueError, OverflowError, KeyError) as error:
        raise ConfigError(name, f"{text!r} is not a size; write 512MiB or 2GiB") from error
