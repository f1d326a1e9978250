"""Calibrating a tiny model, from the command line to a request with a target."""

import asyncio
import json
import shutil

import pytest
from typer.testing import CliRunner

from service.calibration import NUM_DECODED, calibratable, planted_texts
from service.cli import app
from service.engine.engine import Engine
from service.engine.events import NoEvents
from service.engine.generation import GenerationRequest
from service.engine.sequence import SamplingParams
from service.engine.tokenizer import Tokenizer
from service.models.calibration_file import FILE_NAME
from service.models.loading import default_model_directory
from service.settings import Settings
from sparse_methods import Phase, SparseMethodError, get_sparse_method

runner = CliRunner()
TEXT = (default_model_directory() / "calibration_text.txt").read_text()[5000:40_000]
BLOCK = 16


@pytest.fixture(scope="module")
def calibrated_dir(tiny_model_dir, tmp_path_factory):
    directory = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("calibrated") / "model")
    (directory / "text.txt").write_text(TEXT)
    options = ["--text", str(directory / "text.txt"), "--lengths", "384,768"]
    options += ["--device", "cpu", "--block-size", str(BLOCK), "--method", "flash_skip_softmax"]
    done = runner.invoke(app, ["calibrate", "--model", str(directory), *options])
    assert done.exit_code == 0, done.output
    assert "flash_skip_softmax v2 prefill: r^2" in done.stdout
    return directory


def test_the_file_says_what_was_done(calibrated_dir):
    content = json.loads((calibrated_dir / FILE_NAME).read_text())
    assert content["schema_version"] == 1
    assert content["prompt_lengths"] == [384, 768, 384, 768]
    assert set(content["library_versions"]) == {"torch", "transformers", "scipy"}
    (entry,) = content["methods"]
    assert (entry["method"], entry["version"], entry["block_size"]) == (
        "flash_skip_softmax",
        "v2",
        BLOCK,
    )
    assert {len(fits["layers"]) for fits in entry["phases"].values()} == {2}


def test_a_request_of_a_calibrated_model_lands_near_its_target(calibrated_dir):
    settings = Settings(
        model=calibrated_dir, device="cpu", block_size=BLOCK, max_running_requests=4
    )
    engine = Engine.load(settings, NoEvents())
    target = 0.25  # at this length random layers reach 0.3
    method = get_sparse_method("flash_skip_softmax", "v2")(
        {"target_sparsity": target, "decode_target_sparsity": target}
    )
    request = GenerationRequest(
        request_id="r",
        method=method,
        sampling=SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.0),
        prompt_ids=engine.tokenizer.encode(TEXT[20_000:])[:700],
    )

    async def collect():
        async with await engine.submit(request) as generation:
            return [update async for _, update in generation][-1].finish

    engine.start()
    try:
        statistics = asyncio.run(collect()).statistics
    finally:
        engine.stop()
    assert statistics.phase(Phase.PREFILL).sparsity == pytest.approx(target, abs=0.05)
    assert statistics.phase(Phase.DECODE).sparsity == pytest.approx(target, abs=0.1)
    assert engine.calibrated(method).get_threshold_info()["type"] == "dynamic_calibrated"


def test_each_half_of_a_hybrid_is_bound_to_its_own_calibration(calibrated_dir):
    engine = Engine.load(
        Settings(model=calibrated_dir, device="cpu", block_size=BLOCK, max_running_requests=4),
        NoEvents(),
    )
    cls = get_sparse_method("hybrid")
    half = {"prefill": "flash_skip_softmax", "prefill_params": {"target_sparsity": 0.25}}
    bound = engine.calibrated(cls(half))
    bound.check_servable(BLOCK)
    assert bound.get_threshold_info()["prefill"]["type"] == "dynamic_calibrated"
    later = engine.calibrated(cls({"prefill": "xattention", "decode": "flash_skip_softmax"}))
    assert later.get_threshold_info()["decode"]["type"] == "dynamic_calibrated"
    with pytest.raises(SparseMethodError, match="needs a calibration"):
        cls(half).check_servable(BLOCK)


def test_planted_texts_have_the_length_asked_for_and_hold_facts():
    tokenizer = Tokenizer.load(default_model_directory())
    lengths = [300, 700]
    texts = planted_texts(tokenizer.encode, TEXT, lengths)
    assert [len(text.prompt_ids) for text in texts] == lengths
    assert {len(text.output_ids) for text in texts} == {NUM_DECODED}
    for text in texts:
        words = tokenizer.decode(text.prompt_ids)
        assert words.count("special magic number") == 4 + 2
        asked = words.rpartition("is: ")[2]
        assert words.count(f"is: {asked}") == 2
    assert texts == planted_texts(tokenizer.encode, TEXT, lengths)


def test_a_text_too_short_is_refused():
    tokenizer = Tokenizer.load(default_model_directory())
    with pytest.raises(ValueError, match="are needed"):
        planted_texts(tokenizer.encode, "Too short.", [1024])
    with pytest.raises(ValueError, match="too short to calibrate"):
        planted_texts(tokenizer.encode, TEXT, [100])


def test_only_methods_that_know_a_target_can_be_calibrated():
    ids = {(cls.registered_name, cls.registered_version) for cls in calibratable(None)}
    assert ("flash_skip_softmax", "v2") in ids
    assert ("flash_skip_softmax", "v1") not in ids
    for name in ("dense", "hybrid", "nonsense"):
        with pytest.raises(SparseMethodError):
            calibratable(name)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--lengths", "many"], 2, "no list of lengths"),
        (["--method", "dense"], 1, "no target sparsity"),
        (["--model", "/nowhere"], 1, "--text FILE"),
        (["--port", "1"], 2, "No such option"),
    ],
)
def test_a_bad_option_is_refused(options, code, words):
    done = runner.invoke(app, ["calibrate", *options])
    assert done.exit_code == code
    assert words in " ".join(done.output.replace("│", " ").split())
