"""The bytes by which a UCX transport can be connected to: its worker address under a seal.

UCX does not survive a damaged worker address, and these come over the network. Pure bytes; knows nothing of UCX.
"""

import struct
import zlib

from shared.errors import TransportError

MAGIC = b"MOEA"
SEAL = struct.Struct("<4sI")  # magic, checksum of all that follows


def seal(worker: bytes) -> bytes:
    """The address to tell others."""
    return SEAL.pack(MAGIC, zlib.crc32(worker)) + worker


def unseal(address: bytes) -> bytes:
    """The worker address. Raises TransportError for anything but the bytes that ``seal`` made."""
    if len(address) <= SEAL.size:
        raise TransportError(f"an address of {len(address)} bytes is too short")
    magic, checksum = SEAL.unpack_from(address)
    worker = bytes(address[SEAL.size :])
    if magic != MAGIC or checksum != zlib.crc32(worker):
        raise TransportError("not the address of a transport, or a damaged one")
    return worker
