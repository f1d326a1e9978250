"""The network as it is trained: transformers' Qwen3, parameter for parameter.

It exists beside transformers' own class because training wants per-block compilation, dropout on
the residual branches and the soft tile density; `export.py` hands the weights over.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from typing_extensions import override

from tools.default_model.recipe import Shape
from tools.default_model.sparsity import soft_density


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain, computed in float32."""

    def __init__(self, size: int, eps: float, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), gain))
        self.eps = eps

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, dim = shape.hidden_size, shape.head_dim
        self.head_dim = dim
        self.q_proj = nn.Linear(hidden, shape.num_heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, shape.num_kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, shape.num_kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * dim, hidden, bias=False)
        self.q_norm = RMSNorm(dim, shape.norm_eps, shape.initial_gain)
        self.k_norm = RMSNorm(dim, shape.norm_eps, shape.initial_gain)

    def queries_and_keys(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return queries [B, Hq, T, D] and keys [B, Hkv, T, D] after RoPE."""
        heads = (*x.shape[:2], -1, self.head_dim)
        query = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)
        return rotate(query, rope), rotate(key, rope)

    @override
    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the attention output and the soft density of the query tile `rows`."""
        query, key = self.queries_and_keys(x, rope)
        value = self.v_proj(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        density = x.new_zeros((), dtype=torch.float32)
        if rows is not None:
            some = max(1, len(x) // 4)  # a sample of the rows estimates the density well enough
            tile = query[:some].index_select(2, rows)
            density = soft_density(tile, key[:some], rows)
        return self.o_proj(out.transpose(1, 2).flatten(2)), density


class FeedForward(nn.Module):
    """Gated feed-forward layer (SwiGLU)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Map each token by itself."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on a residual branch."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = FeedForward(shape)
        self.dropout = 0.0

    @override
    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the block's output and the soft density of the query tile `rows`."""
        out, density = self.self_attn(self.input_layernorm(x), rope, rows)
        x = x + F.dropout(out, self.dropout, self.training)
        out = self.mlp(self.post_attention_layernorm(x))
        return x + F.dropout(out, self.dropout, self.training), density


class LanguageModel(nn.Module):
    """The decoder with tied embeddings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = 0.0
        self.compute_dtype = torch.float32
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * shape.num_layers) if out else 1))

    def set_dropout(self, probability: float) -> None:
        """Use this probability on the embeddings and every residual branch while training."""
        self.dropout = probability
        for block in self.layers:
            assert isinstance(block, Block)  # noqa: S101 - tells the type, cannot fail
            block.dropout = probability

    def rope(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of positions 0 to length - 1, [length, head_dim] each."""
        dim = self.shape.head_dim
        exponents = torch.arange(0, dim, 2, device=device).float() / dim
        positions = torch.arange(length, device=device).float()
        angles = torch.outer(positions, 1.0 / self.shape.rope_theta**exponents).repeat(1, 2)
        return angles.cos().to(self.compute_dtype), angles.sin().to(self.compute_dtype)

    @override
    def forward(self, ids: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the last hidden states [B, T, hidden] and the mean soft density of the layers."""
        x = self.embed_tokens(ids).to(self.compute_dtype)
        x = F.dropout(x, self.dropout, self.training)
        rope = self.rope(ids.shape[1], ids.device)
        densities = []
        for block in self.layers:
            x, density = block(x, rope, rows)
            densities.append(density)
        return self.norm(x), torch.stack(densities).mean()

    def logits(self, ids: Tensor) -> Tensor:
        """Return the next-token logits, [B, T, vocab]."""
        return F.linear(self(ids)[0], self.embed_tokens.weight)


def cross_entropy(hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss in nats; a function of its own so that it compiles into few kernels."""
    logits = F.linear(hidden, embedding)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE to [B, H, T, D], the halves of D paired as Llama and Qwen pair them."""
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat((-second, first), dim=-1) * rope[1]
