"""Ranks with a share of the heads each say together what the whole model says."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from service.engine.model_runner import ModelRunner
from service.engine.trial import packed_logits
from service.errors import ModelNotSupportedError
from service.models.bridge import NAME
from service.models.discovery import discover
from service.models.hugging_face import set_attention
from service.models.loading import LoadedModel
from service.models.self_test import plain_reference, run_self_test
from service.models.sharding import check_heads, shard_model
from service.parallel.group import RankGroup
from tests.service.models import tiny

BLOCK = 16


class Meeting:
    """Where ranks that are threads put their tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.tensors: list[torch.Tensor] = [torch.empty(0)] * size


class ThreadGroup(RankGroup):
    """A rank that is a thread; its sums are numbered like those of processes."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, len(meeting.tensors), torch.device("cpu"))
        self.meeting = meeting
        self.num_met = 0

    def sum(self, tensor):
        if not self._is_apart:
            tensor.copy_(torch.stack(self._all(tensor)).sum(0))
        return tensor

    def join_columns(self, tensor):
        return tensor if self._is_apart else torch.cat(self._all(tensor), -1)

    def agrees_on(self, value):
        return True

    def _all(self, tensor):
        self.num_met += 1
        self.meeting.tensors[self.rank] = tensor.clone()
        self.meeting.barrier.wait()
        tensors = list(self.meeting.tensors)
        self.meeting.barrier.wait()
        return tensors


def load(architecture: str, **overrides: object) -> LoadedModel:
    model = tiny.build(architecture, **overrides)
    layers = discover(model)
    set_attention(model, NAME)
    return LoadedModel(model, layers, Path(), architecture, (), 256)


def shares(architecture: str, size: int, *, fuse: bool, **overrides: object):
    meeting = Meeting(size)
    groups = [ThreadGroup(rank, meeting) for rank in range(size)]
    loaded = [shard_model(load(architecture, **overrides), group, fuse=fuse) for group in groups]
    return groups, loaded


def runner_of(loaded: LoadedModel) -> ModelRunner:
    modules = [(layer.module, layer.geometry) for layer in loaded.layers]
    return ModelRunner(loaded.model, modules, num_pages=16, block_size=BLOCK, num_slots=4)


def logits_of_all(loaded: list[LoadedModel], prompts: list[list[int]]) -> list[list[torch.Tensor]]:
    """By rank; every rank runs in a thread of its own."""
    runners = [runner_of(share) for share in loaded]
    with ThreadPoolExecutor(len(loaded)) as pool:
        return list(pool.map(lambda runner: packed_logits(runner, prompts, 64), runners))


def pick(logits: list[torch.Tensor], _prompts: object) -> list[torch.Tensor]:
    return logits


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt_neox"]
)
def test_two_ranks_say_what_the_whole_model_says(architecture, fuse):
    groups, loaded = shares(architecture, 2, fuse=fuse)
    assert loaded[0].reference is not None
    assert loaded[1].reference is None
    assert bool(loaded[0].fusions.modules) is (fuse and architecture != "gpt_neox")

    by_rank = logits_of_all(loaded, [list(p) for p in loaded[0].reference.prompts])

    for logits in by_rank:
        assert run_self_test(loaded[0], partial(pick, logits), max_tokens=256).error < 1e-5
    assert groups[0].num_met == groups[1].num_met > 0


def test_a_rank_holds_its_share_of_heads_weights_and_cache():
    whole = load("llama", vocab_size=96)
    _, (share, _) = shares("llama", 2, fuse=True, vocab_size=96)
    assert {(la.geometry.num_heads, la.geometry.num_kv_heads) for la in whole.layers} == {(4, 2)}
    assert {(la.geometry.num_heads, la.geometry.num_kv_heads) for la in share.layers} == {(2, 1)}
    for name, parameter in share.model.named_parameters():
        before = whole.model.get_parameter(name).numel()
        is_cut = name.endswith("proj.weight") or name == "lm_head.weight"
        assert parameter.numel() == (before // 2 if is_cut else before), name


@pytest.mark.parametrize("vocab_size", [95, 96])  # the first cannot be divided, and stays whole
@pytest.mark.parametrize("is_tied", [False, True])
def test_logits_are_divided_if_the_vocabulary_can_be(vocab_size, is_tied):
    overrides = {"vocab_size": vocab_size, "tie_word_embeddings": is_tied}
    _, loaded = shares("llama", 2, fuse=False, **overrides)
    model = loaded[0].model
    is_shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_shared is is_tied
    by_rank = logits_of_all(loaded, [list(prompt) for prompt in loaded[0].reference.prompts])
    assert by_rank[0][0].shape[1] == vocab_size
    assert all(map(torch.equal, *by_rank))
    assert run_self_test(loaded[0], lambda _: by_rank[1], max_tokens=256).error < 1e-5


def test_the_self_test_finds_a_share_that_is_wrong():
    _, loaded = shares("llama", 2, fuse=False)
    with torch.no_grad():
        loaded[1].layers[0].module.o_proj.weight.mul_(1.5)
    by_rank = logits_of_all(loaded, [list(p) for p in loaded[0].reference.prompts])
    with pytest.raises(ModelNotSupportedError, match="Self-test of llama failed"):
        run_self_test(loaded[0], lambda _: by_rank[0], max_tokens=256)


def test_the_reference_serves_shorter_prompts_too():
    loaded = load("llama")
    loaded = dataclasses.replace(loaded, reference=plain_reference(loaded))
    runner = runner_of(loaded)
    report = run_self_test(loaded, lambda prompts: packed_logits(runner, prompts, 64), 8)
    assert report.prompt_lens == (8, 8, 8)


@pytest.mark.parametrize(
    ("architecture", "overrides", "size", "message"),
    [
        ("llama", {}, 4, "The 2 KV heads of attention layer 0 cannot be divided among 4 ranks"),
        ("gemma2", {}, 3, "The 2 KV heads of attention layer 0 cannot be divided among 3"),
        (
            "llama",
            {"intermediate_size": 97},
            2,
            "The 97 channels of model.layers.0.mlp.gate_proj cannot be divided among 2 ranks",
        ),
        ("phi3", {}, 2, "model.layers.0.self_attn.o_proj in the style 'rowwise_split_input'"),
        ("olmo2", {}, 2, "model.layers.0.self_attn.q_proj in the style 'colwise_gather_output'"),
        ("mixtral", {}, 2, "model.layers.0.mlp.experts in the style 'moe_tp_experts'"),
        ("gpt_oss", {}, 2, "does not divide the heads of model.layers.0.self_attn"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_reason(architecture, overrides, size, message):
    loaded = load(architecture, **overrides)
    before = {name: p.shape for name, p in loaded.model.named_parameters()}
    with pytest.raises(ModelNotSupportedError, match=message):
        shard_model(loaded, ThreadGroup(0, Meeting(size)), fuse=True)
    assert {name: p.shape for name, p in loaded.model.named_parameters()} == before


def test_a_model_without_a_plan_is_refused():
    loaded = load("llama")
    loaded.model._tp_plan = {}
    with pytest.raises(ModelNotSupportedError, match="has no tensor parallel plan"):
        shard_model(loaded, ThreadGroup(0, Meeting(2)), fuse=True)


def test_query_heads_count_too():
    layer = load("llama").layers[0]
    odd = dataclasses.replace(
        layer, geometry=dataclasses.replace(layer.geometry, num_heads=6, num_kv_heads=4)
    )
    with pytest.raises(ModelNotSupportedError, match="The 6 query heads"):
        check_heads([odd], 4)


def test_ranks_that_would_fuse_differently_fuse_nothing(monkeypatch):
    monkeypatch.setattr(ThreadGroup, "agrees_on", lambda *_: False)
    _, (share, _) = shares("llama", 2, fuse=True)
    assert not share.fusions.modules
    assert not any(
        "forward" in vars(norm) for n, norm in share.model.named_modules() if "norm" in n
    )
    assert "the ranks would fuse different ones" in share.notes[-1]
