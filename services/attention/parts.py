"""Long prompts arrive in several messages: put together here, within bounds. Pure; the caller gives the time."""

from dataclasses import dataclass, field

from shared.request_messages import Decision, Submit

ASSEMBLY_S = 10.0
"""Seconds that the parts of one prompt may take to arrive."""
MAX_ASSEMBLIES = 64
"""Prompts that may be incomplete at once."""


@dataclass(slots=True)
class _Assembly:
    expires: float
    parts: dict[int, bytes] = field(default_factory=dict)


class PartBuffer:
    """Incomplete prompts by request id; ``max_bytes`` bounds each of them."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._open: dict[str, _Assembly] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, request: Submit, now: float) -> Submit | Decision:
        """The whole request once its last part is here, else what to answer to this part."""
        if request.parts == 1:
            return request
        self._expire(now)
        if request.part >= request.parts:
            return Decision(ok=False, code="invalid", message=f"part {request.part} of {request.parts}")
        if request.parts > self._max_bytes:
            return Decision(ok=False, code="too_long", message=f"{request.parts} parts: more than a prompt has bytes")
        if request.request_id not in self._open and len(self._open) >= MAX_ASSEMBLIES:
            return Decision(ok=False, code="full", message=f"{MAX_ASSEMBLIES} long prompts are arriving already")
        assembly = self._open.setdefault(request.request_id, _Assembly(now + ASSEMBLY_S))
        assembly.parts[request.part] = request.prompt
        if sum(map(len, assembly.parts.values())) > self._max_bytes:
            self.drop(request.request_id)
            return Decision(ok=False, code="too_long", message=f"more than {self._max_bytes // 4} prompt tokens")
        if request.part < request.parts - 1:
            return Decision(ok=True)
        return self._complete(request, assembly)

    def drop(self, request_id: str) -> None:
        self._open.pop(request_id, None)

    def _complete(self, last: Submit, assembly: _Assembly) -> Submit | Decision:
        self.drop(last.request_id)
        missing = [part for part in range(last.parts) if part not in assembly.parts]
        if missing:
            return Decision(ok=False, code="full", message=f"parts {missing} did not arrive: send all of them again")
        prompt = b"".join(assembly.parts[part] for part in range(last.parts))
        return last.model_copy(update={"prompt": prompt, "part": 0, "parts": 1})

    def _expire(self, now: float) -> None:
        for request_id in [r for r, assembly in self._open.items() if now >= assembly.expires]:
            self.drop(request_id)
