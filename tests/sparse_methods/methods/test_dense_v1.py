import pytest
import torch

from sparse_methods import Phase, get_sparse_method
from tests.sparse_methods import paged

Dense = get_sparse_method("dense", "v1")


@pytest.mark.parametrize(("num_queries", "phase"), [(1, "decode"), (7, "prefill")])
def test_every_element_is_kept_and_nothing_is_counted(num_queries, phase):
    mask, stats = Dense().calculate_sparsity(torch.randn(2, 3, num_queries, 9))
    assert mask.shape == (2, 3, num_queries, 9)
    assert mask.dtype is torch.bool
    assert mask.all()
    expected = {"sparsity": 0.0, "total_blocks": 0, "sparse_blocks": 0}
    assert stats == {**expected, "phase": phase, "sample_length": 9}


def test_scores_come_back_untouched():
    scores = torch.randn(1, 2, 4, 4)
    assert Dense().apply_sparsity(scores) is scores


def test_a_mask_given_by_the_caller_is_applied():
    scores = torch.randn(1, 1, 2, 2)
    mask = torch.tensor([[True, False], [True, True]])
    sparse = Dense().apply_sparsity(scores, mask.expand_as(scores))
    assert (sparse[..., ~mask] == torch.finfo(scores.dtype).min).all()
    assert torch.equal(sparse[..., mask], scores[..., mask])


def test_serving_reads_all_blocks_and_skips_none():
    method, query, keys = Dense(), torch.randn(300, 2, 8), torch.randn(300, 1, 8)
    assert method.select_prefill(paged.prefill_view(query, keys)) is None
    assert method.select_decode(paged.decode_view(query[:2], keys, [7, 300])) is None
    assert all(method.skip_threshold(phase, 4096) is None for phase in Phase)
    assert method.phases == ()
    method.check_servable(block_size=16)


def test_there_is_no_threshold_to_describe():
    assert Dense().get_threshold_info() == {"type": "none", "value": None}
