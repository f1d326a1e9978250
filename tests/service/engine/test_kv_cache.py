"""Pages: reserved all or nothing, side by side where possible, and given back."""

import hypothesis
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from service.engine.kv_cache import PageAllocator, allocate_caches, bytes_per_token
from service.engine.prefix import PrefixKeys
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


def prompted(prompt_ids, page_size=8):
    method = get_sparse_method("dense")()
    prefix = PrefixKeys(prompt_ids, page_size, method)
    return Sequence("r", prompt_ids, method, SamplingParams(), torch.Generator(), prefix=prefix)


def computed(allocator, prompt_ids):
    """A sequence that has computed its prompt, as far as it did not find it."""
    one = prompted(prompt_ids)
    allocator.reuse(one)
    start = one.num_computed_tokens
    assert allocator.try_reserve(one, len(prompt_ids) - start)
    one.num_computed_tokens = len(prompt_ids)
    allocator.publish(one, start, len(prompt_ids))
    return one


def test_full_prompt_pages_are_shared_and_the_last_token_is_always_computed():
    allocator = PageAllocator(20, 8)
    one, same, longer = (computed(allocator, list(range(n))) for n in (16, 16, 21))
    assert (one.num_cached_tokens, same.num_cached_tokens, longer.num_cached_tokens) == (0, 8, 16)
    assert one.pages[:1] == same.pages[:1]
    assert longer.pages[:2] == one.pages
    assert not {same.pages[1], longer.pages[2]} & set(one.pages), "somebody writes to these"
    assert allocator.num_used == 4


def test_pages_given_back_are_found_until_they_are_needed_the_oldest_first():
    allocator = PageAllocator(6, 8)
    old, new = computed(allocator, [1] * 17), computed(allocator, [2] * 17)
    allocator.release(old)
    allocator.release(new)
    assert (allocator.num_free, allocator.num_idle) == (6, 4)  # the third of each is not full
    other = computed(allocator, [3] * 24)  # takes two blank ones, and the last page of ``old``
    assert allocator.num_idle == 3
    again = prompted([1] * 17)
    allocator.reuse(again)
    assert again.num_cached_tokens == 8
    again = prompted([2] * 17)
    allocator.reuse(again)
    assert again.num_cached_tokens == 16
    assert other.num_cached_tokens == 0


def test_what_a_failed_sequence_computed_is_found_by_nobody():
    allocator = PageAllocator(6, 8)
    failed = computed(allocator, [1] * 17)
    sharing = computed(allocator, [1] * 17)
    allocator.retract(failed)
    allocator.release(failed)
    assert computed(allocator, [1] * 17).num_cached_tokens == 0
    allocator.release(sharing)
    assert (allocator.num_free, allocator.num_idle) == (3, 0)


def test_a_sequence_that_owns_pages_of_its_own_takes_over_no_more():
    allocator = PageAllocator(20, 8)
    computed(allocator, [1] * 17)
    one = prompted([1] * 17)
    assert allocator.try_reserve(one, 8)
    allocator.reuse(one)
    assert one.num_cached_tokens == 0
    assert len(one.pages) == 1


class Pages(RuleBasedStateMachine):
    """Whatever sequences do: pages are counted right, and found only with what they hold."""

    @initialize(num_pages=st.integers(3, 14))
    def start(self, num_pages):
        self.allocator = PageAllocator(num_pages, 4)
        self.live: list[Sequence] = []
        self.contents: dict[int, tuple[int, ...]] = {}  # what was last written to a page
        self.last_use: dict[int, int] = {}  # of idle pages
        self.clock = 0

    @rule(stems=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=5), rest=st.integers(0, 3))
    def enter(self, stems, rest):
        one = prompted([stem for stem in stems for _ in range(4)] + [7] * rest, 4)
        self.allocator.reuse(one)
        for index, page in enumerate(one.pages):
            assert self.contents[page] == tuple(one.prompt_ids[: 4 * index + 4])
            self.last_use.pop(page, None)
        assert one.num_cached_tokens < len(one.prompt_ids)
        self.live.append(one)

    @rule(data=st.data(), num_pages=st.integers(1, 3))
    def compute(self, data, num_pages):
        unfinished = [s for s in self.live if s.num_uncomputed_tokens]
        if not unfinished:
            return
        one = data.draw(st.sampled_from(unfinished))
        start = one.num_computed_tokens
        num_tokens = min(4 * num_pages, one.num_uncomputed_tokens)
        before, free = list(one.pages), self.allocator.num_free
        idle = set(self.last_use)
        if not self.allocator.try_reserve(one, num_tokens):
            assert one.pages == before
            assert free < -(-(start + num_tokens) // 4) - len(before)
            return
        evicted = idle - set(self.allocator._idle)
        kept = set(self.allocator._idle)
        if evicted and kept:
            newest = max(self.last_use[page] for page in evicted)
            assert newest < min(self.last_use[page] for page in kept), "not the least recently used"
        for page in evicted:
            del self.last_use[page]
        for index in range(start // 4, len(one.pages)):
            assert sum(one.pages[index] in s.pages for s in self.live) == 1, "written while shared"
            self.contents[one.pages[index]] = tuple(one.prompt_ids[: 4 * index + 4])
        one.num_computed_tokens += num_tokens
        self.allocator.publish(one, start, one.num_computed_tokens)

    @rule(data=st.data(), fails=st.booleans())
    def leave(self, data, fails):
        if not self.live:
            return
        one = data.draw(st.sampled_from(self.live))
        self.live.remove(one)
        if fails:
            self.allocator.retract(one)
        pages = one.pages[::-1]
        self.allocator.release(one)
        for page in pages:
            if page in self.allocator._idle:
                self.clock += 1
                self.last_use[page] = self.clock

    @invariant()
    def every_page_is_accounted_for(self):
        allocator = self.allocator
        owned = [page for s in self.live for page in s.pages]
        assert allocator.num_used == len(set(owned))
        assert [owned.count(page) for page in range(allocator.num_pages)] == allocator._num_owners
        states = [*allocator._blank, *allocator._idle, *set(owned)]
        assert sorted(states) == list(range(allocator.num_pages))
        assert set(allocator._idle) == set(self.last_use)
        assert {key: page for page, key in allocator._keys.items()} == allocator._found
        assert not set(allocator._keys) & set(allocator._blank)


TestPages = Pages.TestCase
TestPages.settings = hypothesis.settings(max_examples=60, stateful_step_count=40, derandomize=True)
