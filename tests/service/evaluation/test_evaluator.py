"""Small evaluations of real models: what must come out, and what a rerun does."""

import json
import math

import pytest

from service.engine.engine import Engine
from service.engine.events import NoEvents
from service.evaluation.evaluator import Evaluator, Plan
from service.evaluation.results import Results
from service.evaluation.specs import parse_specs
from service.models.loading import default_model_directory
from service.settings import Settings
from sparse_methods import SparseAttentionMethod, get_sparse_method
from tests.service.conftest import TOKENIZER_DIR

pytestmark = pytest.mark.timeout(400)  # real prompts on slow, shared cores

TEXT = (TOKENIZER_DIR.parent.parent / "README.md").read_text()
METHODS = ['dense,streaming{"window_blocks": 1}']
TIMES = {
    "prefill_seconds",
    "decode_step_seconds",
    "prefill_selection_share",
    "decode_selection_share",
}


def make(model_dir, plan):
    settings = Settings(model=model_dir, device="cpu", dtype="float32", kv_cache_bytes=2**27)
    engine = Engine.load(settings, NoEvents())
    return Evaluator(engine, model_dir or default_model_directory(), plan)


def run(evaluator, path=None):
    calls = []
    results = Results(path, evaluator.conditions(), evaluator.environment())
    cells = evaluator.run(results, lambda done, total: calls.append((done, total)))
    assert calls == [(i, len(cells)) for i in range(len(cells) + 1)]
    return cells


def without_times(cells):
    return [{k: v for k, v in cell.items() if k not in TIMES} for cell in cells]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(3)))
    return path


@pytest.fixture(scope="module")
def built_in(text):
    """Dense, then streaming with one block at each end, on the built-in model."""
    plan = Plan(parse_specs(METHODS), [1024], 3, num_windows=2, num_decoded=8, text=text)
    return run(make(None, plan))


def test_dense_is_the_reference(built_in):
    dense, _ = built_in
    assert dense["needle_1_of_4"]["value"] + dense["needle_1_of_16"]["value"] > 1.3
    assert dense["prefill_density"] == dense["decode_density"] == 1.0
    assert dense["prefill_recall"] == dense["decode_recall"] == 1.0
    # Chunks may be packed otherwise than before, so equal only to the last bits.
    for name in ("kl", "decode_kl"):
        assert dense[name]["value"] == pytest.approx(0.0, abs=1e-6)
    for name in ("top1", "decode_top1"):
        assert dense[name]["value"] == 1.0
    assert dense["bits_per_byte_change_percent"]["value"] == pytest.approx(0.0, abs=1e-4)
    assert 0.5 < dense["bits_per_byte"]["value"] < 6
    assert dense["prefill_selection_share"] is None


def test_streaming_loses_the_needles_and_some_of_everything(built_in):
    _, streaming = built_in
    for name in ("needle_1_of_4", "needle_1_of_16"):
        assert streaming[name]["value"] <= 0.34
        assert streaming[name]["low"] < streaming[name]["value"] + 1e-9 < streaming[name]["high"]
    num_blocks = 1024 // 128
    kept, total = 2 * num_blocks - 1, num_blocks * (num_blocks + 1) // 2
    assert streaming["prefill_density"] == pytest.approx(kept / total, abs=1e-6)
    assert streaming["decode_density"] == pytest.approx(2 / num_blocks, abs=1e-6)
    assert 0.3 < streaming["prefill_recall"] < 0.999
    assert 0.3 < streaming["decode_recall"] < 0.999
    assert streaming["kl"]["value"] > 0.001
    assert streaming["decode_kl"]["value"] > 0.001
    assert streaming["top1"]["value"] < 1.0
    assert 0 < streaming["prefill_selection_share"] < 1
    assert 0 < streaming["decode_selection_share"] < 1
    assert streaming["prompt_tokens"] + streaming["generated_tokens"] == 9 * 1024


def small(text=None, **changes):
    options = {"lengths": [640], "num_samples": 1, "num_windows": 2, "num_decoded": 4, "text": text}
    return Plan(parse_specs(METHODS), **(options | changes))


def test_the_same_plan_measures_the_same_and_a_rerun_measures_nothing(
    tiny_model_dir, text, tmp_path, monkeypatch
):
    path = tmp_path / "results" / "out.json"
    first = run(make(tiny_model_dir, small(text)), path)
    again = run(make(tiny_model_dir, small(text)))
    assert without_times(first) == without_times(again)
    evaluator = make(tiny_model_dir, small(text))
    monkeypatch.setattr(evaluator, "_measure", None)  # whoever measures fails
    assert run(evaluator, path) == first
    assert json.loads(path.read_text())["cells"] == first


def test_a_rerun_measures_only_what_is_new(tiny_model_dir, text, tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    run(make(tiny_model_dir, small(text)), path)
    evaluator = make(tiny_model_dir, small(text, lengths=[640, 700]))
    measured = []

    def measure(spec, length):
        measured.append((spec.label, length))
        return {}

    monkeypatch.setattr(evaluator, "_measure", measure)
    run(evaluator, path)
    assert measured == [("dense v1", 700), ("streaming v1 (window_blocks=1)", 700)]


def test_an_interrupted_run_keeps_its_cells_and_goes_on_with_the_rest(
    tiny_model_dir, text, tmp_path, monkeypatch
):
    path, evaluator = tmp_path / "out.json", make(tiny_model_dir, small(text))
    hashes = [get_sparse_method(name).content_hash() for name in ("dense", "streaming")]
    measured = []

    def measure(spec, _length):
        measured.append(spec.label)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(evaluator, "_measure", measure)
    # Whoever edits a method meanwhile does not change what was measured.
    monkeypatch.setattr(SparseAttentionMethod, "content_hash", lambda: "edited")
    with pytest.raises(KeyboardInterrupt):
        run(evaluator, path)
    (cell,) = json.loads(path.read_text())["cells"]
    assert (cell["method"], cell["content_hash"]) == ("dense", hashes[0])
    cells = run(evaluator, path)
    assert measured == ["dense v1", *["streaming v1 (window_blocks=1)"] * 2]
    assert [cell["content_hash"] for cell in cells] == hashes


@pytest.mark.parametrize("changes", [{"seed": 1}, {"num_samples": 2}])
def test_results_of_other_conditions_are_never_mixed(tiny_model_dir, text, tmp_path, changes):
    path = tmp_path / "out.json"
    evaluator = make(tiny_model_dir, small(text))
    Results(path, evaluator.conditions(), {}).add({})
    other = make(tiny_model_dir, small(text, **changes)).conditions()
    with pytest.raises(ValueError, match=r"cannot be compared.*Write to another file"):
        Results(path, other, {})


def test_without_a_text_the_model_writes_one_and_bits_per_byte_are_left_out(tiny_model_dir):
    evaluator = make(tiny_model_dir, small())
    assert "written by the model itself" in evaluator.conditions()["haystack"]
    for cell in run(evaluator):
        assert not [name for name in cell if "bits_per_byte" in name]
        assert math.isfinite(cell["kl"]["value"])


def test_a_length_beyond_the_context_is_refused_before_anything_runs(tiny_model_dir):
    with pytest.raises(ValueError, match="beyond the context of 4096"):
        make(tiny_model_dir, small(lengths=[5000]))
