"""How a replica of an activated expert is chosen: the policies by name. Their kernels are in kernels.py."""

from enum import StrEnum


class Policy(StrEnum):
    """Every policy is a pure function of the top-k ids, the homes and the live mask, so that instances agree."""

    ACTIVATED = "activated"
    """Balances distinct activated experts (JANUS): a_max is the least possible. Depends on the set of experts only."""
    TOKENS = "tokens"
    """Splits the choices of an expert evenly over its homes, as DeepSeek's EPLB does."""
    RANDOM = "random"
    """One home per expert, drawn anew in each exchange; the seed is made of the ids."""
    FIRST = "first"
    """The lowest instance that has the expert."""

    @property
    def code(self) -> int:
        """What the kernels call it."""
        return _CODES[self]


_CODES = {policy: code for code, policy in enumerate(Policy)}
