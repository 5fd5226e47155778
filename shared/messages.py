"""Every control message, as typed MessagePack: one small class each, validated where it enters a process.

Covers the NATS plane only; activations travel as binary frames (shared/transport/base.py). What gateways and attention
say to each other about requests is in shared/request_messages.py, reports of loads in shared/load_messages.py,
recorders of routing in shared/traces/wire.py.
Unknown fields are tolerated, so that versions can mix; new fields go last and have defaults.
"""

from enum import StrEnum
from typing import Annotated, ClassVar, Literal, Self, cast

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import BadMessage
from shared.scheduling.policies import Policy

MAX_EXPERT_INSTANCES = 64  # the live mask is one 64-bit word
U64 = Annotated[int, Field(ge=0, lt=1 << 64)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Message(BaseModel):
    """Base of all control messages."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=False)

    def encode(self) -> bytes:
        """MessagePack bytes of this message."""
        return cast(bytes, msgpack.packb(self.model_dump(), use_bin_type=True))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse and validate. Raises BadMessage for anything that is not a valid message of this class."""
        try:
            return cls.model_validate(msgpack.unpackb(data, raw=False, strict_map_key=False))
        except (ValueError, TypeError, msgpack.UnpackException, ValidationError) as error:
            raise BadMessage(cls.__name__, str(error)) from error


class Kind(StrEnum):
    GATEWAY = "gateway"
    ATTENTION = "attention"
    EXPERTS = "experts"
    SCHEDULER = "scheduler"


class Pool(StrEnum):
    """The kinds of which there may be more or fewer, by demand."""

    ATTENTION = "attention"
    EXPERTS = "experts"

    @property
    def kind(self) -> Kind:
        return Kind(self.value)


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


class ModelFacts(Message):
    """What an instance knows of the model it serves. Instances with another digest are refused at join."""

    name: str
    digest: str
    """Hex digest of config.json, the tensor index and the tokenizer (shared/models/loader.py)."""
    layers: Count
    moe_layers: tuple[int, ...]
    """Checkpoint indices of the layers that have routed experts, ascending."""
    experts: Count
    """Routed experts per MoE layer."""
    top_k: Count


class WayFacts(Message):
    """One line of an attention instance's cost table: exchanges of a size, and a way that they may go."""

    rows: Count
    """Of all members; exchanges of this many rows or fewer, and more than half as many."""
    members: Count
    way: str
    """phase/gate"""
    predicted_s: float
    """What the links alone cost."""
    measured_s: float | None
    """Median of the last trial, experts included; None: not tried."""
    chosen: bool


class AttentionFacts(Message):
    max_model_len: Count
    """Longest sequence (prompt and output), in tokens."""
    kv_blocks: Count
    block_size: Count
    """Tokens per KV block."""
    max_num_seqs: Count
    placement: Count = 0
    """Version of the placement that this instance uses now; 0 while it has none."""
    waiting: Count = 0
    running: Count = 0
    outstanding_tokens: Count = 0
    """Tokens still to be computed for accepted requests, the gateway's routing measure."""
    kv_blocks_used: Count = 0
    stalled: bool = False
    """True while requests wait for an expert home, or would."""
    monolith: bool = False
    """True: all experts are in this instance, so that it needs no placement."""
    address: bytes = b""
    """Worker address on the data plane, for instances of the same node; empty: it has none."""
    ways: tuple[WayFacts, ...] = ()
    """The cost table, where there is anything to choose."""


class ExpertCost(Message):
    """Byte-seconds of experts' memory since the start, in the three forms of shared/elastic/cost.py."""

    proxy: Annotated[float, Field(ge=0)] = 0.0
    resident: Annotated[float, Field(ge=0)] = 0.0
    provisioned: Annotated[float, Field(ge=0)] = 0.0


class ElasticFacts(Message):
    """Experts that come and go; counts since the start of the instance."""

    slots: Count
    """Most residents."""
    calls: Count = 0
    """Distinct experts of exchanges, summed over exchanges."""
    waits: Count = 0
    """Calls whose expert was not resident."""
    cold: Count = 0
    """Starts whose weights came from storage."""
    warm: Count = 0
    stops: Count = 0
    cost: ExpertCost = ExpertCost()
    broken: tuple[tuple[Count, Count], ...] = ()
    """(Layer, expert) that could not be started here: it should have another home."""


class ExpertFacts(Message):
    address: bytes
    """Worker address on the data plane; opaque."""
    placement: Count = 0
    """Newest placement version whose homes on this instance are all loaded."""
    replicas: Count = 0
    cores: tuple[Count, ...] = ()
    """Those that its compute thread may use, on a CPU."""
    slots: Count = 0
    """Most replicas of all layers together; 0: no limit."""
    refused: Count = 0
    """Version that this instance cannot take; the heartbeat's ``detail`` says why. 0: none."""
    elastic: ElasticFacts | None = None
    """None: all homes are resident."""


class ExpertCosts(Message):
    """Bytes of a replica, bytes per second of loading, seconds per activated expert; measured, 0 before."""

    replica_bytes: Count = 0
    load_rate: Annotated[float, Field(ge=0)] = 0.0
    expert_s: Annotated[float, Field(ge=0)] = 0.0


class PoolFacts(Message):
    """How many instances of a pool there should be, as the leading scheduler sees to it."""

    pool: Pool
    desired: Count
    problem: str = ""
    """Why the last change of its size has failed; empty: it has not."""


class AutoscaleFacts(Message):
    """What the autoscaler has seen, expects and would have. Seconds; 0 where nothing was measured or planned."""

    mode: Literal["observe", "on"]
    rate: Amount = 0.0
    """Requests per second in the last window,"""
    expected: Amount = 0.0
    """and in the next one."""
    prompt: Amount = 0.0
    """Mean tokens of a prompt,"""
    output: Amount = 0.0
    """and of an output."""
    open: Count = 0
    """Requests."""
    tpot_s: Amount = 0.0
    """Measured per token,"""
    ttft_s: Amount = 0.0
    """and to the first token, mean."""
    planned_tpot_s: Amount = 0.0
    measured_over_predicted: Amount = 1.0
    """Times per token, by which plans are corrected."""
    sizes: dict[Pool, Count] = Field(default_factory=dict)
    """That are right now."""
    why: str = ""
    """One line for a person: what these sizes follow from,"""
    doing: str = ""
    """and what is done, or why nothing is."""


class Heartbeat(Message):
    """Sent every second by every instance, and at once on a change of state."""

    kind: Kind
    id: str
    incarnation: U64
    """Random per process start: tells a restarted instance from its predecessor."""
    state: State
    node: str
    device: str = "cpu"
    version: str = ""
    url: str = ""
    """Base URL of the instance's HTTP side (/metrics, /health), empty when it has none."""
    detail: str = ""
    """One line for a person, e.g. loading progress or why a join was refused."""
    model: ModelFacts | None = None
    attention: AttentionFacts | None = None
    experts: ExpertFacts | None = None
    placement: Count = 0
    """Scheduler only: version of the committed placement."""
    paced: str = ""
    """Name of the device profile whose times this instance keeps instead of its own."""
    serial: Count = 0
    """Scheduler only: number of the stored PlacementRecord, so that the others read it."""
    costs: ExpertCosts | None = None
    pools: tuple[PoolFacts, ...] = ()
    """Leading scheduler only: pools whose size somebody has asked for."""
    autoscale: AutoscaleFacts | None = None
    """Leading scheduler only, while it sizes the pools."""


class Hello(Message):
    """Published by a newcomer; everyone answers with a heartbeat at once."""

    id: str


class Placement(Message):
    """Homes of every logical expert, and the policy: all that replica choice depends on, beside live instances."""

    version: Annotated[int, Field(ge=1)]
    epoch: U64
    """Epoch of the leader that wrote it."""
    author: str
    reason: str
    digest: str
    """Model digest that the homes belong to."""
    instances: Annotated[tuple[str, ...], Field(max_length=MAX_EXPERT_INSTANCES)]
    moe_layers: tuple[int, ...]
    experts: Count
    homes: bytes
    """uint64 little-endian [len(moe_layers), experts]: bit i is set where the expert may run on ``instances[i]``."""
    policy: Policy = Policy.ACTIVATED
    """How one of them is chosen."""


class Subjects:
    """Names on NATS for one mesh; the mesh name keeps several meshes apart on one server."""

    def __init__(self, mesh: str) -> None:
        self.prefix = f"moemesh.{mesh}"
        self.bucket = f"moemesh-{mesh}"
        """JetStream key-value bucket for what schedulers leave to their successors: placement, sizes of the pools."""
        self.leader_bucket = f"moemesh-{mesh}-leader"
        """Bucket of its own, because its keys expire."""

    PLACEMENT_KEY: ClassVar[str] = "placement"
    LEADER_KEY: ClassVar[str] = "leader"
    POOLS_KEY: ClassVar[str] = "pools"

    @property
    def hello(self) -> str:
        return f"{self.prefix}.hello"

    @property
    def heartbeats(self) -> str:
        return f"{self.prefix}.heartbeat.>"

    def heartbeat(self, kind: Kind, instance: str) -> str:
        return f"{self.prefix}.heartbeat.{kind.value}.{instance}"

    def attention(self, instance: str, verb: Literal["submit", "cancel", "resend", "ack"]) -> str:
        return f"{self.prefix}.attention.{instance}.{verb}"

    @property
    def activated(self) -> str:
        """Which experts exchanges activate."""
        return f"{self.prefix}.activated"

    @property
    def foreseen(self) -> str:
        """Which loads expert instances predict."""
        return f"{self.prefix}.foreseen"

    @property
    def served(self) -> str:
        """What gateways serve."""
        return f"{self.prefix}.served"

    def scheduler(self, verb: Literal["rebalance", "outcome", "scale"]) -> str:
        """Answered by the leading scheduler only."""
        return f"{self.prefix}.scheduler.{verb}"

    @property
    def resize(self) -> str:
        """Answered by the ``moemesh up`` that has started the mesh."""
        return f"{self.prefix}.up.resize"

    def tokens(self, gateway: str) -> str:
        return f"{self.prefix}.gateway.{gateway}.tokens"
