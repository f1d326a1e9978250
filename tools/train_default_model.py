"""Train, export, blend and measure the built-in model.

    python -m tools.train_default_model train --books train.jsonl.xz --held-out test.jsonl.xz \
        --tokenizer tokenizer.json --run runs/1 --budget-s 1200
    python -m tools.train_default_model blend --base runs/1/export --tuned runs/2/export \
        --share 0.8 --out runs/blend
    python -m tools.train_default_model evaluate --model runs/blend --held-out test.jsonl.xz

`train` may be stopped by SIGTERM or `--stop-after-s` and is taken up where it stopped by the same
command. A .jsonl.xz file has one book a line, its text under `text`.
"""

import argparse
import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from tools.default_model.corpus import load_corpus
from tools.default_model.evaluation import Exam, Examiner, load_model
from tools.default_model.export import blend, export
from tools.default_model.recipe import RECIPES, TINY, without_sharpness
from tools.default_model.tasks import TaskWriter, common_words, single_token_words
from tools.default_model.training import StopRequest, Trainer

NUM_NAMING_TOKENS = 2_000_000  # of the books, from which names of several tokens are drawn
TINY_EXAM = Exam((512,), (2,), 512, 2, 2, (256,), 4)


def default_device() -> torch.device:
    """Return the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train and export, or go on training")
    train.add_argument("--books", type=Path, nargs="+", required=True, help=".jsonl.xz files")
    train.add_argument("--held-out", type=Path, nargs="*", default=[], help="logged, not trained")
    train.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    train.add_argument("--run", type=Path, required=True, help="folder of checkpoint and export")
    train.add_argument("--start-from", type=Path, help="an export, instead of a random start")
    train.add_argument("--start-step", type=int, default=0, help="its step in this plan")
    train.add_argument("--budget-s", type=float, default=1200.0, help="seconds of training")
    train.add_argument("--steps", type=int, nargs="+", help="steps of each stage, not measured")
    train.add_argument("--stop-after-s", type=float, help="save and stop after this long")
    train.add_argument("--recipe", choices=sorted(RECIPES), default="default")
    train.add_argument("--no-sharpness", action="store_true", help="plain cross-entropy")
    train.add_argument("--attention", choices=["flash", "cudnn"], help="GPU kernel; torch's choice")
    train.add_argument("--num-workers", type=int, default=0)
    blend = commands.add_parser("blend", help="average an export and one fine-tuned from it")
    blend.add_argument("--base", type=Path, required=True, help="what fine-tuning started from")
    blend.add_argument("--tuned", type=Path, required=True, help="the fine-tuned export")
    blend.add_argument("--share", type=float, required=True, help="weight of the latter, 0 to 1")
    blend.add_argument("--out", type=Path, required=True, help="folder of the new export")
    evaluate = commands.add_parser("evaluate", help="measure a model folder")
    evaluate.add_argument("--model", type=Path, required=True)
    evaluate.add_argument("--held-out", type=Path, nargs="+", required=True)
    evaluate.add_argument("--out", type=Path, help="JSON file; standard output without it")
    evaluate.add_argument("--cache", type=Path, help=".npz file that keeps the tokens")
    evaluate.add_argument("--no-bos", action="store_true", help="rows without <|bos|>")
    evaluate.add_argument("--tiny", action="store_true", help="a short exam, for trying out")
    return parser.parse_args(arguments)


def train(options: argparse.Namespace) -> bool:
    """Train up to the end or a stop, export, and return whether the end was reached."""
    deadline = time.monotonic() + options.stop_after_s if options.stop_after_s else float("inf")
    stop = StopRequest(deadline)
    stop.listen()
    if options.attention:
        torch.backends.cuda.enable_flash_sdp(options.attention == "flash")
        torch.backends.cuda.enable_cudnn_sdp(options.attention == "cudnn")
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    corpus = load_corpus(tokenizer, options.books, options.run / "books.npz")
    held_out = None
    if options.held_out:
        held_out = load_corpus(tokenizer, options.held_out, options.run / "held_out.npz")
    names = common_words(tokenizer.decode(corpus.tokens[:NUM_NAMING_TOKENS].tolist()))
    recipe = RECIPES[options.recipe]
    trainer = Trainer(
        recipe=without_sharpness(recipe) if options.no_sharpness else recipe,
        corpus=corpus,
        writer=TaskWriter(tokenizer, single_token_words(tokenizer) + names),
        folder=options.run,
        device=default_device(),
        held_out=held_out,
        start=(options.start_from, options.start_step) if options.start_from else None,
        num_workers=options.num_workers,
        log_every=10 if recipe is TINY else 100,
        stop=stop,
    )
    is_done = trainer.run(options.steps or trainer.plan(options.budget_s))
    export(trainer.model, tokenizer, options.run / "export")
    return is_done


def evaluate(options: argparse.Namespace) -> None:
    """Measure a model folder and write the report."""
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    exam = TINY_EXAM if options.tiny else Exam()
    device = default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    examiner = Examiner(
        load_model(options.model, device, dtype),
        load_corpus(tokenizer, options.held_out, options.cache),
        TaskWriter(tokenizer),
        has_bos=not options.no_bos,
    )
    if options.no_bos:
        exam = replace(exam, attention_contexts=(), sample_tokens=1)
    text = ""
    for report in exam.reports(examiner, options.model):
        text = json.dumps(report, indent=1) + "\n"
        if options.out:
            options.out.write_text(text)
    if not options.out:
        sys.stdout.write(text)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; exit status 75 says that training was stopped before its end."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.command == "train":
        return 0 if train(options) else 75
    if options.command == "blend":
        blend(options.base, options.tuned, options.share, options.out)
    else:
        evaluate(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
