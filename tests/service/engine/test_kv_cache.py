"""Pages: reserved all or nothing, side by side where possible, and given back."""

import torch

from service.engine.kv_cache import PageAllocator, allocate_caches, bytes_per_token
from service.engine.sequence import SamplingParams, Sequence
from sparse_methods import get_sparse_method
from sparse_methods.kernels.operation import LayerGeometry


def sequence():
    method = get_sparse_method("dense")()
    return Sequence("r", [1], method, SamplingParams(), torch.Generator())


def test_pages_are_reserved_all_or_nothing():
    allocator, one = PageAllocator(3, 8), sequence()
    assert not allocator.try_reserve(one, 25)
    assert (one.pages, allocator.num_free) == ([], 3)
    assert allocator.try_reserve(one, 24)
    assert (sorted(one.pages), allocator.num_free) == ([0, 1, 2], 0)


def test_room_in_the_last_page_is_used_before_a_new_one():
    allocator, one = PageAllocator(3, 8), sequence()
    allocator.try_reserve(one, 5)
    one.num_computed_tokens = 5
    assert allocator.try_reserve(one, 3)
    assert len(one.pages) == 1


def test_a_sequence_that_grows_alone_gets_pages_side_by_side():
    allocator, one, other = PageAllocator(20, 8), sequence(), sequence()
    allocator.try_reserve(other, 24)
    allocator.try_reserve(one, 8)
    allocator.release(other)
    for _ in range(5):
        one.num_computed_tokens += 8
        allocator.try_reserve(one, 8)
    assert one.pages == list(range(3, 9))


def test_released_pages_can_be_reserved_again():
    allocator, one = PageAllocator(2, 8), sequence()
    allocator.try_reserve(one, 16)
    allocator.release(one)
    assert one.pages == []
    assert allocator.try_reserve(sequence(), 16)


def test_caches_have_one_page_axis_and_start_finite():
    layer = LayerGeometry(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=6, scale=1.0)
    [(keys, values)] = allocate_caches([layer], 5, 16, torch.float32, torch.device("cpu"))
    assert keys.shape == (5, 16, 2, 8)
    assert values.shape == (5, 16, 2, 6)
    assert keys.eq(0).all()
    assert bytes_per_token([layer, layer], torch.float32) == 2 * 2 * (8 + 6) * 4
