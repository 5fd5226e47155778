"""A picture of a search, as PNG: where the limits are kept, and where the time of the best plans goes."""

from pathlib import Path

import numpy as np

from shared.pictures import open_pyplot, save_figure
from shared.planning.outlook import PARTS, Outlook
from shared.planning.search import Found, Space
from shared.planning.setting import Slo


def plot_plans(space: Space, outlook: Outlook, found: Found, slo: Slo, title: str, file: Path) -> None:
    """TPOT of every mesh (with the better number of micro-batches), which keep the limits; parts of the best plans."""
    pyplot = open_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    tpot, kept = _grid(space, outlook)
    image = left.imshow(tpot * 1e3, origin="lower", aspect="auto", cmap="viridis", vmax=3e3 * slo.tpot_s)
    left.contour(kept, levels=[0.5], colors="white")
    for plan, mark in ((found.mesh, "o"), (found.ranking[1] if len(found.ranking) > 1 else None, "x")):
        if plan and plan.kind == "mesh":
            left.plot(plan.experts, plan.attention, mark, color="red", label=plan.name)
    left.set(
        xlabel="expert instances", ylabel="attention instances", title=f"{title}: ms per token; white: limits kept"
    )
    left.set(xlim=(0, tpot.shape[1] - 0.5), ylim=(0, tpot.shape[0] - 0.5))
    left.legend(fontsize=8)
    figure.colorbar(image, ax=left)
    places, bottom = np.arange(len(found.ranking)), np.zeros(len(found.ranking))
    for part in PARTS:
        heights = np.array([plan.parts[part] * 1e3 for plan in found.ranking])
        right.bar(places, heights, bottom=bottom, label=part)
        bottom += heights
    right.plot(places, [plan.tpot_s * 1e3 for plan in found.ranking], "k_", markersize=20, label="step")
    right.set(ylabel="ms of a step; hidden parts in full", title="the best plans")
    right.set_xticks(places, [plan.name.replace(", ", "\n") for plan in found.ranking], fontsize=8)
    right.legend(fontsize=8)
    save_figure(figure, file)


def _grid(space: Space, outlook: Outlook) -> tuple[np.ndarray, np.ndarray]:
    """TPOT and whether limits are kept, [attention, experts] from 0 on; NaN where there is no candidate."""
    meshes = space.at(np.flatnonzero(space.micro_batches > 0))
    shape = (int(meshes.attention.max()) + 1, int(meshes.experts.max()) + 1)
    tpot, kept = np.full(shape, np.nan), np.zeros(shape)
    for i in np.flatnonzero(space.micro_batches > 0):
        at = space.attention[i], space.experts[i]
        tpot[at] = np.nanmin([tpot[at], outlook.tpot[i]])
        kept[at] = max(kept[at], outlook.feasible[i])
    return tpot, kept
