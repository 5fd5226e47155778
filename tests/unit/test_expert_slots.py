"""Memory of an expert's own: what is copied there is bit for bit what was given, and a freed slot takes no memory."""

import random
from pathlib import Path

import pytest
import torch

from shared.kernels.weights import Fp8Blocks, Weight
from shared.models.slots import DeviceSlots, HostSlots, SlotsMismatch, tensors_of


def weights(seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in ((48, 96), (48, 96), (96, 48), (48,)))


def fp8(seed: int) -> Fp8Blocks:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(130, 256, generator=generator).to(torch.float8_e4m3fn)
    return Fp8Blocks(values, torch.rand(2, 2, generator=generator), (128, 128))


def no_view(tensor: torch.Tensor, address: int) -> bool:
    return False


def same(ours, theirs) -> bool:
    pairs = zip(tensors_of(ours), tensors_of(theirs), strict=True)
    return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)


@pytest.mark.parametrize(
    "make", [lambda s: weights(s), lambda s: weights(s, torch.float32), lambda s: (fp8(s), fp8(s + 9))]
)
def test_slots_hold_what_was_copied_into_them_and_nothing_of_their_neighbours(make):
    slots = HostSlots(3, make(0))
    held = [slots.fill(slot, make(slot), no_view) for slot in range(3)]
    assert all(same(held[slot], make(slot)) for slot in range(3))
    slots.fill(1, make(7), no_view)
    assert same(held[0], make(0))
    assert same(held[1], make(7)), "views of a slot show what is in it now"
    assert same(held[2], make(2))


def test_an_expert_of_another_form_is_refused():
    slots = HostSlots(1, weights(0))
    with pytest.raises(SlotsMismatch):
        slots.fill(0, weights(0, torch.float32), no_view)


def test_a_freed_slot_gives_its_pages_back():
    expert = [torch.ones(1 << 20)]
    slots = HostSlots(2, expert)
    before = anonymous()
    for slot in range(2):
        slots.take(slot)
        slots.fill(slot, expert, no_view)
    full = anonymous()
    slots.free(0)
    slots.free(1)
    assert full - before > 7 << 20
    assert anonymous() - before < 1 << 20


@pytest.mark.parametrize("numbers", [100, 300_000, 700_000])
def test_a_freed_slot_takes_nothing_of_those_that_are_taken(numbers: int) -> None:
    """Also where slots share a page, huge ones included."""
    slots, rng = HostSlots(5, [torch.ones(numbers)]), random.Random(0)
    held: dict[int, tuple[Weight, int]] = {}
    for turn in range(60):
        slot = rng.randrange(5)
        if slot in held:
            del held[slot]
            slots.free(slot)
        else:
            slots.take(slot)
            held[slot] = slots.fill(slot, [torch.full((numbers,), float(turn))], no_view)[0], turn
        for weight, value in held.values():
            assert isinstance(weight, torch.Tensor)
            assert (weight == value).all()


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    with Path("/proc/self/smaps_rollup").open() as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) << 10


def test_on_a_device_weights_are_copied_there():
    slots = DeviceSlots(2, torch.device("cpu"), torch.bfloat16)
    assert same(slots.fill(0, weights(3), no_view), weights(3))
