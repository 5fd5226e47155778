"""Recorded kernels do what the calls did, with whatever the same tensors hold now."""

import pytest
import torch

from shared.kernels.base import select_kernels

KERNELS = select_kernels(torch.device("cpu"), 1)


def test_a_recording_repeats_the_calls_on_new_values_bit_for_bit():
    weight, norm = torch.randn(48, 32).bfloat16(), torch.rand(32)
    x, normed, product = torch.empty(3, 32), torch.empty(3, 32), torch.empty(3, 48)

    def work():
        KERNELS.rms_norm(x, norm, 1e-6, out=normed)
        KERNELS.add(x, normed)
        return KERNELS.linear(x, weight, out=product)

    again = KERNELS.record(work)
    for seed in range(3):
        values = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
        x.copy_(values)
        expected = work().clone(), x.clone()
        x.copy_(values)
        product.zero_()
        assert again() is product
        assert product.equal(expected[0]) and x.equal(expected[1])


def test_recording_itself_computes_nothing():
    x = torch.ones(2, 4)
    KERNELS.record(lambda: KERNELS.add(x, x))
    assert x.eq(1).all()


def test_an_index_that_became_wrong_is_refused_and_names_the_kernel():
    table, ids, out = torch.randn(4, 8), torch.tensor([0, 3]), torch.empty(2, 8)
    again = KERNELS.record(lambda: KERNELS.take(table, ids, out))
    ids[1] = 4
    with pytest.raises(ValueError, match="take refused"):
        again()
