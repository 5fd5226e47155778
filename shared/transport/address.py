"""What a UCX transport tells others so that they can connect: its worker address, sealed, and where memory is shared.

Pure bytes; knows nothing of UCX.
"""

import struct
import zlib
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Self

from shared.errors import TransportError

MAGIC = b"MOEA"
SEAL = struct.Struct("<4sI16s")  # magic, checksum of all that follows it, domain
NOWHERE = bytes(16)
SHARED_MEMORY_TLS = frozenset({"all", "shm", "sm", "mm", "posix", "sysv", "xpmem", "cma", "knem"})


@dataclass(frozen=True)
class Address:
    """The parts of ``Transport.address``."""

    worker: bytes
    """UCX worker address."""
    domain: bytes
    """16 bytes, equal for transports that can share memory; NOWHERE when this one cannot."""

    def pack(self) -> bytes:
        checksum = zlib.crc32(self.domain + self.worker)
        return SEAL.pack(MAGIC, checksum, self.domain) + self.worker

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Raises TransportError for anything but the bytes that ``pack`` made: UCX itself does not survive garbage."""
        if len(data) <= SEAL.size:
            raise TransportError(f"an address of {len(data)} bytes is too short")
        magic, checksum, domain = SEAL.unpack_from(data)
        worker = bytes(data[SEAL.size :])
        if magic != MAGIC or checksum != zlib.crc32(domain + worker):
            raise TransportError("not the address of a transport, or a damaged one")
        return cls(worker, domain)

    def shares_memory_with(self, other: "Address") -> bool:
        return self.domain == other.domain != NOWHERE


def memory_domain(tls: str) -> bytes:
    """Digest of boot id and ipc namespace, the two that decide whether processes can share memory.

    Args:
        tls: UCX transports as configured; NOWHERE is returned when they leave shared memory out.
    """
    if tls and not tls.startswith("^") and not SHARED_MEMORY_TLS & set(tls.split(",")):
        return NOWHERE
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = Path("/proc/self/ns/ipc").stat().st_ino
    return blake2b(f"{boot}/{namespace}".encode(), digest_size=16).digest()
