"""Who makes room in an instance's memory for experts, by name: for settings, without numba, unlike residency.py."""

from enum import StrEnum


class Eviction(StrEnum):
    """Who makes room."""

    FORESEEN = "foreseen"
    """What is least probable to be called."""
    LRU = "lru"
    """What was called longest ago; nothing is started ahead."""
