from dataclasses import replace

import pytest
import torch

from service.engine.model_runner import ModelRunner
from service.engine.trial import packed_logits
from service.errors import ModelNotSupportedError
from service.models.bridge import NAME
from service.models.loading import load_model
from service.models.self_test import run_self_test
from tests.service.models import tiny


@pytest.fixture(scope="module", params=["llama", "mistral"])
def loaded(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / request.param
    tiny.build(request.param).save_pretrained(directory)
    return load_model(directory, "cpu")


def engine_of(loaded, change=lambda geometry: geometry):
    """The packed path over ``loaded``, with geometries that ``change`` may falsify."""
    pairs = [(layer.module, change(layer.geometry)) for layer in loaded.layers]
    runner = ModelRunner(loaded.model, pairs, num_pages=64, block_size=8, num_slots=4)
    return lambda prompts: packed_logits(runner, prompts, 16)


def test_the_packed_path_passes(loaded):
    report = run_self_test(loaded, engine_of(loaded))
    assert report.error < 1e-5
    assert report.prompt_lens == (13, 29, 40)
    assert loaded.model.config._attn_implementation == NAME


def test_a_wrong_scale_is_caught_with_its_numbers(loaded):
    falsified = engine_of(loaded, lambda geometry: replace(geometry, scale=geometry.scale * 1.2))
    with pytest.raises(ModelNotSupportedError, match=r"differ from the plain model's by 0\.\d+"):
        run_self_test(loaded, falsified)
    assert loaded.model.config._attn_implementation == NAME


def test_a_wrong_window_is_caught(loaded):
    falsified = engine_of(loaded, lambda geometry: replace(geometry, window=6))
    with pytest.raises(ModelNotSupportedError, match="Self-test of"):
        run_self_test(loaded, falsified)


def test_prompts_grow_beyond_the_smallest_window_where_that_is_affordable(loaded):
    def with_window(size):
        layers = [replace(la, geometry=replace(la.geometry, window=size)) for la in loaded.layers]
        return replace(loaded, layers=layers)

    def lengths(model, max_tokens):
        seen = []

        def stop(prompts):
            seen.extend(map(len, prompts))
            raise InterruptedError

        with pytest.raises(InterruptedError):
            run_self_test(model, stop, max_tokens)
        return seen

    assert lengths(with_window(100), 1024) == [13, 29, 113]
    assert lengths(with_window(100), 64) == [13, 29, 40]
    assert lengths(with_window(250), 1024) == [13, 29, 40]  # the model's context is 256
    assert lengths(replace(loaded, max_context_tokens=20), 1024) == [13, 20, 20]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda logits: logits * float("nan"), "by inf of their size"),
        (lambda logits: logits[1:], "Self-test: logits of shape"),
        (lambda logits: torch.zeros_like(logits), "by 1 of their size"),
    ],
)
def test_logits_that_are_no_answer_are_caught(loaded, spoil, sentence):
    packed = engine_of(loaded)
    with pytest.raises(ModelNotSupportedError, match=sentence):
        run_self_test(loaded, lambda prompts: [spoil(logits) for logits in packed(prompts)])


def test_a_model_that_overflows_by_itself_is_refused(tmp_path):
    model = tiny.build("llama")
    model.lm_head.weight.data.fill_(float("inf"))
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, "cpu")
    with pytest.raises(ModelNotSupportedError, match="own logits are not finite"):
        run_self_test(loaded, engine_of(loaded))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_passes_within_its_own_tolerance(tmp_path, dtype):
    tiny.build("llama").save_pretrained(tmp_path)
    loaded = load_model(tmp_path, "cpu", dtype)
    report = run_self_test(loaded, engine_of(loaded))
    assert 1e-4 < report.error < report.tolerance
