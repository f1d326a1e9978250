"""A plan made without weights is what the engine does with them."""

import orjson
import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from service.cli import app
from service.engine.kv_cache import allocate_caches, bytes_per_token
from service.engine.sizing import num_pages
from service.errors import BadRequestError, ModelNotSupportedError
from service.models.loading import load_model
from service.planning import RUNTIME_BYTES, human_bytes, make_plan, parse_bytes
from service.settings import Settings
from sparse_methods.kernels.page_summary import allocate_summaries

GIB = 2**30


@pytest.fixture(scope="module")
def loaded():
    return load_model(None, "cpu", "bfloat16", fuse=False)


def test_weights_pages_and_summaries_are_those_of_the_loaded_model(loaded, monkeypatch):
    settings = Settings(max_running_requests=3, dtype="bfloat16")
    plan = make_plan(settings, 8 * GIB)
    parameters = list(loaded.model.parameters())
    assert plan.weight_bytes == sum(p.numel() * p.itemsize for p in parameters)
    geometries = [layer.geometry for layer in loaded.layers]
    assert plan.num_layers == len(geometries)
    assert plan.kv_bytes_per_token == bytes_per_token(geometries, parameters[0].dtype)
    free = 8 * GIB - plan.weight_bytes - RUNTIME_BYTES
    monkeypatch.setattr("service.engine.sizing.free_memory_bytes", lambda _device: free)
    assert plan.num_pages == num_pages(settings, geometries, loaded)
    caches = allocate_caches(
        geometries, 2, plan.block_size, parameters[0].dtype, loaded.model.device
    )
    assert 2 * plan.page_bytes == sum(t.nbytes for pair in caches for t in pair)
    summaries = [allocate_summaries(keys) for keys, _ in caches]
    per_page = sum(s.minimum.nbytes + s.maximum.nbytes + s.total.nbytes for s in summaries) // 2
    assert plan.summary_bytes == plan.num_pages * per_page


def test_the_published_numbers_of_an_8b_model_from_its_config_alone(tmp_path):
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path)
    plan = make_plan(Settings(model=tmp_path, kv_cache_memory_fraction=0.9), 80 * GIB, 32_768)
    assert plan.num_parameters == 8_030_261_248
    assert plan.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert plan.num_sequences == 14  # 4 GiB each, in nine tenths of what weights and CUDA leave


def test_sequences_are_bound_by_memory_or_by_the_setting():
    page = make_plan(Settings(), 8 * GIB).page_bytes
    tight = Settings(kv_cache_bytes=20 * page)
    plan = make_plan(tight, 8 * GIB, context_tokens=129)
    assert (plan.num_pages, plan.pages_per_sequence) == (20, 2)
    assert (plan.num_sequences, plan.is_memory_bound) == (10, True)
    few = make_plan(tight.model_copy(update={"max_running_requests": 4}), 8 * GIB, 129)
    assert (few.num_sequences, few.is_memory_bound) == (4, False)


def test_what_does_not_fit_is_said():
    with pytest.raises(ModelNotSupportedError, match="do not hold them"):
        make_plan(Settings(), GIB)
    with pytest.raises(ModelNotSupportedError, match="KV cache may take 5 bytes"):
        make_plan(Settings(kv_cache_bytes=5), 8 * GIB)
    with pytest.raises(ModelNotSupportedError, match="own limit"):
        make_plan(Settings(), 8 * GIB, context_tokens=10**9)


@pytest.mark.parametrize(
    ("text", "count"),
    [("80GiB", 80 * GIB), ("1.5 gib", GIB * 3 // 2), ("141GB", 141 * 10**9), ("512", 512)],
)
def test_sizes_are_read_as_people_write_them(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "80 G", "1e9", "80GiBs"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(BadRequestError, match="no size"):
        parse_bytes(text)


def test_sizes_are_written_with_their_unit():
    assert [human_bytes(n) for n in (0, 1023, 1024, 80 * GIB)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "80 GiB",
    ]


def test_the_command_prints_a_table_or_numbers():
    options = ["plan", "--gpu-memory", "8GiB", "--context", "4096"]
    shown = CliRunner().invoke(app, options)
    assert shown.exit_code == 0, shown.output
    assert "kv bytes per token" in shown.output
    numbers = orjson.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    assert numbers["context_tokens"] == 4096
    refused = CliRunner().invoke(app, ["plan", "--gpu-memory", "8 cows"])
    assert (refused.exit_code, "is no size" in refused.stderr) == (1, True)
