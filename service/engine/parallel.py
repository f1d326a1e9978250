"""One model over several ranks: rank 0 decides what runs, and the others run the same.

Rank 0 is the service: HTTP, scheduling, sampling, text. Its runner tells the other ranks of every
call that computes, before it makes it; they take the calls in order, so that all ranks meet in
the same collectives. Pages, slots and tiles are the same everywhere; heads differ.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from typing_extensions import override

from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence
from service.engine.sizing import num_pages
from service.engine.step_messages import StepMessage, StepReader, StepWriter
from service.errors import BadRequestError, ModelNotSupportedError
from service.models.hugging_face import Progress
from service.models.loading import LoadedModel, load_model
from service.models.sharding import shard_model
from service.parallel.followers import Followers, Inbox
from service.parallel.group import RankGroup, open_meeting
from service.settings import Settings
from sparse_methods import SparseAttentionMethod, get_sparse_method, list_sparse_methods
from sparse_methods.kernels.operation import LayerGeometry
from sparse_methods.statistics import RequestStatistics, join_heads

_FOLLOWER = "service.engine.follower"
Counters = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Welcome:
    """The first message to a follower."""

    settings: Settings
    kind: str
    port: int


@dataclass(frozen=True)
class Ranks:
    """All ranks, as rank 0 has them."""

    group: RankGroup
    followers: Followers

    @property
    def failure(self) -> str:
        """Why nothing is computed any more; empty as long as all is well."""
        return self.followers.failure

    def stop(self, runner: ModelRunner) -> None:
        """End the other ranks, once nothing is run any more."""
        self.followers.dismiss()
        runner.forget_graphs()
        if not self.failure:  # or it would wait for a rank that is lost
            self.group.leave()
        self.followers.stop()


@contextmanager
def starting_ranks(settings: Settings) -> Iterator[Ranks | None]:
    """Start the other ranks of ``settings.tensor_parallel``, if there are any.

    They are ended again if what is done inside fails.

    Raises:
        ModelNotSupportedError: There are fewer GPUs than ranks.
    """
    size, kind = settings.tensor_parallel, _device_kind(settings.device)
    if size == 1:
        yield None
        return
    if kind == "cuda" and torch.cuda.device_count() < size:
        raise ModelNotSupportedError(
            f"{size} ranks were asked for, but torch sees {torch.cuda.device_count()} GPUs."
        )
    meeting = open_meeting(size)
    followers = Followers(_FOLLOWER, size)
    ranks = None
    try:
        without_keys = settings.model_copy(update={"api_keys": ()})
        followers.tell(Welcome(without_keys, kind, meeting.port))
        ranks = Ranks(RankGroup.join(meeting, 0, size, kind), followers)
        yield ranks
    except BaseException:
        followers.stop()
        if ranks is not None:
            ranks.group.leave()
        raise


def group_of(ranks: Ranks | None) -> RankGroup | None:
    """The group of the ranks, if there are several."""
    return None if ranks is None else ranks.group


def load_share(
    settings: Settings, group: RankGroup | None, progress: Progress | None = None
) -> LoadedModel:
    """Load the model of ``settings``; of several ranks each keeps its share.

    A share is cut from the whole model in the host's memory.

    Raises:
        ModelNotSupportedError: The model cannot be served, or not by so many ranks.
    """
    device, dtype, fuse = settings.device, settings.dtype, settings.fuse_modules
    if group is not None:
        is_half = dtype == "auto" and group.device.type == "cuda"
        device, dtype, fuse = "cpu", "bfloat16" if is_half else dtype, False
    loaded = load_model(
        settings.model,
        device,
        dtype,
        progress,
        settings.max_context_tokens,
        fuse=fuse,
        max_step_tokens=settings.max_step_tokens,
    )
    if group is None:
        return loaded
    return shard_model(
        loaded, group, fuse=settings.fuse_modules, max_step_tokens=settings.max_step_tokens
    )


def num_pages_of_all(
    settings: Settings,
    geometries: Items[LayerGeometry],
    loaded: LoadedModel,
    group: RankGroup | None,
) -> int:
    """Pages that fit into the memory of every rank; see ``sizing.num_pages``."""
    if group is None:
        return num_pages(settings, geometries, loaded)
    if group.device.type == "cpu":  # the ranks have one memory together
        fraction = settings.kv_cache_memory_fraction / group.size
        settings = settings.model_copy(update={"kv_cache_memory_fraction": fraction})
    return group.smallest(num_pages(settings, geometries, loaded))


def check_splits(method: SparseAttentionMethod, group: RankGroup | None) -> None:
    """Refuse a method that must see all heads if ranks share them.

    Raises:
        BadRequestError: The message names the methods that are served.
    """
    if group is not None and not method.splits_over_ranks():
        names = [n for n in list_sparse_methods() if get_sparse_method(n).tensor_parallel_safe]
        raise BadRequestError(
            f"Method {method.name!r} decides by all heads together, and this server divides them"
            f" among ranks. Methods that it serves: {names}.",
            "method",
        )


class LeadingRunner(ModelRunner):
    """The runner of rank 0; what it computes, all ranks compute."""

    def __init__(self, ranks: Ranks, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._ranks = ranks
        self._writer = StepWriter()
        self.attention.sum_over_ranks = ranks.group.sum

    @override
    def run(self, chunks: Items[Chunk]) -> tuple[torch.Tensor, list[Sequence]]:
        with self._leading("run", self._writer.write(chunks)):
            return super().run(chunks)

    @override
    @torch.inference_mode()
    def keep_tokens(self, sequences: Items[Sequence], token_ids: torch.Tensor) -> None:
        if not sequences:
            return
        with self._leading("keep_tokens", len(token_ids)):
            self._ranks.group.follow_leader(token_ids)
            super().keep_tokens(sequences, token_ids)

    @override
    def run_all_logits(self, chunks: Items[Chunk]) -> torch.Tensor:
        with self._leading("run_all_logits", self._writer.write(chunks)):
            return super().run_all_logits(chunks)

    @override
    def run_last_logits(self, chunks: Items[Chunk]) -> torch.Tensor:
        with self._leading("run_last_logits", self._writer.write(chunks)):
            return super().run_last_logits(chunks)

    @override
    def keep_statistics(self) -> None:
        with self._leading("keep_statistics"):
            super().keep_statistics()

    @override
    def statistics(self, sequence: Sequence, num_runs: int | None = None) -> RequestStatistics:
        if sequence.slot is None:
            return RequestStatistics()
        answers = self._ranks.followers.ask(("counters", sequence.slot, num_runs))
        counters = [self.counters(sequence.slot, num_runs)]
        counters += [_from_numpy(answer) for answer in answers]
        return join_heads([self.read(of_rank) for of_rank in counters])

    @contextmanager
    def _leading(self, call: str, *arguments: object) -> Iterator[None]:
        """Let the other ranks do what is done inside; if it fails here, the ranks are apart."""
        self._ranks.followers.tell((call, *arguments))
        try:
            yield
        except Exception as error:
            self._ranks.followers.fail(f"rank 0 failed in {call} ({type(error).__name__})")
            raise


@torch.inference_mode()
def follow(runner: ModelRunner, group: RankGroup, inbox: Inbox) -> None:
    """Do what rank 0 does until it says that it ends."""
    reader = StepReader()
    completed: list[Sequence] = []
    runner.attention.sum_over_ranks = group.sum
    while (message := inbox.take()) is not None:
        match cast("tuple[Any, ...]", message):
            case ("run", StepMessage() as step):
                _, completed = runner.run(reader.read(step))
            case ("keep_tokens", int() as count):
                token_ids = torch.empty(count, dtype=torch.int64, device=group.device)
                runner.keep_tokens(completed, group.follow_leader(token_ids))
            case ("run_all_logits", StepMessage() as step):
                runner.run_all_logits(reader.read(step))
            case ("run_last_logits", StepMessage() as step):
                runner.run_last_logits(reader.read(step))
            case ("keep_statistics",):
                runner.keep_statistics()
            case ("counters", slot, num_runs):
                inbox.answer([part.cpu().numpy() for part in runner.counters(slot, num_runs)])
            case unknown:
                raise ValueError(f"rank 0 asks for {unknown[0]!r}")


def _from_numpy(answer: object) -> Counters:
    blocks, elements = cast("list[Any]", answer)
    return torch.from_numpy(blocks), torch.from_numpy(elements)


def _device_kind(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
