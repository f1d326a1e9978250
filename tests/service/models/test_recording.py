import torch

from service.models.bridge import NAME
from service.models.discovery import discover
from service.models.hugging_face import set_attention
from service.models.recording import Call, random_like, record, standing_in
from tests.service.models import tiny


def test_calls_say_what_each_module_got_and_whose_output_it_was():
    model = tiny.build("llama")
    layers = discover(model)
    set_attention(model, NAME)
    with standing_in(layers) as attention:
        calls = record(model, list(model.modules()), 256)
    blocks = list(model.model.layers)
    assert calls[blocks[1]].rows is calls[blocks[0]].output
    assert calls[blocks[1].input_layernorm].rows is calls[blocks[0]].output
    assert calls[model.model.norm].rows is calls[blocks[-1]].output
    assert sorted(attention.asked) == list(range(tiny.NUM_LAYERS))
    assert attention.asked[0][0].shape == (24, 4, 16)
    assert not any(hasattr(layer.module, "sparseserve_layer") for layer in layers)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_call_can_be_repeated_with_other_rows_and_widened():
    low = torch.zeros(2, dtype=torch.bfloat16)
    call = Call((), {"hidden_states": low, "angles": (low, low), "index": torch.zeros(2).long()}, 0)
    wide = call.with_rows(low + 1).in_float32()
    assert wide.rows is not None
    assert torch.equal(wide.rows, torch.ones(2))
    assert wide.kwargs["angles"][0].dtype == torch.float32
    assert wide.kwargs["index"].dtype == torch.int64
    assert call.rows is low
    assert not call.has_rows_only
    assert Call((low,), {}, 0).has_rows_only
    assert not Call((1,), {}, 0).has_rows_only


def test_a_model_can_be_recorded_with_as_many_tokens_as_asked_for():
    model = tiny.build("llama")
    layers = discover(model)
    set_attention(model, NAME)
    with standing_in(layers):
        calls = record(model, [model.model.norm], 256, 1)
    rows = calls[model.model.norm].rows
    assert rows is not None
    assert rows.shape == (1, 1, 64)


def test_random_numbers_are_the_same_in_every_type():
    drawn = [
        random_like(torch.empty(9, dtype=dtype)).double()
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
