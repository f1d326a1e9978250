"""What is trained, for how long and on what: the numbers of a run, and nothing that computes."""

from dataclasses import dataclass, replace

BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
TILE = 128  # rows and keys of one tile of sparsity


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen3-shaped model with tied embeddings."""

    vocab_size: int = 4096
    hidden_size: int = 384
    intermediate_size: int = 896
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    max_context: int = 32768
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-6
    initial_gain: float = 1.2  # of the query and key norms: their product scales every logit


@dataclass(frozen=True)
class Stage:
    """A stretch of training at one context length.

    Attributes:
        context: tokens of a row, `<|bos|>` included.
        share: part of the run's time, and of the learning-rate schedule; the shares sum to 1.
        planted: part of the rows that carry planted tasks.
        drilled: part of the rows that are full of chains of variables, with little text between.
        dropout: probability on the embeddings and on each residual branch.
        sharpness: weight of the soft tile density in the loss; 0 leaves it out.
    """

    context: int
    share: float
    planted: float
    drilled: float = 0.0
    dropout: float = 0.0
    sharpness: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a penalty on tiles where there is no tile between the first and the diagonal."""
        if self.sharpness and self.context < 3 * TILE:
            raise ValueError(f"Sharpness is trained on rows of at least {3 * TILE} tokens.")


@dataclass(frozen=True)
class Recipe:
    """A whole run; `tokens_per_step` is reached by accumulating micro-batches."""

    shape: Shape = Shape()
    stages: tuple[Stage, ...] = (
        Stage(2048, 0.46, planted=0.35, dropout=0.1),
        Stage(8192, 0.22, planted=0.45, dropout=0.1, sharpness=0.02),
        Stage(16384, 0.14, planted=0.6, dropout=0.05, sharpness=0.04),
        Stage(32768, 0.18, planted=0.75, dropout=0.05, sharpness=0.04),
    )
    tokens_per_step: int = 262_144
    tokens_per_micro_batch: int = 131_072
    muon_lr: float = 0.016
    adamw_lr: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    hold: float = 0.3  # part of the schedule at the full learning rate, before the linear fall
    final_lr: float = 0.02  # as a part of the full learning rate
    seed: int = 0

    def learning_rate(self, step: int, progress: float, start_step: int | None = None) -> float:
        """Return the factor on the full learning rates at a step and a progress of 0 to 1.

        A run that starts from exported weights, at `start_step`, warms its fresh optimisers up
        again, but shortly: the weights are past the stretch that the long warm-up protects.
        """
        warmup_steps = float(self.warmup_steps)
        if start_step is not None:
            step -= start_step
            warmup_steps /= 5
        fall = min(1.0, (1.0 - progress) / (1.0 - self.hold))
        return min(1.0, (step + 1) / warmup_steps) * max(self.final_lr, fall)


TINY = Recipe(
    shape=Shape(
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_context=512,
    ),
    stages=(
        Stage(256, 0.6, planted=0.5, dropout=0.1),
        Stage(512, 0.4, planted=0.5, dropout=0.1, sharpness=0.05),
    ),
    tokens_per_step=2048,
    tokens_per_micro_batch=1024,
    warmup_steps=2,
)
# From the weights of a finished run: chains are followed where they lie close together before they
# are sought at a distance, since rare ones among much text taught nothing but to guess. Short, with
# low rates and dropout: without it the books are learnt by heart, 0.09 bits per byte of other ones.
CHAINS = Recipe(
    stages=(
        Stage(2048, 0.45, planted=0.4, drilled=0.45, dropout=0.1),
        Stage(8192, 0.3, planted=0.6, drilled=0.3, dropout=0.1, sharpness=0.02),
        Stage(32768, 0.25, planted=0.75, drilled=0.15, dropout=0.05, sharpness=0.04),
    ),
    muon_lr=0.004,
    adamw_lr=8e-4,
)
RECIPES = {"default": Recipe(), "chains": CHAINS, "tiny": TINY}


def without_sharpness(recipe: Recipe) -> Recipe:
    """Return the same recipe with plain cross-entropy in every stage."""
    return replace(recipe, stages=tuple(replace(s, sharpness=0.0) for s in recipe.stages))
