"""Our engine with random weights in the shape of Llama 3.1 8B on a GPU: prefill and decode.

``python -m benchmarks.llama`` prints time to first token and milliseconds per decode step, twice:
of the model runner alone, and of the engine with scheduling, sampling and text. The last column
compares with the best figure known of another engine on an H100 (vLLM 0.23.0, FlashAttention 3,
CUDA graphs; measured on the same shapes).
"""

import time
from typing import Any

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.initialization import no_init_weights

from benchmarks.report import save
from service.engine.core import EngineCore
from service.engine.events import NoEvents
from service.engine.kv_cache import PageAllocator
from service.engine.model_runner import ModelRunner
from service.engine.sampler import Sampler
from service.engine.scheduler import Chunk, Limits, Scheduler
from service.engine.sequence import SamplingParams, Sequence
from service.engine.stopping import OutputBuilder
from service.engine.tokenizer import Tokenizer
from service.evaluation.specs import parse_spec
from service.models.bridge import NAME
from service.models.discovery import discover
from service.models.fusions import Fusions
from service.models.hugging_face import set_attention
from service.models.loading import LoadedModel, default_model_directory
from service.models.surgery import fuse_modules

SHAPE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131200,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
BLOCK = 128
_PEER_FIRST_TOKEN_S = {1024: 0.025, 8192: 0.206, 32768: 1.167, 131072: 10.19}
_PEER_STEP_MS = {
    (1, 1024): 6.74,
    (32, 1024): 8.74,
    (128, 1024): 14.44,
    (8, 32768): 19.45,
    (1, 131072): 12.56,
}


def main(  # noqa: PLR0913 - each is an option of the command line
    method: list[str] = ["dense"],  # noqa: B006 - typer reads it, nobody writes it
    num_layers: int = 32,
    longest: int = 131072,
    chunk: int = 8192,
    *,
    prefill: bool = True,
    decode: bool = True,
    fuse: bool = True,
    write: bool = True,
) -> None:
    """Measure methods: name, name@v1 or name@v1{"knob": 1}; joined by +, they decode together."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs a CUDA device")
    runner = build_runner(num_layers, fuse=fuse)
    results: dict[str, Any] = {"fused": fuse, "attention": runner.attention_name}
    for spec in method:
        print(f"\n{spec}", flush=True)
        results[spec] = {}
        if prefill and "+" not in spec:  # a prompt has one method
            results[spec]["first_token_s"] = measure_prefill(runner, spec, longest, chunk)
        if decode:
            results[spec] |= measure_decode(runner, spec, longest)
    if write:
        print(f"written to {save('llama-gpu', results)}")


def build_runner(num_layers: int = 32, *, fuse: bool = True) -> ModelRunner:
    """A model with random weights, and a cache for 300,000 tokens."""
    loaded = build_model(num_layers, fuse=fuse)
    print("\n".join(loaded.notes))
    modules = [(layer.module, layer.geometry) for layer in loaded.layers]
    return ModelRunner(loaded.model, modules, num_pages=2400, block_size=BLOCK, num_slots=160)


def build_model(
    num_layers: int = 32, *, fuse: bool = True, shape: dict[str, Any] = SHAPE, device: str = "cuda"
) -> LoadedModel:
    """The model with random weights; what it says is read by the built-in model's tokenizer."""
    config = LlamaConfig(**{**shape, "num_hidden_layers": num_layers})
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.02)
        else:
            parameter.data.fill_(1.0 if "norm" in name else 0.0)
    model.eval().requires_grad_(requires_grad=False)
    layers, limit = discover(model), config.max_position_embeddings
    set_attention(model, NAME)
    fusions, notes = fuse_modules(model, layers, limit) if fuse else (Fusions(), ())
    return LoadedModel(
        model, layers, default_model_directory(), "8B shape", (), limit, fusions, tuple(notes)
    )


def measure_prefill(runner: ModelRunner, spec: str, longest: int, chunk: int) -> dict[int, float]:
    """Seconds to the first token by length: the best of ten, of three where one takes seconds."""
    result: dict[int, float] = {}
    for length, peer in _PEER_FIRST_TOKEN_S.items():
        if length <= longest:
            repeats = 10 if length <= 8192 else 3  # the first ones still allocate
            seconds = min(first_token(runner, spec, length, chunk) for _ in range(repeats))
            result[length] = seconds
            print(f"  first token {length:7d}  {seconds:8.4f} s   ratio {peer / seconds:5.2f}")
    return result


def measure_decode(runner: ModelRunner, spec: str, longest: int) -> dict[str, dict[str, float]]:
    """Milliseconds per decode step by shape, of the model alone and of the whole engine."""
    result: dict[str, dict[str, float]] = {"step_ms": {}, "engine_step_ms": {}}
    for (batch, length), peer in _PEER_STEP_MS.items():
        if length <= longest:
            for figure, time_step in (("step_ms", decode_step), ("engine_step_ms", engine_step)):
                milliseconds = time_step(runner, spec, batch, length)
                result[figure][f"{batch}x{length}"] = milliseconds
                ratio, shape = peer / milliseconds, f"{batch:4d}x{length:<7d}"
                print(f"  {figure:14s} {shape} {milliseconds:8.3f} ms  ratio {ratio:5.2f}")
    return result


def first_token(runner: ModelRunner, spec: str, length: int, chunk: int) -> float:
    """Seconds from tokens to the choice of the first one, prefilled in chunks."""
    sequence, logits = sequence_of(spec, length, 0), torch.empty(0)
    allocator = PageAllocator(runner.num_pages, BLOCK)
    _synchronize(runner)
    started_at = time.perf_counter()
    for start in range(0, length, chunk):
        num_tokens = min(chunk, length - start)
        if not allocator.try_reserve(sequence, num_tokens):
            raise MemoryError("the cache is too small")
        logits, _ = runner.run([Chunk(sequence, start, num_tokens)])
        sequence.num_computed_tokens += num_tokens
    logits.argmax(-1).tolist()
    return time.perf_counter() - started_at


def decode_step(
    runner: ModelRunner, spec: str, batch: int, length: int, num_steps: int = 20
) -> float:
    """Milliseconds per step; keys are whatever the cache holds, since time does not depend on it.

    The methods of a batch are those of ``spec`` in turns.
    """
    specs = spec.split("+")
    allocator = PageAllocator(runner.num_pages, BLOCK)
    sequences = []
    for index in range(batch):
        sequence = sequence_of(specs[index % len(specs)], length - num_steps - 4, index)
        if not allocator.try_reserve(sequence, length):
            raise MemoryError("the cache is too small")
        sequence.num_computed_tokens = sequence.num_prompt_tokens
        sequences.append(sequence)

    def step() -> None:
        for sequence in sequences:
            sequence.output_ids.append(7)
        logits, _ = runner.run([Chunk(s, s.num_computed_tokens, 1) for s in sequences])
        logits.argmax(-1).tolist()
        for sequence in sequences:
            sequence.num_computed_tokens += 1

    for _ in range(3):
        step()
    _synchronize(runner)
    started_at = time.perf_counter()
    for _ in range(num_steps):
        step()
    return (time.perf_counter() - started_at) / num_steps * 1e3


def engine_step(
    runner: ModelRunner, spec: str, batch: int, length: int, num_steps: int = 40
) -> float:
    """Milliseconds per decode step of the whole engine, greedy, with the text of every token.

    Prompts count as computed but for their last token, like those of ``decode_step``.
    """
    specs = spec.split("+")
    pages = PageAllocator(runner.num_pages, BLOCK)
    scheduler = Scheduler(Limits(8192, 160, BLOCK), pages)
    core = _engine_core(runner, scheduler)
    for index in range(batch):
        sequence = sequence_of(specs[index % len(specs)], length - num_steps - 8, index)
        if not pages.try_reserve(sequence, sequence.num_prompt_tokens):
            raise MemoryError("the cache is too small")
        sequence.num_computed_tokens = sequence.num_prompt_tokens - 1
        core.add(sequence)
        scheduler.waiting.remove(sequence)  # as if it had been admitted long ago
        scheduler.running.append(sequence)

    for _ in range(5):
        core.step()
    _synchronize(runner)
    started_at = time.perf_counter()
    for _ in range(num_steps):
        if len(core.step()) != batch:
            raise RuntimeError("a step did not give everybody a token")
    seconds = time.perf_counter() - started_at
    _synchronize(runner)
    return seconds / num_steps * 1e3


def _synchronize(runner: ModelRunner) -> None:
    if runner.device.type == "cuda":
        torch.cuda.synchronize()


def _engine_core(runner: ModelRunner, scheduler: Scheduler) -> EngineCore:
    """An engine around the runner; tokens beyond the built-in tokenizer's get no text."""
    tokenizer = Tokenizer.load(default_model_directory(), frozenset())
    return EngineCore(
        runner=runner,
        scheduler=scheduler,
        sampler=Sampler(runner.device, SHAPE["vocab_size"]),
        events=NoEvents(),
        text_output=lambda s: OutputBuilder(tokenizer, s.prompt_ids, s.sampling),
        runs_ahead=True,
    )


def sequence_of(spec: str, num_prompt: int, slot: int) -> Sequence:
    """A greedy sequence of random tokens that never ends."""
    generator = torch.Generator().manual_seed(slot)
    return Sequence(
        request_id=str(slot),
        prompt_ids=torch.randint(8, 100_000, (num_prompt,), generator=generator).tolist(),
        method=parse_spec(spec).method,
        sampling=SamplingParams(temperature=0, max_tokens=10**6, ignore_eos=True),
        generator=generator,
        slot=slot,
    )


if __name__ == "__main__":
    typer.run(main)
