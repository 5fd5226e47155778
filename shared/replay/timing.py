"""How long the routed experts of one layer take, in two forms, compiled. Times in seconds, without T_misc.

* ``devices``, the default: an instance computes its replicas one after the other, and reads the weights of each that has
  rows: max_g sum_r (replica_s + row_s W_r) + 2 link_row_s max_g W_g.
* ``paper`` (MoEless, section 3.3): max_r row_s W_r + 2 link_row_s max_g W_g, as if the replicas on one GPU were computed
  beside each other, and weights cost nothing to read.

W_r are the rows of a replica, W_g those of an instance.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

from enum import StrEnum

import numpy as np
from numba import njit

from shared.replay.inputs import Inputs
from shared.scheduling.kernels import INSTANCES, _relieve, _spread

Costs = tuple[float, float, float, bool]
"""row_s, replica_s, link_row_s, and whether the form is the paper's."""


class Form(StrEnum):
    """Which formula."""

    DEVICES = "devices"
    PAPER = "paper"


def costs(inputs: Inputs, form: Form) -> Costs:
    """What the kernels take."""
    return inputs.row_s, inputs.replica_s, inputs.link_row_s, form is Form.PAPER


@njit(cache=True, nogil=True)
def even_time(loads, held, waits, costs):
    """Every expert's rows are split evenly over its replicas, as the mesh splits them: whole rows, none for some.

    loads [E]; held int64 [instances, E], replicas that can be used, one at least of every expert with rows;
    waits [instances], before each one can begin.
    """
    row_s, replica_s, link_row_s, papers = costs
    busy, rows, slowest = waits.copy(), np.zeros(len(waits)), 0.0
    for e in range(len(loads)):
        if loads[e] == 0:
            continue
        replicas = held[:, e].sum()
        number = 0
        for g in range(len(held)):
            for _ in range(held[g, e]):
                share = loads[e] // replicas + ((number - e) % replicas < loads[e] % replicas)
                number += 1
                if share > 0:
                    busy[g] += replica_s + row_s * share
                    rows[g] += share
                    slowest = max(slowest, waits[g] + row_s * share)
    return (slowest if papers else busy.max()) + 2 * link_row_s * rows.max()


@njit(cache=True, nogil=True)
def whole_time(loads, hosts, waits, costs):
    """Every expert's rows go to one of its homes, so that activated experts even out: the mesh's own choice.

    hosts uint64 [E]: the instances that can compute an expert with rows, 0 without rows.
    """
    row_s, replica_s, link_row_s, papers = costs
    chosen, activated = np.full(len(hosts), -1, np.int32), np.zeros(INSTANCES, np.int32)
    _spread(hosts, chosen, activated)
    _relieve(hosts, chosen, activated)
    busy, rows, slowest = waits.copy(), np.zeros(len(waits)), 0.0
    for e in range(len(loads)):
        if loads[e] > 0:
            g = chosen[e]
            busy[g] += replica_s + row_s * loads[e]
            rows[g] += loads[e]
            slowest = max(slowest, waits[g] + row_s * loads[e])
    return (slowest if papers else busy.max()) + 2 * link_row_s * rows.max()


@njit(cache=True, nogil=True)
def balanced_time(loads, instances, costs):
    """Perfect balance: less is impossible for anybody who computes what the gate chose, in the form ``devices``.

    The rows are shared out evenly, and so are the activated experts, each of which is read once, by one instance. In
    the paper's form every expert has the same load.
    """
    row_s, replica_s, link_row_s, papers = costs
    total, activated = 0, 0
    for e in range(len(loads)):
        total += loads[e]
        activated += loads[e] > 0
    link = 2 * link_row_s * total / instances
    if papers:
        return row_s * total / len(loads) + link
    read = -(-activated // instances) * (replica_s + row_s)
    return max(read, (replica_s * activated + row_s * total) / instances) + link
