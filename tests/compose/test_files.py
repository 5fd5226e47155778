"""Guards what the compose files ask for, on machines without a container engine too."""

from pathlib import Path
from typing import Any

import pytest
import yaml

COMPOSE = Path(__file__).parents[2] / "compose"
SERVICES = {"nats", "gateway", "scheduler", "attention", "experts"}
WORKERS = {"attention", "experts"}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((COMPOSE / name).read_text())["services"]


def resolved(name: str) -> dict[str, Any]:
    """Services with what they extend."""
    return {kind: {**load("common.yaml")[kind], **service} for kind, service in load(name).items()}


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cpu.yaml"])
def test_each_kind_is_one_service_that_can_be_scaled(name):
    services = resolved(name)
    assert set(services) == SERVICES
    for kind, service in services.items():
        assert "container_name" not in service
        assert service["extends"] == {"file": "common.yaml", "service": kind}
        assert service["healthcheck"]["test"] and service["restart"] == "unless-stopped"
        assert ("ports" in service) == (kind == "gateway"), "a published port belongs to one container"
        assert kind == "nats" or service["depends_on"]["nats"] == {"condition": "service_healthy"}


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cpu.yaml"])
def test_containers_of_the_data_plane_can_share_memory(name):
    for kind, service in resolved(name).items():
        shared = (service.get("ipc"), service.get("pid"), service.get("ulimits"))
        expected = ("host", "host", {"memlock": "${MOEMESH_MEMLOCK:--1}"})
        assert shared == (expected if kind in WORKERS else (None, None, None))


def test_exchanges_do_not_wait_for_wakeups_that_cannot_cross_networks():
    for kind, service in resolved("compose.cpu.yaml").items():
        excluded = service.get("environment", {}).get("MOEMESH_UCX_TLS")
        assert excluded == ("${MOEMESH_UCX_TLS:-^posix,sysv}" if kind in WORKERS else None)


def test_every_gpu_is_offered_to_every_instance_that_computes():
    for kind, service in resolved("compose.yaml").items():
        if kind in WORKERS:
            (gpu,) = service["deploy"]["resources"]["reservations"]["devices"]
            assert gpu == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        else:
            assert "deploy" not in service
    assert not any("deploy" in service for service in resolved("compose.cpu.yaml").values())


def test_the_engine_s_socket_is_an_option_for_the_scheduler_alone():
    (kind, service), *others = load("compose.scale.yaml").items()
    assert (kind, others) == ("scheduler", [])
    assert service["environment"] == {"MOEMESH_ACTUATOR": "compose"}
    assert service["volumes"] == ["${DOCKER_SOCKET:-/var/run/docker.sock}:/var/run/docker.sock"]


def test_rdma_devices_are_an_option():
    assert set(load("compose.rdma.yaml")) == WORKERS
    assert all(s == {"devices": ["/dev/infiniband:/dev/infiniband"]} for s in load("compose.rdma.yaml").values())
