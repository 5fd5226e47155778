"""Every error that moemesh raises on purpose.

    MoemeshError
    ├── ConfigError            a setting is missing or wrong; the service does not start
    ├── ModelError             the model directory is unusable
    │   └── UnsupportedModel   ... because its architecture is not one of ours
    ├── BusUnavailable         NATS, or the service behind a subject, did not answer in time
    ├── BadMessage             a control message does not match its schema
    ├── BadFrame               a data-plane frame is malformed, truncated or foreign
    ├── TransportError         the data plane failed in a way that a repeat will not mend
    ├── ExchangeUnavailable    no live home answered within the deadline; the step may be repeated
    └── Refused                a service declines a request and says why (travels as data)

Each error carries its values as attributes and makes its own message: what was wrong, where, what to do.
"""


class MoemeshError(Exception):
    """Base of all errors that are raised on purpose."""


class ConfigError(MoemeshError):
    """A setting is missing or out of range.

    Args:
        setting: name as the user wrote it, e.g. ``--max-model-len``.
        problem: what is wrong and what to do.
    """

    def __init__(self, setting: str, problem: str) -> None:
        super().__init__(f"{setting}: {problem}")
        self.setting = setting
        self.problem = problem


class ModelError(MoemeshError):
    """The model directory cannot be served; ``where`` is a path, a tensor name or a config key."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem


class UnsupportedModel(ModelError):
    """The checkpoint is healthy, but its architecture is not implemented."""


class BusUnavailable(MoemeshError):
    """Nobody answered on ``subject``: NATS is away, no service listens there, or the deadline passed."""

    def __init__(self, subject: str, problem: str) -> None:
        super().__init__(f"{subject}: {problem}")
        self.subject = subject
        self.problem = problem


class BadMessage(MoemeshError):
    """A control message does not match its schema; ``kind`` is the message class that was expected."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(f"not a valid {kind} message: {problem}")
        self.kind = kind
        self.problem = problem


class BadFrame(MoemeshError):
    """A data-plane frame is malformed, truncated or belongs to somebody else."""


class TransportError(MoemeshError):
    """The data plane failed in a way that repeating the send will not mend."""


class ExchangeUnavailable(MoemeshError):
    """Some chosen experts have no live home that answers; the step may be repeated later.

    Args:
        layer: index of the MoE layer in the checkpoint.
        instances: ids of the expert instances that did not answer.
    """

    def __init__(self, layer: int, instances: list[str], problem: str = "no answer within the deadline") -> None:
        super().__init__(f"layer {layer}, expert instances {', '.join(instances) or '(none known)'}: {problem}")
        self.layer = layer
        self.instances = instances


class Refused(MoemeshError):
    """A service declines a request. ``code`` is one of ``shared.messages.RefusalCode``."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
