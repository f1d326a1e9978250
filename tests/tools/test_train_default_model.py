"""The built-in model's training script, the whole of it in a tiny form on the CPU."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typing_extensions import override

from tools.default_model import evaluation
from tools.default_model.corpus import Corpus
from tools.default_model.evaluation import Examiner, load_model
from tools.default_model.export import blend, export, exported_weights
from tools.default_model.model import LanguageModel
from tools.default_model.optim import Muon, orthogonalize
from tools.default_model.recipe import BOS_ID, TILE, TINY, Recipe
from tools.default_model.tasks import TaskWriter
from tools.default_model.training import StopRequest, Trainer
from tools.train_default_model import main

Exported = tuple[LanguageModel, Path]
Start = Callable[[Path], Trainer]

TOKENIZER = Path(__file__).parents[2] / "service" / "default_model" / "tokenizer.json"


@pytest.fixture
def start(recipe: Recipe, corpus: Corpus, writer: TaskWriter) -> Start:
    """Start a run in a folder, or take up the one that is there."""
    return lambda folder: Trainer(recipe, corpus, writer, folder, torch.device("cpu"), log_every=2)


class StopBeforeStep(StopRequest):
    """Asks to stop once so many steps have been begun."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.num_steps = num_steps

    @property
    @override
    def is_due(self) -> bool:
        self.num_steps -= 1
        return self.num_steps < 0


def states_of(trainer: Trainer) -> list[torch.Tensor]:
    optimizers = [state for o in trainer.optimizers for state in o.state.values()]
    tensors = [value for state in optimizers for value in state.values()]
    return [*trainer.model.state_dict().values(), *tensors]


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    stack = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(stack))
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.fixture
def tuned(exported: Exported, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """An export near to the other one, as fine-tuning leaves it."""
    model = copy.deepcopy(exported[0])
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    export(model, tokenizer, tmp_path / "tuned")
    return tmp_path / "tuned"


def test_a_blend_lies_between_two_exports_and_loads_like_them(
    exported: Exported, tuned: Path, tmp_path: Path
) -> None:
    (_, base), out = exported, tmp_path / "blend"
    arguments = ["--base", str(base), "--tuned", str(tuned), "--share", "0.75", "--out", str(out)]
    assert main(["blend", *arguments]) == 0
    first, second, mean = exported_weights(base), exported_weights(tuned), exported_weights(out)
    assert mean.keys() == first.keys()
    for name, weight in mean.items():
        expected = 0.25 * first[name] + 0.75 * second[name]
        torch.testing.assert_close(weight, expected, rtol=2**-7, atol=1e-6)
    assert {file.name for file in out.iterdir()} == {file.name for file in base.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model(torch.tensor([[BOS_ID, 5, 6]])).logits.isfinite().all()


@pytest.mark.parametrize(("share", "message"), [(1.5, "between 0 and 1, not 1.5"), (0.5, "shape")])
def test_what_cannot_be_blended_is_said(
    exported: Exported, tmp_path: Path, share: float, message: str
) -> None:
    built_in = TOKENIZER.parent
    with pytest.raises(ValueError, match=message):
        blend(exported[1], built_in, share, tmp_path / "blend")
    assert not (tmp_path / "blend").exists()


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [2, 3, 5])  # inside a stage, between two, inside the next
def test_a_resumed_run_ends_in_the_state_of_an_uninterrupted_one(
    start: Start, tmp_path: Path, num_steps: int
) -> None:
    straight = start(tmp_path / "straight")
    assert straight.run([3, 3])

    stopped = start(tmp_path / "stopped")
    stopped.stop = StopBeforeStep(num_steps)
    assert not stopped.run([3, 3])
    resumed = start(tmp_path / "stopped")
    assert resumed.step == num_steps
    assert resumed.run([3, 3])

    for left, right in zip(states_of(straight), states_of(resumed), strict=True):
        assert torch.equal(left, right)


def test_a_run_that_is_due_to_stop_saves_and_says_it_is_not_done(
    start: Start, tmp_path: Path
) -> None:
    trainer = start(tmp_path)
    trainer.stop = StopRequest(signalled=True)
    assert not trainer.run([3, 3])
    assert trainer.checkpoint.exists()
    trainer.stop = StopRequest(deadline=0.0)
    assert not trainer.run([3, 3])
    assert trainer.step == 0


@pytest.mark.slow
def test_training_lowers_the_loss_on_the_books(
    corpus: Corpus, start: Start, tmp_path: Path
) -> None:
    trainer = start(tmp_path)
    trainer.held_out = corpus
    before = trainer._held_out_bits(num_rows=4, length=64)
    trainer.run([15])
    assert trainer._held_out_bits(num_rows=4, length=64) < 0.9 * before


@pytest.mark.slow
def test_planning_measures_and_leaves_the_weights_as_they_were(
    start: Start, tmp_path: Path
) -> None:
    trainer = start(tmp_path)
    before = [weight.clone() for weight in trainer.model.parameters()]
    steps = trainer.plan(budget_s=0.5)
    assert len(steps) == 2
    assert trainer.step == 0
    assert all(map(torch.equal, before, trainer.model.parameters()))
    assert trainer.plan(budget_s=1000.0) == steps


def test_a_stage_too_short_to_have_tiles_to_skip_cannot_train_sharpness() -> None:
    with pytest.raises(ValueError, match="at least 384 tokens"):
        dataclasses.replace(TINY.stages[1], context=2 * TILE)


def test_muon_moves_on_in_the_direction_of_gradients_gone_by() -> None:
    matrix = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([matrix], lr=0.1, momentum=0.9, weight_decay=0.0)
    for gradient in (torch.eye(4), torch.zeros(4, 4)):
        matrix.grad = gradient
        before = matrix.detach().clone()
        optimizer.step()
        assert ((before - matrix).diagonal() > 0.05).all()


def test_weight_decay_shrinks_a_matrix_without_a_gradient() -> None:
    matrix = torch.nn.Parameter(torch.eye(4))
    Muon([matrix], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    torch.testing.assert_close(matrix.detach(), 0.95 * torch.eye(4))


def test_a_muon_step_refuses_a_closure() -> None:
    optimizer = Muon([torch.nn.Parameter(torch.eye(4))], 0.1, 0.9, 0.0)
    with pytest.raises(ValueError, match="without a closure"):
        optimizer.step(lambda: 0.0)


def test_the_learning_rate_warms_up_holds_and_falls_to_its_last_part() -> None:
    recipe = dataclasses.replace(Recipe(), warmup_steps=10, hold=0.5, final_lr=0.1)
    factors = [recipe.learning_rate(step, step / 100) for step in range(101)]
    assert factors[0] == 0.1
    assert factors[9:51] == [1.0] * 42
    assert factors[51:] == sorted(factors[51:], reverse=True)
    assert factors[100] == 0.1
    assert recipe.learning_rate(70, 0.7, start_step=70) == pytest.approx(0.5 * 0.6)


def test_the_export_gives_transformers_the_same_logits(exported: Exported) -> None:
    model, folder = exported
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(3, 4096, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model.logits(ids), loaded(ids).logits
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_exported_tokenizer_loads_and_begins_with_bos(exported: Exported) -> None:
    loaded = AutoTokenizer.from_pretrained(exported[1])
    ids = loaded("Hello there").input_ids
    assert ids[0] == loaded.bos_token_id == BOS_ID
    assert loaded.decode(ids[1:]) == "Hello there"


def test_a_run_can_start_from_an_export(
    exported: Exported, recipe: Recipe, corpus: Corpus, writer: TaskWriter, tmp_path: Path
) -> None:
    model, folder = exported
    trainer = Trainer(recipe, corpus, writer, tmp_path, torch.device("cpu"), start=(folder, 4))
    assert trainer.step == 4
    assert all(map(torch.equal, model.parameters(), trainer.model.parameters()))
    assert trainer.run([3, 3])


def test_bits_per_byte_of_a_model_that_knows_nothing_are_those_of_its_vocabulary(
    exported: Exported, corpus: Corpus, writer: TaskWriter
) -> None:
    model = load_model(exported[1], torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    examiner = Examiner(model, corpus, writer)
    expected = 12 / corpus.bytes_per_token  # 4096 tokens alike are 12 bits
    assert examiner.bits_per_byte(128, 256, 2) == pytest.approx(expected)
    assert examiner.needle(256, 1, 2) == 0.0
    assert examiner.chains(256, 2, 2) == 0.0


@pytest.mark.slow
def test_the_script_trains_stops_goes_on_exports_and_measures(
    books_file: Path, tmp_path: Path
) -> None:
    common = ["--books", str(books_file), "--tokenizer", str(TOKENIZER), "--recipe", "tiny"]
    train = ["train", *common, "--run", str(tmp_path / "run"), "--steps", "2", "1"]
    assert main([*train, "--stop-after-s", "0.001"]) == 75
    assert main(train) == 0
    out = tmp_path / "report.json"
    folder = str(tmp_path / "run" / "export")
    held_out = ["--held-out", str(books_file), "--tiny"]
    assert main(["evaluate", "--model", folder, *held_out, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert 0 < report["bits_per_byte_512"] < 4
    assert 0 <= report["needle_1_of_2_512"] <= 1
    assert report["attention"][0]["tokens"] == 256
    assert len(report["samples"]) == 6


def test_an_exam_that_is_cut_off_leaves_what_was_measured(
    exported: Exported, books_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(evaluation, "attention_report", cut_off)
    out = tmp_path / "report.json"
    held_out = ["--held-out", str(books_file), "--tiny", "--out", str(out)]
    with pytest.raises(TimeoutError):
        main(["evaluate", "--model", str(exported[1]), *held_out])
    report = json.loads(out.read_text())
    assert report["bits_per_byte_512"] > 0
    assert len(report["samples"]) == 6


def test_weights_from_past_the_end_of_the_plan_are_refused(
    exported: Exported, recipe: Recipe, corpus: Corpus, writer: TaskWriter, tmp_path: Path
) -> None:
    start = exported[1], 6
    trainer = Trainer(recipe, corpus, writer, tmp_path, torch.device("cpu"), start=start)
    with pytest.raises(ValueError, match="start step 6 is not within the plan's 6 steps"):
        trainer.run([3, 3])
