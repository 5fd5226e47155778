"""Makes the actuator that the settings ask for."""

from services.scheduler.actuators.base import Actuator
from services.scheduler.actuators.compose import ComposeActuator
from services.scheduler.actuators.external import ExternalActuator
from services.scheduler.actuators.kubernetes import KubernetesActuator
from services.scheduler.actuators.local import LocalActuator
from shared.config import SchedulerConfig
from shared.lifecycle import Instance
from shared.messages import Pool


def build_actuator(instance: Instance, config: SchedulerConfig) -> Actuator | None:
    """None: nobody changes the sizes of pools. Raises ConfigError."""
    if config.actuator == "local":
        return LocalActuator(instance.bus, instance.subjects)
    if config.actuator == "compose":
        return ComposeActuator(config.docker_socket, config.compose_project)
    if config.actuator == "kubernetes":
        deployments = {Pool.ATTENTION: config.attention_deployment, Pool.EXPERTS: config.experts_deployment}
        return KubernetesActuator(config.kubernetes_url, config.kubernetes_namespace, deployments)
    return ExternalActuator() if config.actuator == "external" else None
