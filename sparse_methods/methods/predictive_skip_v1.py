"""Predictive skip: guess before QK^T which tiles skip-softmax would drop, and never read those.

Skip-softmax drops a tile after its scores are known, so it saves the product with V at most. Here a
probe of each tile, a hundredth of its scores, predicts the decision; the kernel then applies the
threshold itself to the tiles that were read.

The rule, per query tile and query head: of ``probe_rows`` rows, spread evenly, the scores with the
means of ``probe_keys`` groups of consecutive keys estimate what a block holds; the own block and
the first one are scored in full for these rows. A block is kept if for any of the rows its largest
estimate exceeds the largest of all + ln(threshold) - margin. The own and the first block are always
kept. The heads of a group read the union of their blocks.

Source: our own; what it predicts is the rule of BLASST, Yuan et al., 2025, arXiv:2512.12087, with
the own block and the first one visited first.

Departures: estimates are compared with the largest of all blocks, not with the running maximum,
which depends on the visiting order; the margin makes up for rows and keys that were not probed.
``calculate_sparsity`` marks what is read, not what the kernel's threshold drops of it.
"""

import math
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch.nn import functional
from typing_extensions import override

from sparse_methods.block_method import (
    SCORE_BLOCK,
    BlockKnobs,
    BlockMethod,
    ScoreTiles,
    float32_products,
)
from sparse_methods.errors import UnsupportedError
from sparse_methods.kernels import selection
from sparse_methods.registry import register_sparse_method
from sparse_methods.views import BlockSelection, Phase, PrefillView

_MAX_ESTIMATES = 1 << 26  # held at a time: 256 MiB


@register_sparse_method("predictive_skip", version="v1")
class PredictiveSkip(BlockMethod):
    """Reads only the tiles that skip-softmax is predicted to keep, and applies its threshold.

    Use it on long prompts in place of ``flash_skip_softmax`` v2, to save the scores too.
    """

    phases: ClassVar[tuple[Phase, ...]] = (Phase.PREFILL,)
    measured_break_even: ClassVar[int] = 4096
    source: ClassVar[str] = "arXiv:2512.12087, predicted"

    class Knobs(BlockKnobs):
        """The threshold, and how closely a tile is looked at."""

        threshold: float = Field(
            0.1, gt=0, lt=1, description="Lambda, a share of the row's largest weight."
        )
        margin: float = Field(
            4.5,
            ge=0,
            le=30,
            description="What estimates may miss of a tile's largest score, nats.",
        )
        probe_rows: int = Field(8, ge=1, le=64, description="Query rows probed per tile, rows.")
        probe_keys: int = Field(
            16, ge=1, le=64, description="Groups of keys probed per block; divides it, groups."
        )

        apply_threshold: bool = Field(
            default=True,
            description="Whether tiles that are read are also skipped by the threshold, head by"
            " head. Without it more is multiplied, on a GPU by a faster kernel.",
        )

    knobs: Knobs

    @property
    @override
    def name(self) -> str:
        return "predictive_skip"

    @override
    def select_prefill(self, view: PrefillView) -> BlockSelection:
        is_kept = self._kept_in_triton(view)
        if is_kept is None:
            is_kept = self._kept(view)
        # As the kernel with a threshold visits them: the tile's own, the first, the rest in order.
        return BlockSelection.in_order(is_kept, view.tile_blocks)

    def _kept_in_triton(self, view: PrefillView) -> torch.Tensor | None:
        """``_kept`` where kernels can say; else None."""
        if not selection.has_kernels(view.query):
            return None
        from sparse_methods.kernels import triton_probes

        probe = triton_probes.Probe(self.knobs.probe_rows, self.knobs.probe_keys, self._reach)
        if not triton_probes.can_probe(view, probe):
            return None
        return triton_probes.near_largest(view, probe)

    def _kept(self, view: PrefillView) -> torch.Tensor:
        """[Hkv, N, M] bool, blocks that any head of the group keeps."""
        groups = _group_means(view, self.knobs.probe_keys)
        rows = self._probed_rows(view.num_tiles, view.block_size, (0, view.num_rows), view.query)
        probes = view.query[rows].unflatten(2, (view.num_kv_heads, -1)).permute(2, 3, 0, 1, 4)
        exact = _score_in_full(view, probes, rows)
        per_tile = probes.shape[0] * probes.shape[1] * probes.shape[3] * groups.shape[1]
        step = max(1, _MAX_ESTIMATES // per_tile)
        kept = []
        for start in range(0, view.num_tiles, step):
            slab = slice(start, min(start + step, view.num_tiles))
            num_blocks = view.first_block + slab.stop
            seen = groups[:, : num_blocks * self.knobs.probe_keys]
            scores = float32_products(probes[:, :, slab].flatten(1, 3), seen) * view.scale
            estimates = scores.unflatten(-1, (num_blocks, -1)).amax(-1)
            estimates = estimates.unflatten(1, (-1, *probes[:, :, slab].shape[2:4]))
            slab_kept = self._keep(estimates, exact[:, :, slab], view.tile_blocks[slab]).any(1)
            kept.append(functional.pad(slab_kept, (0, view.num_blocks - num_blocks)))
        return torch.cat(kept, 1)

    @override
    def keep_from_scores(self, tiles: ScoreTiles) -> torch.Tensor:
        self.check_servable(SCORE_BLOCK)
        bounds = (tiles.first_row, tiles.first_row + tiles.num_queries)
        rows = self._probed_rows(tiles.num_tiles, SCORE_BLOCK, bounds, tiles.scores)
        scores = tiles.scores.flatten(2, 3)[:, :, rows].unflatten(-1, (-1, SCORE_BLOCK))
        estimates = scores.unflatten(-1, (self.knobs.probe_keys, -1)).mean(-1).amax(-1)
        highest = scores.amax(-1)
        own = tiles.tile_blocks[:, None, None].expand_as(highest[..., :1])
        exact = torch.maximum(highest[..., 0], highest.gather(-1, own)[..., 0])
        return self._keep(estimates, exact, tiles.tile_blocks)

    def _keep(
        self, estimates: torch.Tensor, exact: torch.Tensor, tile_blocks: torch.Tensor
    ) -> torch.Tensor:
        """The rule: blocks that come near the largest score of any probed row.

        Args:
            estimates: [..., N, r, M] float32 estimated largest score of each row in each block.
            exact: [..., N, r] float32 largest score of each row in its own and the first block.
            tile_blocks: [N] number of the block each tile lies in.

        Returns:
            [..., N, M] bool.
        """
        blocks = torch.arange(estimates.shape[-1], device=estimates.device)
        is_forced = (blocks == 0) | (blocks == tile_blocks[:, None])
        is_estimated = (blocks < tile_blocks[:, None]) & ~is_forced
        estimates = estimates.masked_fill(~is_estimated[:, None], float("-inf"))
        highest = torch.maximum(estimates.amax(-1), exact)
        return (estimates > highest[..., None] + self._reach).any(-2) | is_forced

    @property
    def _reach(self) -> float:
        """What an estimate may lie above the largest of all (below, as it is negative), nats."""
        return math.log(self.knobs.threshold) - self.knobs.margin

    def _probed_rows(
        self, num_tiles: int, size: int, bounds: tuple[int, int], like: torch.Tensor
    ) -> torch.Tensor:
        """[N, r] int64 rows to probe, evenly spread over tiles of ``size`` rows from row 0 on.

        Rows outside of ``bounds`` do not exist; the nearest that does takes their place.
        """
        tiles = torch.arange(num_tiles, device=like.device)[:, None] * size
        steps = torch.arange(self.knobs.probe_rows, device=like.device)
        within = (2 * steps + 1) * size // (2 * self.knobs.probe_rows)
        return (tiles + within).clamp(bounds[0], bounds[1] - 1)

    @override
    def skip_threshold(self, phase: Phase, kv_len: int) -> float | None:
        applies = self.knobs.apply_threshold and phase is Phase.PREFILL
        return self.knobs.threshold if applies else None

    @override
    def visits_diagonal_first(self, phase: Phase) -> bool:
        return phase is Phase.PREFILL

    @override
    def get_threshold_info(self) -> dict[str, Any]:
        return {"type": "static", "value": {str(Phase.PREFILL): self.knobs.threshold}}

    @override
    def check_servable(self, block_size: int) -> None:
        if block_size % self.knobs.probe_keys:
            raise UnsupportedError(
                f"Knob 'probe_keys' of {self.name!r} must divide the block size, {block_size} "
                f"tokens, got {self.knobs.probe_keys}."
            )


def _group_means(view: PrefillView, num_groups: int) -> torch.Tensor:
    """[Hkv, M * num_groups, D] means of groups of consecutive keys of each block."""
    keys = view.keys[view.pages].unflatten(1, (num_groups, -1))
    means: torch.Tensor = keys.mean(2, dtype=torch.float32).to(view.query.dtype)
    return means.flatten(0, 1).transpose(0, 1)


def _score_in_full(view: PrefillView, probes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Largest score of each probed row in its own block and the first one.

    Args:
        view: What is selected.
        probes: [Hkv, G, N, r, D] the probed rows.
        rows: [N, r] int64, which rows of the view they are.

    Returns:
        [Hkv, G, N, r] float32.
    """
    size, group = view.block_size, probes.shape[1]
    queries = probes.transpose(1, 2).flatten(2, 3)  # [Hkv, N, G * r, D]
    own_keys = view.keys[view.pages[view.tile_blocks]].permute(2, 0, 1, 3)  # [Hkv, N, keys, D]
    # A slice, as a single number as an index would make the host wait for the device.
    first_keys = view.keys[view.pages[:1]][0].transpose(0, 1)  # [Hkv, keys, D]
    own = float32_products(queries.flatten(0, 1), own_keys.flatten(0, 1)).unflatten(
        0, queries.shape[:2]
    )
    first = float32_products(queries.flatten(1, 2), first_keys).view_as(own)
    positions, keys = view.position + rows, torch.arange(size, device=rows.device)
    is_after = keys > positions.remainder(size)[..., None]  # [N, r, keys] of the own block
    is_after_first = keys > positions[..., None]
    highest = torch.maximum(
        own.unflatten(2, (group, -1)).masked_fill(is_after[:, None], float("-inf")).amax(-1),
        first.unflatten(2, (group, -1))
        .masked_fill(is_after_first[:, None], float("-inf"))
        .amax(-1),
    )
    return (highest * view.scale).transpose(1, 2)
