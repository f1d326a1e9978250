import json

import pytest
import torch
import transformers
from transformers.utils import logging as transformers_logging

from service.errors import ModelNotSupportedError
from service.models.bridge import NAME
from service.models.loading import (
    check_directory,
    context_limit,
    default_model_directory,
    load_model,
)
from tests.service.models import tiny


@pytest.fixture(scope="module")
def llama_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny.build("llama").save_pretrained(directory)
    return directory


@pytest.fixture
def copy_of_llama(llama_directory, tmp_path):
    for file in llama_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_directory_becomes_a_model_ready_to_be_bound(llama_directory):
    loaded = load_model(llama_directory, "cpu")
    assert loaded.name == "tiny-llama"
    assert loaded.directory == llama_directory
    assert loaded.eos_token_ids == (2,)
    assert loaded.max_context_tokens == 256
    assert [layer.module for layer in loaded.layers] == [
        layer.self_attn for layer in loaded.model.model.layers
    ]
    assert loaded.model.config._attn_implementation == NAME
    assert loaded.model.config.pad_token_id is None
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_the_weights_are_those_of_the_directory(llama_directory):
    loaded = load_model(llama_directory, "cpu")
    loaded.model.set_attn_implementation("eager")
    ids = tiny.tokens(20, 1)
    expected = tiny.plain_logits(tiny.build("llama"), ids)
    with loaded.fusions.suspended():
        assert torch.allclose(tiny.plain_logits(loaded.model, ids), expected, atol=1e-5)


def test_modules_are_fused_unless_the_operator_says_no(llama_directory):
    fused, plain = (load_model(llama_directory, "cpu", fuse=fuse) for fuse in (True, False))
    assert len(fused.fusions.modules) == 9 + 3 * tiny.NUM_LAYERS
    assert any(note.startswith("Fused after comparison: 9 LlamaRMSNorm") for note in fused.notes)
    assert plain.fusions.modules == ()
    assert not any("Fused" in note for note in plain.notes)
    assert not any("forward" in vars(module) for module in plain.model.modules())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_asked_for_is_used(llama_directory, dtype):
    loaded = load_model(llama_directory, "cpu", dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}


def test_progress_is_counted_and_the_terminal_stays_silent(llama_directory, capfd):
    calls = []
    load_model(llama_directory, "cpu", progress=lambda *call: calls.append(call))
    assert {stage for stage, _, _ in calls} == {"weights"}
    done = [done for _, done, _ in calls]
    assert done == sorted(done)
    assert calls[-1][1] == calls[-1][2] > 1
    assert capfd.readouterr() == ("", "")


def test_what_transformers_shares_is_given_back_even_after_a_failure(llama_directory):
    def fail(*_):
        raise ZeroDivisionError

    def hook(*_):
        raise NotImplementedError("a stranger's hook, which must come back without being called")

    verbosity = transformers_logging.get_verbosity()
    before = transformers_logging.set_tqdm_hook(hook)
    try:
        with pytest.raises(ZeroDivisionError):
            load_model(llama_directory, "cpu", progress=fail)
    finally:
        assert transformers_logging.set_tqdm_hook(before) is hook
    assert transformers_logging.get_verbosity() == verbosity


def test_every_end_of_text_token_is_known(copy_of_llama):
    generation = {"eos_token_id": [5, 3], "transformers_version": transformers.__version__}
    (copy_of_llama / "generation_config.json").write_text(json.dumps(generation))
    assert load_model(copy_of_llama, "cpu").eos_token_ids == (2, 3, 5)


def test_a_model_without_an_end_of_text_token_loads(copy_of_llama):
    edit_config(copy_of_llama, eos_token_id=None)
    (copy_of_llama / "generation_config.json").unlink(missing_ok=True)
    assert load_model(copy_of_llama, "cpu").eos_token_ids == ()


def test_a_shorter_context_may_be_asked_for_but_not_a_longer_one(llama_directory):
    assert load_model(llama_directory, "cpu", max_context_tokens=100).max_context_tokens == 100
    with pytest.raises(ModelNotSupportedError, match=r"257 tokens was asked for.*limit is 256"):
        load_model(llama_directory, "cpu", max_context_tokens=257)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 64),
        ({"rope_type": "dynamic", "factor": 4.0}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
    ],
)
def test_yarn_stretches_the_context_and_the_others_name_it(rope, limit):
    parameters = {"rope_theta": 10000.0, **rope}
    config = transformers.LlamaConfig(max_position_embeddings=64, rope_parameters=parameters)
    assert context_limit(config) == limit


def test_learned_positions_limit_the_context():
    assert context_limit(transformers.GPT2Config(n_positions=77)) == 77


def test_a_config_without_any_length_has_no_limit():
    assert context_limit(transformers.PreTrainedConfig()) is None


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gemma3", "mistral"])
def test_other_architectures_survive_the_round_trip(name, tmp_path):
    tiny.build(name).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, "cpu")
    loaded.model.set_attn_implementation("eager")
    ids = tiny.tokens(20, 2)
    expected = tiny.plain_logits(tiny.build(name), ids)
    with loaded.fusions.suspended():
        assert torch.allclose(tiny.plain_logits(loaded.model, ids), expected, atol=1e-3)


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(ModelNotSupportedError, match="is not a directory"):
        load_model(tmp_path / "nowhere")


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ModelNotSupportedError, match=r"has no config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"), [("{", "cannot be read"), ("[]", "is not a JSON object")]
)
def test_a_broken_config_is_refused(tmp_path, content, sentence):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelNotSupportedError, match=sentence):
        load_model(tmp_path)


def test_a_config_with_impossible_values_is_refused(copy_of_llama):
    edit_config(copy_of_llama, hidden_size="wide")
    with pytest.raises(ModelNotSupportedError):
        load_model(copy_of_llama, "cpu")


def test_pickled_weights_are_refused_by_name(copy_of_llama):
    for file in copy_of_llama.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelNotSupportedError, match=r"no weights in the safetensors format\."):
        load_model(copy_of_llama, "cpu")
    (copy_of_llama / "pytorch_model.bin").write_bytes(b"evil")
    with pytest.raises(ModelNotSupportedError, match=r"pytorch_model\.bin, and a pickle can run"):
        load_model(copy_of_llama, "cpu")


def test_a_model_that_needs_its_own_code_is_refused_and_the_code_not_run(copy_of_llama):
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    edit_config(copy_of_llama, model_type="evil", auto_map=auto_map)
    (copy_of_llama / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelNotSupportedError, match="own code, which is never run"):
        load_model(copy_of_llama, "cpu")


def test_code_beside_a_known_architecture_is_ignored(copy_of_llama):
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    edit_config(copy_of_llama, auto_map=auto_map)
    (copy_of_llama / "evil.py").write_text("raise SystemExit('ran')")
    loaded = load_model(copy_of_llama, "cpu")
    assert type(loaded.model) is transformers.LlamaForCausalLM


def test_an_unknown_architecture_is_refused(copy_of_llama):
    edit_config(copy_of_llama, model_type="llama99")
    with pytest.raises(ModelNotSupportedError, match="type 'llama99', which the installed"):
        check_directory(copy_of_llama)


def test_missing_weights_are_refused_not_made_up(copy_of_llama):
    edit_config(copy_of_llama, num_hidden_layers=5)
    with pytest.raises(
        ModelNotSupportedError, match=r"weights in .* are missing, e.g. model.layers"
    ):
        load_model(copy_of_llama, "cpu")


def test_weights_of_another_shape_are_refused(copy_of_llama):
    edit_config(copy_of_llama, intermediate_size=100)
    with pytest.raises(ModelNotSupportedError, match=r"are refused|are mismatched"):
        load_model(copy_of_llama, "cpu")


def test_truncated_weights_are_refused(copy_of_llama):
    file = copy_of_llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelNotSupportedError, match=r"The weights in .* are refused"):
        load_model(copy_of_llama, "cpu")


def test_an_architecture_beyond_the_engine_is_refused_before_its_weights_are_read(copy_of_llama):
    config = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    config.save_pretrained(copy_of_llama)
    with pytest.raises(ModelNotSupportedError, match=r"attention interface|no context length"):
        load_model(copy_of_llama, "cpu", max_context_tokens=64)


def test_a_gpu_that_is_not_there_is_refused(llama_directory, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelNotSupportedError, match="torch sees no GPU"):
        load_model(llama_directory, "cuda")


def test_the_built_in_model_is_package_data():
    directory = default_model_directory()
    assert (directory / "config.json").is_file()
    assert (directory / "tokenizer.json").is_file()
