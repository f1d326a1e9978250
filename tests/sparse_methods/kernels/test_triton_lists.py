"""The kernels that choose and list columns against the eager rules; ties are common here."""

import pytest
import torch

from sparse_methods.kernels import selection, triton_lists
from tests.sparse_methods.kernels.cases import DEVICE

WIDTHS = [1, 5, 31, 129]


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    """What is compared with, on any device."""
    monkeypatch.setattr(selection, "has_kernels", lambda tensor: False)


def draw(*shape, seed=0, coarse=False):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return ((values * 2).round() / 2 if coarse else values).to(DEVICE)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_largest_are_those_of_a_stable_sort(width, coarse):
    values = draw(2, 6, width, coarse=coarse)
    counts = torch.tensor([0, 1, 3, 17, width, width + 4], device=DEVICE)[:, None]
    given = triton_lists.largest(values, counts)
    assert torch.equal(given, selection.largest(values, counts))
    assert given.sum(-1).tolist() == [counts[:, 0].clamp(max=width).tolist()] * 2


def test_signs_zeros_and_infinities_have_their_places():
    row = [0.0, -0.0, float("inf"), -1e-30, 1e-40, float("-inf"), -2.0, 3.0, float("inf"), 0.0]
    values = torch.tensor([row] * 11, device=DEVICE)
    counts = torch.arange(11, device=DEVICE)[:, None]
    given = triton_lists.largest(values, counts)
    assert torch.equal(given, selection.largest(values, counts))


def test_counts_may_be_shares_of_a_row_rounded_up():
    values, counts = draw(3, 20), torch.tensor([[2.0], [5.0], [9.0]], device=DEVICE)
    assert triton_lists.largest(values, counts).sum(-1).tolist() == [2, 5, 9]


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("width", WIDTHS)
def test_what_covers_a_share_is_the_shortest_start_of_the_order(width, share):
    ranks, mass = draw(3, 2, width), draw(3, 2, width, seed=1).exp()
    for order in (ranks, mass):
        given = triton_lists.covering(order, mass, share)
        assert torch.equal(given, selection.covering(order, mass, share))


def test_equal_ranks_are_taken_from_the_left():
    ranks = draw(12, 33, coarse=True)
    mass = torch.full_like(ranks, 0.25)  # sums are exact in any implementation
    for share in (0.1, 0.5, 0.75, 1.0):
        given = triton_lists.covering(ranks, mass, share)
        assert torch.equal(given, selection.covering(ranks, mass, share))


def test_masses_of_any_size_are_covered():
    mass = draw(4, 50).exp()
    for factor in (1e-30, 1e-3, 1e6, 1e30):
        given = triton_lists.covering(mass, mass * factor, 0.8)
        assert torch.equal(given, selection.covering(mass, mass, 0.8))


def test_rows_of_no_mass_need_nothing():
    mass = torch.zeros(2, 9, device=DEVICE)
    assert not triton_lists.covering(mass, mass, 0.5).any()
    assert not selection.covering(mass, mass, 0.5).any()


def test_what_is_taken_first_by_rank_counts_however_small_its_mass():
    mass = torch.tensor([[0.1, 0.4, 0.3, 0.2]], device=DEVICE)
    ranks = torch.tensor([[float("inf"), 0.4, 0.3, float("inf")]], device=DEVICE)
    given = triton_lists.covering(ranks, mass, 0.5)
    assert given.tolist() == [[True, True, False, True]]


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize(("first", "recent", "start"), [(1, 2, 0), (2, 4, 7)])
def test_shares_are_those_of_the_softmax_over_the_choices(group, first, recent, start):
    num_tiles = 6
    own = torch.arange(start, start + num_tiles, device=DEVICE)
    scores = 5 * draw(2, group, num_tiles, start + num_tiles)
    given = triton_lists.group_shares(scores, own, first, recent)
    expected = selection.group_shares(scores, own, first, recent)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(given == float("inf"), expected == float("inf"))
    assert torch.equal(given == -1, expected == -1)


def test_shares_of_a_chunk_are_those_of_the_whole_to_the_last_bit():
    scores, own = 5 * draw(2, 4, 9, 300), torch.arange(100, 109, device=DEVICE)
    whole = triton_lists.group_shares(scores, own, 1, 2)
    part = triton_lists.group_shares(scores[..., :109].contiguous(), own, 1, 2)
    assert torch.equal(part, whole[..., :109])


@pytest.mark.parametrize("width", WIDTHS)
def test_lists_are_ascending_and_end_with_what_is_not_kept(width):
    table = draw(3, 4, width) > 0.3
    for is_kept in (table, table.transpose(0, 1), table[:1].expand(5, -1, -1)):
        indices, counts = triton_lists.list_kept(is_kept)
        expected = selection.list_kept(is_kept)
        assert torch.equal(indices, expected[0])
        assert torch.equal(counts, expected[1])
        assert indices.is_contiguous()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_leading_column_comes_first(width):
    table = draw(4, 2, width) > 0.3
    leading = torch.tensor([0, width - 1, width // 2, width // 3], device=DEVICE)
    table.scatter_(-1, leading[:, None, None].expand(-1, 2, 1), value=True)
    indices, counts = triton_lists.list_kept(table, leading)
    expected = selection.list_kept(table, leading)
    assert torch.equal(indices, expected[0])
    assert torch.equal(counts, expected[1])
    assert torch.equal(indices[:, :, 0], leading[:, None].expand(-1, 2).int())


@pytest.mark.parametrize("widths", [(5, 5), (3, 200), (1, 129, 7)])
def test_each_row_gets_the_list_of_its_owner(widths):
    owners = torch.arange(9, device=DEVICE) % (len(widths) + 1) - 1  # every few rows nobody's
    parts = []
    for number, width in enumerate(widths):
        # Heads before rows in memory, as some methods have them.
        indices = torch.randint(1000, (2, 9, width), dtype=torch.int32).to(DEVICE).transpose(0, 1)
        counts = torch.randint(-1, width + 1, (2, 9), dtype=torch.int32).to(DEVICE).T
        parts.append(selection.OwnedLists(indices, counts, owners == number))
    indices, counts = selection.merge(parts)
    assert (counts[owners < 0] == -1).all()
    assert indices.shape == (9, 2, max(widths))
    given_indices, given_counts = torch.empty_like(indices), torch.full_like(counts, -1)
    triton_lists.merge_into(given_indices, given_counts, parts)
    assert torch.equal(given_counts, counts)
    is_used = torch.arange(max(widths), device=DEVICE) < counts[..., None]
    assert torch.equal(given_indices[is_used], indices[is_used])
    for number, part in enumerate(parts):
        used = part.counts.clamp(min=0)[..., None] > torch.arange(widths[number], device=DEVICE)
        rows = owners == number
        own = indices[..., : widths[number]][rows][used[rows]]
        assert torch.equal(own, part.indices[rows][used[rows]])


def test_no_rows_make_no_lists():
    nothing = torch.zeros(0, 2, 5, dtype=torch.bool, device=DEVICE)
    indices, counts = triton_lists.list_kept(nothing)
    assert (indices.shape, counts.shape) == ((0, 2, 5), (0, 2))
    assert triton_lists.largest(nothing.float(), counts[..., None]).shape == (0, 2, 5)
    assert triton_lists.covering(nothing.float(), nothing.float(), 0.5).shape == (0, 2, 5)
