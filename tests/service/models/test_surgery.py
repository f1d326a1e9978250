"""Fused modules compute what the plain model does; what does not match is left alone and named."""

import pytest
import torch
from torch import nn

from service.engine.model_runner import ModelRunner
from service.engine.trial import packed_logits
from service.models.bridge import NAME
from service.models.discovery import discover
from service.models.hugging_face import set_attention, using_attention
from service.models.kernels import eager
from service.models.surgery import fuse_modules
from tests.service.models import tiny

MAX_CONTEXT_TOKENS = 256
PROMPTS = [tiny.tokens(length, seed) for seed, length in enumerate((13, 29, 40))]
TOLERANCE = 1e-5  # of the largest logit

# By architecture, of one layer: norms, attention, MLP, the layer itself. Beside them a last norm.
FUSED_PER_LAYER = {
    "llama": 5,
    "qwen2": 5,
    "qwen3": 7,
    "mistral": 5,
    "gemma2": 6,
    "gemma3": 8,
    "phi3": 5,
    "olmo2": 5,  # its norms of all heads at once are not those of an attention that fuses
    "mixtral": 4,
    "qwen3_moe": 6,
    "gpt_oss": 4,
}


class Operated:
    """A tiny model before and after surgery, and its runner."""

    def __init__(self, model):
        self.model = model
        self.expected = [tiny.plain_logits(model, prompt) for prompt in PROMPTS]
        self.layers = discover(model)
        set_attention(model, NAME)
        self.fusions, self.notes = fuse_modules(model, self.layers, MAX_CONTEXT_TOKENS)

    def packed(self):
        pairs = [(layer.module, layer.geometry) for layer in self.layers]
        runner = ModelRunner(self.model, pairs, num_pages=64, block_size=8, num_slots=4)
        return packed_logits(runner, PROMPTS, 16)

    def error(self):
        pairs = zip(self.packed(), self.expected, strict=True)
        return max(float((a - e).abs().max() / e.abs().max()) for a, e in pairs)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_logits_stay_what_they_are(name):
    operated = Operated(tiny.build(name))
    number = FUSED_PER_LAYER.get(name)
    taken = len(operated.fusions.modules)
    assert taken == (0 if number is None else tiny.NUM_LAYERS * number + 1)
    assert operated.error() < TOLERANCE
    with operated.fusions.suspended(), using_attention(operated.model, "eager"):
        for prompt, expected in zip(PROMPTS, operated.expected, strict=True):
            torch.testing.assert_close(tiny.plain_logits(operated.model, prompt), expected)
    assert len(operated.fusions.modules) == taken
    assert operated.error() < TOLERANCE


def test_biases_of_some_projections_are_merged():
    model = tiny.build("llama", attention_bias=True, mlp_bias=True)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias = None
    operated = Operated(model)
    assert len(operated.fusions.modules) == tiny.NUM_LAYERS * 5 + 1
    assert operated.error() < TOLERANCE


@pytest.mark.parametrize(
    ("activation", "is_fused"), [("silu", True), ("gelu_pytorch_tanh", True), ("gelu", False)]
)
def test_an_activation_is_told_from_its_likes_in_16_bits_too(activation, is_fused):
    model = tiny.build("llama", hidden_act=activation)
    model.bfloat16()
    taken = Operated(model).fusions.modules
    assert (model.model.layers[0].mlp in taken) == is_fused


@pytest.mark.parametrize(
    "path",
    [
        "self_attn.q_proj.weight",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    ],
)
def test_every_weight_still_matters(path):
    operated = Operated(tiny.build("qwen3", attention_bias=True))
    parameter = operated.model.model.layers[1].get_parameter(path)
    parameter.data.mul_(1.5)
    assert operated.error() > 1e-3


def storage_bytes(model):
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_merged_weights_are_not_stored_twice(name):
    model = tiny.build(name)
    before = storage_bytes(model)
    operated = Operated(model)
    assert storage_bytes(model) == before
    attention = model.model.layers[0].self_attn
    if name != "phi3":
        assert attention.q_proj.weight.untyped_storage().data_ptr() == (
            attention.v_proj.weight.untyped_storage().data_ptr()
        )
    fused = vars(attention)["forward"]
    own = {parameter.untyped_storage().data_ptr() for parameter in attention.parameters()}
    assert fused._projection.weight.untyped_storage().data_ptr() in own
    assert operated.fusions.modules


class Scaled(nn.Module):
    """A norm by its name and its attributes, but not by what it computes."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states):
        scaled = nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, 1e-6)
        return scaled * 1.01


class ScaledRMSNorm(Scaled):
    """See ``Scaled``."""


def test_what_does_not_match_is_left_alone_and_named():
    model = tiny.build("llama")
    layer = model.model.layers[2]
    layer.post_attention_layernorm = ScaledRMSNorm(layer.post_attention_layernorm.weight.data)
    operated = Operated(model)
    assert layer.post_attention_layernorm not in operated.fusions.modules
    assert layer not in operated.fusions.modules
    assert len(operated.fusions.modules) == tiny.NUM_LAYERS * 5 + 1 - 2
    assert any(
        note.startswith("1 ScaledRMSNorm left as they are: differs by ") for note in operated.notes
    )
    assert "1 LlamaDecoderLayer left as they are: has another structure." in operated.notes
    assert operated.error() < TOLERANCE


class Kernels:
    """The eager ones, which compute some numbers of rows in another way, and maybe wrong."""

    OTHER_ROWS = (1, 100)
    rms_norm = staticmethod(eager.rms_norm)
    add_rms_norm = staticmethod(eager.add_rms_norm)
    rotate = staticmethod(eager.rotate)

    def __init__(self, linear=(), gated=(), error=None):
        self._error = error
        self._wrong = {"linear": linear, "gated_product": gated}
        self.gated = []

    def linear(self, rows, projection):
        return eager.linear(rows, projection) * self._factor("linear", rows)

    def gated_product(self, rows, projection, activation):
        self.gated.append(rows.shape[-2])
        if self._error is not None:
            raise self._error
        return eager.gated_product(rows, projection, activation) * self._factor(
            "gated_product", rows
        )

    def _factor(self, name, rows):
        return 1.01 if rows.shape[-2] in self._wrong[name] else 1.0


def operated_with(monkeypatch, *kernels, name="llama"):
    pick = "service.models.surgery.pick_module_kernels"
    monkeypatch.setattr(pick, lambda *_: list(kernels))
    return Operated(tiny.build(name))


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "gpt_oss"])
def test_logits_stay_what_they_are_where_a_device_has_its_own_products(monkeypatch, name):
    operated = operated_with(monkeypatch, Kernels(), name=name)
    number = FUSED_PER_LAYER[name] + 1  # of attention the projection of its output, at least
    assert len(operated.fusions.modules) >= tiny.NUM_LAYERS * number + 2
    assert operated.error() < TOLERANCE


def test_linear_layers_that_are_merged_with_none_are_taken_where_a_device_has_its_own(monkeypatch):
    operated = operated_with(monkeypatch, Kernels())
    model = operated.model
    taken = {m for m in operated.fusions.modules if type(m) is nn.Linear}
    outputs = {layer.self_attn.o_proj for layer in model.model.layers}
    downs = {layer.mlp.down_proj for layer in model.model.layers}
    assert taken == {model.lm_head} | outputs | downs
    assert operated.error() < TOLERANCE


def test_a_linear_layer_with_a_forward_of_its_own_is_left_alone(monkeypatch):
    monkeypatch.setattr("service.models.surgery.pick_module_kernels", lambda *_: [Kernels()])
    model = tiny.build("llama")
    head, down = model.lm_head, model.model.layers[0].mlp.down_proj
    for linear in (head, down):
        plain = nn.Linear.forward.__get__(linear)
        linear.forward = lambda rows, plain=plain: plain(rows)
    operated = Operated(model)
    assert not {head, down} & set(operated.fusions.modules)
    assert operated.error() < TOLERANCE


@pytest.mark.parametrize("num_rows", [1, 100])
def test_what_is_wrong_for_some_number_of_rows_is_not_taken(monkeypatch, num_rows):
    operated = operated_with(monkeypatch, Kernels(linear=[num_rows], gated=[num_rows]))
    model = operated.model
    layer = model.model.layers[0]
    assert not {model.lm_head, layer.mlp} & set(operated.fusions.modules)
    # Attention is tried with some rows and with one: no chunk is computed in another way.
    assert (layer.self_attn in operated.fusions.modules) == (num_rows == 100)
    assert any("4 LlamaMLP left as they are: differs" in note for note in operated.notes)
    assert operated.error() < TOLERANCE


class CompilerError(Exception):
    """As libraries derive theirs: of nothing that one would expect."""


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (Kernels(gated=[100]), "differs by"),
        (Kernels(error=AssertionError("tiles")), "fails with AssertionError: tiles"),
        (Kernels(error=CompilerError("no")), "fails with CompilerError: no"),
    ],
    ids=["wrong", "assertion", "compiler"],
)
def test_gated_products_that_one_library_cannot_compute_are_left_to_the_next(
    monkeypatch, library, reason
):
    own = Kernels()
    operated = operated_with(monkeypatch, library, own)
    assert operated.model.model.layers[0].mlp in operated.fusions.modules
    assert not any("left as they are" in note for note in operated.notes)
    assert any(
        note.startswith(f"Some LlamaMLP are computed without a library, which {reason}")
        for note in operated.notes
    )
    library.gated.clear()
    assert operated.error() < TOLERANCE
    assert not library.gated
    assert own.gated


def test_a_residual_that_is_scaled_is_noticed():
    model = tiny.build("llama")
    layer = model.model.layers[1]
    plain = type(layer).forward

    def forward(hidden_states, **kwargs):
        return plain(layer, hidden_states, **kwargs) * 0.9

    layer.forward = forward
    operated = Operated(model)
    assert layer not in operated.fusions.modules
    assert any("1 LlamaDecoderLayer left as they are: differs" in note for note in operated.notes)
    assert operated.error() < TOLERANCE


def test_a_rotation_of_neighbours_is_noticed(monkeypatch):
    from transformers.models.llama import modeling_llama

    def rotate_half(x):
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

    monkeypatch.setattr(modeling_llama, "rotate_half", rotate_half)
    operated = Operated(tiny.build("llama"))
    assert any("4 LlamaAttention left as they are: differs" in note for note in operated.notes)
    assert operated.error() < TOLERANCE


def test_bounds_on_queries_and_keys_are_noticed(monkeypatch):
    monkeypatch.setitem(tiny._RECIPES, "olmo", ("Olmo", {"clip_qkv": 8.0}))
    operated = Operated(tiny.build("olmo"))
    assert any("4 OlmoAttention left as they are: differs" in note for note in operated.notes)
    assert any("4 OlmoMLP" in note for note in operated.notes if note.startswith("Fused"))
    assert operated.error() < TOLERANCE


def test_a_model_that_cannot_be_recorded_is_left_alone():
    model = tiny.build("llama")
    layers = discover(model)
    set_attention(model, NAME)
    model.model.norm.forward = lambda _: [][0]
    fusions, notes = fuse_modules(model, layers, MAX_CONTEXT_TOKENS)
    assert fusions.modules == ()
    assert notes == ("No module was fused: IndexError: list index out of range",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_compared_with_float32(dtype):
    operated = Operated(tiny.build("qwen3").to(dtype))
    assert len(operated.fusions.modules) == tiny.NUM_LAYERS * 7 + 1
    exact = [tiny.plain_logits(tiny.build("qwen3").to(dtype).float(), p) for p in PROMPTS]
    errors = [
        torch.stack([(a.float() - e).norm() for a, e in zip(logits, exact, strict=True)]).norm()
        for logits in (operated.packed(), operated.expected)
    ]
    assert errors[0] < 1.25 * errors[1]


def test_fused_attention_refuses_a_cache_of_the_models_own():
    operated = Operated(tiny.build("llama"))
    with pytest.raises(RuntimeError, match="paged cache only"):
        operated.model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=True)


@pytest.mark.parametrize(
    "name", ["past_key_values", "cache"]
)  # before transformers 5.24, and since
def test_fused_attention_knows_both_names_of_a_cache(name):
    attention = Operated(tiny.build("llama")).layers[0].module
    angles = torch.zeros(1, 3, 16), torch.zeros(1, 3, 16)
    with pytest.raises(RuntimeError, match="paged cache only"):
        attention.forward(torch.zeros(1, 3, 64), angles, **{name: object()})


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_rows_that_nobody_reads_skip_the_last_mlp(name):
    operated = Operated(tiny.build(name))
    last_mlp = operated.layers[-1].module
    parents = [m for m in operated.model.modules() if last_mlp in m.children()]
    seen = []
    forward = parents[0].mlp.forward

    def observed(rows):
        seen.append(rows.shape[1])
        return forward(rows)

    parents[0].mlp.forward = observed
    assert operated.error() < TOLERANCE
    all_rows, last_rows = seen[:2]  # the trial computes each step both ways
    assert all_rows > last_rows == len(PROMPTS)
