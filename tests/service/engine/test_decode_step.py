"""A padded decode step on fixed buffers gives what an ordinary step gives."""

from typing import Any

import torch

from service.engine.decode_step import DecodeShape, is_decode_step
from service.engine.kv_cache import PageAllocator
from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Chunk
from service.engine.sequence import SamplingParams, Sequence
from service.models.loading import load_model
from sparse_methods import get_sparse_method

BLOCK = 16
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    ("streaming", {"sink_blocks": 1, "window_blocks": 2}),
    ("streaming", {"sink_blocks": 2, "window_blocks": 1, "dense_below": 90}),
    ("flash_skip_softmax", {"threshold": {"prefill": 0.5, "decode": 0.9}, "br": 16, "bc": 16}),
    ("dense", {}),
]


def sequences(allocator: PageAllocator) -> list[Sequence]:
    """Requests of different methods and lengths, their prompts not yet computed."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for slot, (name, knobs) in enumerate(METHODS):
        length = 40 + 13 * slot
        one = Sequence(
            request_id=str(slot),
            prompt_ids=torch.randint(8, 4000, (length,), generator=generator).tolist(),
            method=get_sparse_method(name, "v1")(knobs),
            sampling=SamplingParams(),
            generator=torch.Generator(),
            output_ids=[5 + slot],
            slot=slot,
        )
        assert allocator.try_reserve(one, length + 1)
        made.append(one)
    return made


def runner() -> ModelRunner:
    loaded = load_model(None, "cpu", "float32")
    layers = [(layer.module, layer.geometry) for layer in loaded.layers]
    return ModelRunner(loaded.model, layers, num_pages=64, block_size=BLOCK, num_slots=8)


def test_logits_and_statistics_are_those_of_an_ordinary_step():
    one, other = runner(), runner()
    made = sequences(PageAllocator(64, BLOCK))
    prompts = [Chunk(sequence, 0, sequence.num_prompt_tokens) for sequence in made]
    for each in (one, other):
        each.run(prompts)
    step = [Chunk(sequence, sequence.num_prompt_tokens, 1) for sequence in made]
    assert is_decode_step(step)
    assert not is_decode_step(prompts)
    expected, _ = one.run(step)
    given = other.run_padded_step(step)
    assert torch.allclose(given, expected, atol=1e-4)
    for sequence in made:
        assert other.statistics(sequence) == one.statistics(sequence)
    skipped = [one.statistics(sequence).overall.sparsity for sequence in made]
    assert skipped[0] == 0
    assert skipped[2] == 0, "below its break-even"
    assert skipped[1] > 0
    assert skipped[3] > 0


def test_what_differs_between_requests_is_data_except_for_methods_that_select():
    made = sequences(PageAllocator(64, BLOCK))
    step = [Chunk(sequence, sequence.num_prompt_tokens, 1) for sequence in made]
    shape = DecodeShape.of(step)
    assert (shape.num_rows, shape.num_pages, shape.has_thresholds) == (6, 6, True)
    [method] = shape.methods
    assert method == made[1].method, "the other one is below its break-even"
    assert DecodeShape.of(step[:1]) == DecodeShape.of(step[:1])
    assert DecodeShape.of(step[3:4]).methods == ()


def test_a_row_grows_past_its_break_even_without_a_seam():
    """Until then nothing is chosen for it, but its pages get the summaries that it needs then."""
    one, other = runner(), runner()
    [sequence, *_] = sequences(allocator := PageAllocator(64, BLOCK))
    knobs = {"budget_pages": 2, "top_p": None, "dense_below": 60}
    sequence.method = get_sparse_method("quest", "v1")(knobs)
    allocator.try_reserve(sequence, 80)
    for each in (one, other):
        each.run([Chunk(sequence, 0, sequence.num_prompt_tokens)])
    shapes = []
    for start in range(sequence.num_prompt_tokens, 75):
        step = [Chunk(sequence, start, 1)]
        shapes.append(DecodeShape.of(step))
        expected, _ = one.run(step)
        assert torch.allclose(other.run_padded_step(step), expected, atol=1e-4), start
        sequence.output_ids.append(7 + start)
    assert all(shape.has_summaries for shape in shapes)
    chooses = [bool(shape.methods) for shape in shapes]
    assert chooses == [start + 1 >= 60 for start in range(sequence.num_prompt_tokens, 75)]
    assert other.statistics(sequence) == one.statistics(sequence)
    assert one.statistics(sequence).overall.sparsity > 0


def test_rounding_wastes_at_most_half_of_what_is_there():
    made = sequences(PageAllocator(64, BLOCK))
    step = Chunk(made[0], made[0].num_prompt_tokens, 1)
    for count in range(1, 130):
        num_rows = DecodeShape.of([step] * count).num_rows
        assert count <= num_rows < 1.5 * count + 1
