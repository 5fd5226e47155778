"""Errors of the HTTP side and the one place where a failure gets its status.

    ApiError             an answer other than 200, in OpenAI's nested shape
    ├── BadRequest       400: the client must change the request
    └── Unavailable      503 + retry-after: the same request may succeed later

Covers neither validation (protocol.py) nor the sending of responses (app.py, stream.py).
"""

from typing import Any

from services.gateway.schema_errors import describe
from shared.errors import MoemeshError, Refused

RETRY_AFTER_S = 1


class ApiError(MoemeshError):
    """A failure as the client sees it.

    Args:
        status: HTTP status.
        param: the request field at fault, when there is one.
        code: stable word for programs, e.g. ``context_length_exceeded``.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    @property
    def headers(self) -> dict[str, str]:
        """What tells the client whether a retry makes sense."""
        if self.status == 503:
            return {"retry-after": str(RETRY_AFTER_S)}
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"x-should-retry": "false"} if self.status == 504 else {}

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


_TYPES = {
    401: "authentication_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class BadRequest(ApiError):
    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(400, message, param, code)


class Unavailable(ApiError):
    def __init__(self, message: str, code: str = "unavailable") -> None:
        super().__init__(503, message, None, code)


_REFUSALS: dict[str, tuple[int, str | None]] = {
    "full": (503, None),
    "draining": (503, None),
    "no_experts": (503, None),
    "unknown": (503, None),
    "too_long": (400, "max_tokens"),
    "invalid": (400, None),
    "deadline": (504, None),
}


def from_refusal(error: Refused) -> ApiError:
    """What the client hears when the attention service declined its request."""
    status, param = _REFUSALS.get(error.code, (500, None))
    message = error.message or f"the request was refused: {error.code}"
    if status == 500:
        message = "the request failed inside the server; its log has the reason"
    code = "context_length_exceeded" if error.code == "too_long" else error.code
    return ApiError(status, message, param, code)


def from_schema(errors: list[Any]) -> BadRequest:
    """One 400 for all violations that pydantic found; ``param`` names the first field."""
    message, param = describe(errors)
    return BadRequest(message, param, "invalid_value")


def as_api_error(error: MoemeshError) -> ApiError:
    """Any deliberate error as an HTTP answer."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Refused):
        return from_refusal(error)
    return Unavailable(str(error))
