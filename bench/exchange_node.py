"""One process of bench/exchange.py: an attention or an expert instance without NATS. Commands on stdin, JSON lines out.

python bench/exchange_node.py experts|attention NUMBER NODE MODEL NETWORK_JSON SETUP_JSON
"""

import json
import queue
import sys
import threading
import time
from statistics import median
from typing import Any

import torch
from nodes import FarTransport, Network, Setup

from services.attention.exchange import ExpertInstance, Neighbour, View
from services.attention.mesh_exchange import MeshExchange
from services.attention.ways import Gate, Phase, Ways
from services.experts.answers import KnownPlacement, ServerLimits
from services.experts.build import warm_up
from services.experts.relay import Neighbour as ExpertNeighbour
from services.experts.server import ExpertServer
from shared.device_profile import DeviceProfile
from shared.exchange_frames import longest_frame
from shared.kernels.base import select_kernels
from shared.messages import Placement
from shared.models.loader import Checkpoint, open_checkpoint
from shared.models.moe import MoeLayer
from shared.pace import UNPACED, Pacer, sleep_exactly
from shared.transport.ucx import UcxTransport

MESH, MOST_ROWS, EXCHANGES = 77, 512, 6
GROUP_WAIT = 0.5
CPU = torch.device("cpu")


class Process:
    """What both kinds have in common."""

    def __init__(self, kind: str, number: int, node: str, model: str, network: Network, setup: Setup) -> None:
        self.number, self.node, self.network, self.setup = number, node, network, setup
        self.incarnation = (1000 if kind == "experts" else 2000) + number
        self.checkpoint: Checkpoint = open_checkpoint(model)
        spec = self.checkpoint.spec
        self.hidden, self.top_k, self.experts = spec.hidden, spec.router.top_k, spec.router.experts
        self.kernels = select_kernels(CPU, 1, True)
        self.layer = MoeLayer(self.checkpoint, self.kernels, CPU, torch.float32, 0)
        sleep_exactly()
        self.inner = UcxTransport(longest_frame(MOST_ROWS, self.top_k, self.hidden), CPU, "", spin_us=0.0)

    def compile(self) -> None:
        """Everything that an exchange runs on either side, before anybody waits for it."""
        spare = MoeLayer(self.checkpoint, self.kernels, CPU, torch.float32, 0)
        with torch.inference_mode():
            warm_up(spare, self.checkpoint.spec, CPU, torch.float32)

    def transport(self, everybody: list[dict[str, Any]]) -> FarTransport:
        mine = [p for p in everybody if p["node"] == self.node]
        near = [p["incarnation"] for p in mine] + [bytes.fromhex(p["address"]) for p in mine]
        return FarTransport(self.inner, self.network, near)

    def say(self, **facts: Any) -> None:
        print(json.dumps(facts), flush=True)


def serve_experts(process: Process) -> None:
    everybody = json.loads(sys.stdin.readline())
    process.layer.load(range(process.experts))
    limits = ServerLimits(process.hidden, torch.float32, MOST_ROWS, process.experts, process.top_k)
    transport = process.transport(everybody)
    seconds = process.setup.expert_us * 1e-6
    pace = Pacer(DeviceProfile("ablation", expert_s=seconds), transport.wait_until) if seconds else UNPACED
    server = ExpertServer(transport, {0: process.layer}, limits, mesh=MESH, incarnation=process.incarnation, pace=pace)
    neighbours = {
        p["id"]: ExpertNeighbour(p["incarnation"], bytes.fromhex(p["address"]))
        for p in everybody
        if p["kind"] == "experts" and p["node"] == process.node and p["incarnation"] != process.incarnation
    }
    server.meet(neighbours)
    server.adopt([KnownPlacement.of(placement_of(everybody, process), f"experts{process.number}")])
    threading.Thread(target=lambda: (sys.stdin.readline(), server.stop()), daemon=True).start()
    with torch.inference_mode():
        server.run()
    transport.close()


def placement_of(everybody: list[dict[str, Any]], process: Process) -> Placement:
    """Every expert at home everywhere: what is measured is the exchange."""
    ids = [p["id"] for p in everybody if p["kind"] == "experts"]
    experts = process.experts
    homes = torch.full((experts,), (1 << len(ids)) - 1, dtype=torch.int64).numpy().astype("<u8").tobytes()
    return Placement(
        version=1, epoch=1, author="bench", reason="bench", digest="d" * 64, instances=tuple(ids), moe_layers=(0,),
        experts=experts, homes=homes, policy=process.setup.policy,
    )  # fmt: skip


def view_of(everybody: list[dict[str, Any]], process: Process) -> View:
    instances, neighbours = {}, {}
    for p in everybody:
        address = bytes.fromhex(p["address"])
        if p["kind"] == "experts":
            instances[p["id"]] = ExpertInstance(p["id"], p["incarnation"], address, time.monotonic(), node=p["node"])
        elif p["node"] == process.node:
            neighbours[p["id"]] = Neighbour(p["incarnation"], address)
    return View(placement_of(everybody, process), instances, neighbours, process.node)


def serve_attention(process: Process) -> None:
    everybody = json.loads(sys.stdin.readline())
    exchange = MeshExchange(
        process.transport(everybody), process.kernels, hidden=process.hidden, dtype=torch.float32, top_k=process.top_k,
        mesh=MESH, incarnation=process.incarnation, deadline=5.0, max_rows=MOST_ROWS, gates={0: process.layer},
        group_wait=GROUP_WAIT, partial=process.setup.partial,
    )  # fmt: skip
    exchange.warm_up(0, torch.zeros(1, process.hidden))
    process.layer.gate(torch.zeros(1, process.hidden))
    tables: dict[str, Ways] = {}
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            commands.put(line)
            exchange.wake()

    threading.Thread(target=listen, daemon=True).start()
    with torch.inference_mode():
        while True:
            while commands.empty():
                exchange.idle_wait(1.0)
            command = json.loads(commands.get())
            if command["do"] == "stop":
                break
            if command["do"] == "meet":
                exchange.update(view_of(everybody, process))
                process.say(done="meet")
                continue
            name = command["way"]
            exchange.use(tables.setdefault(name, Ways(*_ways(name))))
            taken = run_steps(exchange, process.hidden, command["rows"], command["steps"])
            table = [r for r in tables[name].table() if r.members > 1 and r.measured is not None]
            process.say(**taken, decided={r.rows: str(r.way) for r in table if r.chosen})
            if command.get("table"):
                process.say(
                    table=[(r.rows, str(r.way), r.predicted, r.measured, r.chosen) for r in tables[name].table()]
                )
    exchange.close()


def _ways(name: str) -> tuple[Phase | None, Gate | None]:
    if name == "auto":
        return None, None
    phase, gate = name.split("/")
    return Phase(phase), Gate(gate)


def run_steps(exchange: MeshExchange, hidden: int, rows: int, steps: int) -> dict[str, Any]:
    """Seconds per exchange of the grouped steps, and how many steps were in a group."""
    x, out = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(rows)), torch.zeros(rows, hidden)
    taken, grouped = [], 0
    for _ in range(steps):
        together = exchange.begin(rows)
        start = time.perf_counter()
        for _ in range(EXCHANGES):
            exchange.combine(exchange.dispatch(0, x), out)
        spent = (time.perf_counter() - start) / EXCHANGES
        exchange.end()
        if together:
            grouped += 1
            taken.append(spent)
    return {
        "seconds": median(taken) if taken else None,
        "all": taken,
        "grouped": grouped,
        "repeats": dict(exchange.stats().repeats),
    }


def main() -> None:
    kind, number, node, model, network, setup = sys.argv[1:]
    torch.set_num_threads(1)
    process = Process(kind, int(number), node, model, Network(**json.loads(network)), Setup(**json.loads(setup)))
    process.compile()
    identity = {"id": f"{kind}{number}", "incarnation": process.incarnation, "address": process.inner.address.hex()}
    process.say(kind=kind, node=node, **identity)
    (serve_experts if kind == "experts" else serve_attention)(process)


if __name__ == "__main__":
    main()
