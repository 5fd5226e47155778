"""What its slot is worth to a resident expert, compiled: who makes room, in the live mesh and in the replay.

Every step passes every layer once, so an expert is worth its slot by the chance that the coming exchange of its layer
calls it: as predicted, if it is, else the share of recent exchanges that called it; and by a part of that share, since
there are steps after the next. Who is worth least makes room.
"""
# ruff: noqa: ANN001, ANN201 - numba infers the types

import numpy as np
from numba import njit

FORGET = 0.03
"""Weight of the newest exchange in the share of exchanges that call an expert."""
HABIT = 0.3
"""What that share weighs beside the chance of the coming exchange."""
WORTH = 0.05
"""Experts that are predicted to be called with this probability or more are started ahead."""
UNKNOWN = -1.0
"""The chance of an expert for whose layer nothing is predicted."""


@njit(cache=True, nogil=True)
def note_calls(share, called):
    """An exchange calls experts bool [E] of a layer: its shares [E] move towards it."""
    for e in range(len(share)):
        share[e] += FORGET * (called[e] - share[e])


@njit(cache=True, nogil=True)
def chance_of(load):
    """That an expert is called of which so many rows are expected: at least one of Poisson's."""
    return 1 - np.exp(-max(load, 0.0))


@njit(cache=True, nogil=True)
def chances_of(loads):
    """``chance_of`` for loads [E]."""
    chances = np.empty_like(loads)
    for e in range(len(loads)):
        chances[e] = chance_of(loads[e])
    return chances


@njit(cache=True, nogil=True)
def worth_of(share, chance):
    """0 to 1 + HABIT. chance: that of the coming exchange, or UNKNOWN."""
    return (chance if chance >= 0 else share) + HABIT * share


@njit(cache=True, nogil=True)
def worths_of(shares, chances):
    """``worth_of`` for tables [layers, E]."""
    worths = np.empty_like(shares)
    for layer in range(shares.shape[0]):
        for e in range(shares.shape[1]):
            worths[layer, e] = worth_of(shares[layer, e], chances[layer, e])
    return worths
