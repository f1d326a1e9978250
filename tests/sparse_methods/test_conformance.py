"""What every method of the registry promises; a new method is tested by being registered."""

import functools
import inspect
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from sparse_methods import (
    BlockSelection,
    InvalidKnobsError,
    PageSelection,
    Phase,
    SparseAttentionMethod,
    get_sparse_method,
    list_sparse_methods,
)
from tests.sparse_methods import paged

BLOCK = 128  # tokens; the block at which score-level rules and served ones meet
NUM_BLOCKS, NUM_HEADS, HEAD_DIM = 16, 2, 32
IDS = [(name, version) for name, versions in list_sparse_methods().items() for version in versions]
pytestmark = pytest.mark.parametrize(
    "cls", [get_sparse_method(*i) for i in IDS], ids=["@".join(i) for i in IDS]
)


@functools.cache
def peaked() -> tuple[torch.Tensor, torch.Tensor]:
    """[T, H, D] queries and keys: the first block draws everybody, and every block draws itself."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = NUM_BLOCKS * BLOCK
    own = torch.eye(HEAD_DIM)[1 : NUM_BLOCKS + 1].repeat_interleave(BLOCK, 0)[:, None]
    noise = torch.randn(2, num_tokens, NUM_HEADS, HEAD_DIM, generator=generator)
    query, key = own * 12 + 0.1 * noise[0], own * 12 + 0.1 * noise[1]
    query[:, :, 0], key[:BLOCK, :, 0] = 12.0, 12.0
    return query, key


@functools.cache
def peaked_scores() -> torch.Tensor:
    """[1, H, T, T] causal scores of the peaked queries and keys."""
    query, key = peaked()
    scores = torch.einsum("qhd,khd->hqk", query, key)[None] / math.sqrt(HEAD_DIM)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)


def lists(selection: BlockSelection | PageSelection | None, owns: list[int]) -> list[list[Any]]:
    """Per row and KV head, the blocks read; None reads all up to the row's own."""
    if selection is None:
        return [[list(range(own + 1))] * NUM_HEADS for own in owns]
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    assert selection.indices.shape[:2] == selection.counts.shape == (len(owns), NUM_HEADS)
    indices, counts = selection.indices.tolist(), selection.counts.tolist()
    return [
        [indices[row][head][: counts[row][head]] for head in range(NUM_HEADS)]
        for row in range(len(owns))
    ]


def select(method: SparseAttentionMethod, phase: Phase, owns: list[int]) -> list[list[Any]]:
    """Blocks that rows of these blocks read: tiles of one prompt, or one row in mid-page."""
    query, keys = peaked()
    if phase is Phase.PREFILL:
        chosen = method.select_prefill(paged.prefill_view(query, keys))
        tiles = lists(chosen, list(range(NUM_BLOCKS)))
        return [tiles[own] for own in owns]
    kv_lens = [own * BLOCK + BLOCK // 2 for own in owns]
    rows = query[torch.tensor(kv_lens) - 1]
    scores = page_scores(method)
    view = paged.decode_view(
        rows,
        keys,
        kv_lens,
        page_scores=None if scores is None else scores.expand(len(owns), -1, -1),
    )
    return lists(method.select_decode(view), owns)


def page_scores(method: SparseAttentionMethod) -> torch.Tensor | None:
    """[Hkv, M] what the whole peaked prompt leaves for decoding."""
    return method.score_pages(paged.prefill_view(*peaked()))


def frugal(cls: type[SparseAttentionMethod]) -> SparseAttentionMethod:
    """The method with every budget of blocks or pages at its minimum: the prompt here is short."""
    properties = cls.Knobs.model_json_schema().get("properties", {})
    return cls(
        {
            knob: schema["minimum"]
            for knob, schema in properties.items()
            if knob.endswith(("_blocks", "_pages")) and schema.get("type") == "integer"
        }
    )


def selects(cls: type[SparseAttentionMethod], phase: Phase) -> bool:
    hook = f"select_{phase}"
    return overrides(cls, hook)


def overrides(cls: type[SparseAttentionMethod], hook: str) -> bool:
    return getattr(cls, hook) is not getattr(SparseAttentionMethod, hook)


def kept_blocks(mask: torch.Tensor, own: int) -> list[list[int]]:
    """Per head, the blocks of which a mask [1, H, rows, keys] of rows in one block keeps a key."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % BLOCK))
    table = padded.unflatten(-1, (-1, BLOCK)).any(-1).any(-2)[0]  # [H, blocks]
    return [[b for b in range(own + 1) if head[b]] for head in table.tolist()]


def test_the_file_is_named_after_the_id_and_says_its_source(cls):
    module = inspect.getmodule(cls)
    assert module is not None
    assert Path(str(module.__file__)).stem == f"{cls.registered_name}_{cls.registered_version}"
    assert "Source:" in (module.__doc__ or "")
    assert cls().name == cls.registered_name
    assert cls.source
    assert cls.description().endswith(".")


def test_every_knob_has_a_default_and_a_description(cls):
    for knob, field in cls.Knobs.model_fields.items():
        assert not field.is_required(), knob
        assert (field.description or "").endswith("."), knob


def test_every_number_among_the_knobs_has_bounds(cls):
    for knob, schema in cls.Knobs.model_json_schema().get("properties", {}).items():
        if schema.get("type") in {"integer", "number"}:
            assert {"minimum", "exclusiveMinimum"} & schema.keys(), knob
            assert {"maximum", "exclusiveMaximum"} & schema.keys(), knob


def test_the_knobs_schema_is_json_and_closed(cls):
    schema = json.loads(json.dumps(cls.Knobs.model_json_schema()))
    assert schema["additionalProperties"] is False
    assert set(schema.get("properties", {})) == set(cls.Knobs.model_fields)


def test_equal_knobs_make_equal_methods(cls):
    defaults = cls.Knobs().model_dump()
    methods = [
        cls(),
        cls({}),
        cls(defaults),
        cls(cls.Knobs()),
        cls(json.loads(json.dumps(defaults))),
    ]
    assert len(set(methods)) == 1
    assert all(method == methods[0] for method in methods)
    assert cls() != object()
    assert repr(cls()).startswith(cls.__name__)


def test_a_different_knob_makes_a_different_method(cls):
    defaults = cls.Knobs()
    integers = {
        knob: value + 1 for knob, value in defaults if type(value) is int
    }  # bounds are inclusive, and no default sits on its upper one
    for knob, value in integers.items():
        assert cls({knob: value}) != cls()
        assert hash(cls({knob: value})) != hash(cls())


def test_the_knobs_cannot_be_changed(cls):
    for knob in cls.Knobs.model_fields:
        with pytest.raises(ValueError, match="frozen"):
            setattr(cls().knobs, knob, None)


def test_an_unknown_knob_is_refused_and_the_known_ones_are_named(cls):
    with pytest.raises(InvalidKnobsError, match="no knob 'nonsense'") as caught:
        cls({"nonsense": 1})
    assert caught.value.knob == "nonsense"
    assert str(sorted(cls.Knobs.model_fields)) in str(caught.value)
    with pytest.raises(InvalidKnobsError) as caught:
        cls({"x" * 100_000: 1})
    assert len(str(caught.value)) < 1000


def test_two_servers_can_compare_what_they_run(cls):
    assert cls.content_hash() == cls.content_hash()
    assert len(cls.content_hash()) == 12


def test_the_threshold_is_described(cls):
    info = cls().get_threshold_info()
    assert info["type"] in {"static", "dynamic", "dynamic_calibrated", "none"}
    assert "value" in info or info["type"] == "dynamic_calibrated"


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 1, 300), (2, 3, 200, 200), (1, 2, 130, 400)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_any_shape_give_a_mask_statistics_and_masked_scores(cls, shape, dtype):
    method, scores = cls(), torch.randn(shape).to(dtype)
    mask, stats = method.calculate_sparsity(scores)
    assert (mask.shape, mask.dtype) == (scores.shape, torch.bool)
    assert {"sparsity", "total_blocks", "sparse_blocks", "phase", "sample_length"} <= stats.keys()
    assert stats["phase"] == ("decode" if shape[2] == 1 else "prefill")
    assert stats["sample_length"] == shape[3]
    sparse = method.apply_sparsity(scores, mask)
    assert sparse.dtype == dtype
    assert torch.equal(sparse[mask], scores[mask])
    assert (sparse[~mask] <= torch.finfo(dtype).min).all()
    assert torch.equal(method.apply_sparsity(scores), sparse)


@pytest.mark.parametrize("phase", list(Phase))
def test_a_skip_threshold_lies_between_0_and_1_at_any_length(cls, phase):
    for kv_len in (1, 127, 4096, 1_000_000):
        threshold = cls().skip_threshold(phase, kv_len)
        assert threshold is None or 0 < threshold < 1


def test_the_defaults_are_servable_with_the_default_block(cls):
    cls().check_servable(BLOCK)


@pytest.mark.parametrize("phase", list(Phase))
def test_lists_hold_visible_blocks_once_and_always_the_diagonal(cls, phase):
    owns = [0, 1, 2, 7, 12, 15]
    for method in (cls(), frugal(cls)):
        for own, heads in zip(owns, select(method, phase, owns), strict=True):
            for blocks in heads:
                assert len(blocks) == len(set(blocks))
                assert own in blocks
                assert all(0 <= block <= own for block in blocks)


def test_a_row_alone_reads_what_it_reads_in_a_batch(cls):
    owns = [15, 3, 9, 3, 0]
    together = select(frugal(cls), Phase.DECODE, owns)
    alone = [select(frugal(cls), Phase.DECODE, [own])[0] for own in owns]
    assert together == alone


@pytest.mark.parametrize("ends", [(2048,), (128, 512, 1000), (896, 1024, 2000), (2, 3)])
def test_a_chunk_reads_what_it_reads_in_the_whole_prompt(cls, ends):
    """Whatever a prompt's length and the cuts, which fall on blocks except at its end."""
    method, stop = frugal(cls), ends[-1]
    query, keys = (tensor[:stop] for tensor in peaked())
    owns = list(range(math.ceil(stop / BLOCK)))
    whole = lists(method.select_prefill(paged.prefill_view(query, keys)), owns)
    parts, start, scores = [], 0, []
    for end in ends:
        end = min(stop, math.ceil(end / BLOCK) * BLOCK)
        view = paged.prefill_view(query, keys, start=start, stop=end)
        if view.num_rows:
            parts += lists(method.select_prefill(view), owns[start // BLOCK : view.num_blocks])
            scores.append(method.score_pages(view))
        start = end
    assert parts == whole
    expected = method.score_pages(paged.prefill_view(query, keys))
    given = [score for score in scores if score is not None]
    assert (expected is None) == (not given)
    if expected is not None:
        padded = [functional.pad(s, (0, expected.shape[1] - s.shape[1])) for s in given]
        assert torch.allclose(torch.stack(padded).sum(0), expected, rtol=1e-4, atol=1e-5)


def test_a_kv_head_decides_as_it_does_among_others(cls):
    """Unless the method says that it is not so, and is not served by ranks that share the heads."""
    method, num_tokens = frugal(cls), 8 * BLOCK
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(num_tokens, 4, HEAD_DIM, generator=generator) * 3
    keys = torch.randn(num_tokens, 2, HEAD_DIM, generator=generator) * 3
    shares = [(query, keys), *((query[:, 2 * h : 2 * h + 2], keys[:, h : h + 1]) for h in (0, 1))]
    scores = [method.score_pages(paged.prefill_view(*share)) for share in shares]
    kv_lens = [3 * BLOCK + 5, num_tokens]
    decided = [
        (
            method.select_prefill(paged.prefill_view(q, k)),
            method.select_decode(
                paged.decode_view(
                    q[torch.tensor(kv_lens) - 1],
                    k,
                    kv_lens,
                    page_scores=None if score is None else score.expand(2, -1, -1),
                )
            ),
        )
        for (q, k), score in zip(shares, scores, strict=True)
    ]
    is_alike = all(
        read_by_head(together) == read_by_head(first) + read_by_head(second)
        for together, first, second in zip(*decided, strict=True)
    )
    whole, *parts = [score for score in scores if score is not None] or [torch.zeros(0)]
    if parts:
        is_alike &= torch.allclose(whole, torch.cat(parts), rtol=1e-4, atol=1e-5)
    assert is_alike or not method.splits_over_ranks()


def read_by_head(selection: BlockSelection | PageSelection | None) -> list[Any]:
    """Per KV head, what each row reads; empty if the method reads everything."""
    if selection is None:
        return []
    indices, counts = selection.indices.tolist(), selection.counts.tolist()
    rows, heads = range(len(indices)), range(len(indices[0]))
    return [[indices[row][head][: counts[row][head]] for row in rows] for head in heads]


def test_a_method_is_the_same_in_another_process(cls):
    method = cls()
    hash(method)  # of strings, which hash differently there
    assert "_hash" not in method.__getstate__()
    copy = pickle.loads(pickle.dumps(method))  # noqa: S301 - it is our own
    assert copy == method
    assert hash(copy) == hash(method)


@pytest.mark.parametrize("phase", list(Phase))
def test_the_mask_keeps_the_blocks_that_serving_reads(cls, phase):
    if not selects(cls, phase):
        pytest.skip("reads every block before the softmax")
    method, owns = frugal(cls), [0, 1, 5, 10, 15]
    if overrides(cls, "score_pages") and phase is Phase.DECODE:
        pytest.skip("decides from the prompt's rows, which one row's scores do not hold")
    for own, served in zip(owns, select(method, phase, owns), strict=True):
        if phase is Phase.PREFILL:
            rows, end = slice(own * BLOCK, (own + 1) * BLOCK), (own + 1) * BLOCK
        else:
            end = own * BLOCK + BLOCK // 2
            rows = slice(end - 1, end)
        mask, _ = method.calculate_sparsity(peaked_scores()[:, :, rows, :end])
        assert kept_blocks(mask, own) == [sorted(blocks) for blocks in served]


def test_something_but_not_everything_is_left_out_in_each_declared_phase(cls):
    for phase in Phase:
        rows = slice(None) if phase is Phase.PREFILL else slice(-1, None)
        mask, stats = frugal(cls).calculate_sparsity(peaked_scores()[:, :, rows])
        visible = peaked_scores()[:, :, rows] > torch.finfo(torch.float32).min
        num_dropped = int((visible & ~mask).sum())
        assert (0 < num_dropped < int(visible.sum())) == (phase in cls.phases)
        if phase in cls.phases:
            assert 0 < stats["sparse_blocks"] < stats["total_blocks"]
            has_lists, threshold = selects(cls, phase), cls().skip_threshold(phase, 2048)
            assert has_lists or threshold is not None, "declared, but the serving half does nothing"


def test_a_fallback_is_told_by_the_lengths_at_the_end_and_counted_under_one_of_few_causes(cls):
    lengths = [(1, 1), (1, 10**6), (10**6, 10**6)]
    told = [cls().fallback(prompt_len, context_len) for prompt_len, context_len in lengths]
    causes = {fallback.cause for fallback in told if fallback is not None}
    assert causes <= {"below_break_even", "outside_of_calibration"}
    assert told[2] is None
    if cls.phases == (Phase.DECODE,):
        assert told[1] is None, "its last row is past the break-even"
