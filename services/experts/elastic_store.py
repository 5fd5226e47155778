"""What an elastic instance says to placements: every home is answered, whatever is resident just now."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

from services.experts.elastic import Elastic
from services.experts.store import ExpertStore, Homes, ResidentLayer, homes_here
from shared.messages import Placement


class ElasticStore(ExpertStore):
    """See ``ExpertStore``. Loads nothing: residents are the compute thread's.

    Args:
        house: has the compute thread take over new homes.
    """

    def __init__(
        self,
        layers: Mapping[int, ResidentLayer],
        elastic: Elastic,
        house: Callable[[Homes], Future[None]],
        *,
        instance: str,
        digest: str,
        experts: int,
    ) -> None:
        super().__init__(layers, instance=instance, slots=0, digest=digest, experts=experts)
        self._elastic, self._house = elastic, house

    @property
    def load_rate(self) -> float:
        stats = self._elastic.stats
        return stats.start_bytes / stats.start_s if stats.start_s else 0.0

    @property
    def replicas(self) -> int:
        return self._elastic.residents

    def layers_of(self, placement: Placement, plan: Homes | None = None) -> frozenset[int]:
        """All: who is not resident is waited for."""
        return frozenset(self._layers)

    def keep_only(self, placements: Iterable[Placement]) -> None:
        """Stop experts that are no home in any of ``placements``."""
        wanted: dict[int, frozenset[int]] = {}
        for placement in placements:
            for layer, experts in homes_here(placement, self._instance).items():
                wanted[layer] = wanted.get(layer, frozenset()) | experts
        self._house(wanted)

    def load_beside(self, plan: Homes) -> None:
        """Nothing: experts are started when they are wanted."""

    def become(self, plan: Homes) -> None:
        """Nothing: ``keep_only`` has stopped who lost its home."""
