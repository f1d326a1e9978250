"""How next-token distributions on a fixed text differ from those of dense attention."""

import math
from dataclasses import dataclass, field

import torch

_SAMPLED_ROWS = 256  # rows of a window whose whole distribution is kept


@dataclass(frozen=True)
class RowScores:
    """What is kept of the logits of consecutive rows [start, start + n) of one window.

    Attributes:
        bits: [n] float32, information of the token that follows, in bits.
        choices: [n] int64, most likely token.
        log_probs: [s, V] float32, natural, of every ``stride``-th row of the window.
    """

    bits: torch.Tensor
    choices: torch.Tensor
    log_probs: torch.Tensor


@dataclass
class WindowScores:
    """Scores of one window, gathered chunk by chunk, kept on the CPU.

    Attributes:
        length: Rows of the window, all scored.
        num_decoded: Last rows of the window that are decoded one by one.
        keeps_distributions: Whether ``log_probs`` are kept, without which nothing can be compared.
    """

    length: int
    num_decoded: int
    keeps_distributions: bool = True
    parts: list[RowScores] = field(default_factory=list)

    @property
    def stride(self) -> int:
        """Distance of the rows whose distributions are kept; every decoded row is."""
        return max(1, (self.length - self.num_decoded) // _SAMPLED_ROWS)

    def add(self, logits: torch.Tensor, start: int, targets: torch.Tensor) -> None:
        """Score rows from ``start`` on.

        Args:
            logits: [n, V].
            start: Place of the first row in the window.
            targets: [n] int64, the token that follows each row.
        """
        rows = torch.arange(start, start + len(logits))
        first_decoded = self.length - self.num_decoded
        is_sampled = (rows % self.stride == 0) | (rows >= first_decoded)
        sampled = rows[is_sampled & self.keeps_distributions] - start
        log_probs = torch.log_softmax(logits.float(), -1)
        nats = -log_probs.gather(1, targets.to(logits.device)[:, None])[:, 0]
        self.parts.append(
            RowScores(
                bits=(nats / math.log(2)).cpu(),
                choices=log_probs.argmax(-1).cpu(),
                log_probs=log_probs[sampled.to(logits.device)].cpu(),
            )
        )

    def joined(self) -> RowScores:
        """All parts in one."""
        return RowScores(
            bits=torch.cat([part.bits for part in self.parts]),
            choices=torch.cat([part.choices for part in self.parts]),
            log_probs=torch.cat([part.log_probs for part in self.parts]),
        )


def text_measures(
    window: WindowScores, dense: WindowScores, bytes_per_token: float
) -> dict[str, float]:
    """Measures of one window, over the rows of its prompt and over the decoded ones (``decode_``).

    ``kl`` is in nats, the mean of KL(dense || method); ``top1`` the share of rows with the same
    most likely token; ``bits_per_byte_change_percent`` is against dense on the same rows.
    """
    ours, theirs = window.joined(), dense.joined()
    kl = (theirs.log_probs.exp() * (theirs.log_probs - ours.log_probs)).sum(-1).clamp(min=0)
    same = (ours.choices == theirs.choices).float()
    found: dict[str, float] = {}
    border = -window.num_decoded
    for prefix, rows in (("", slice(border)), ("decode_", slice(border, None))):
        bits, dense_bits = float(ours.bits[rows].mean()), float(theirs.bits[rows].mean())
        found |= {
            f"{prefix}bits_per_byte": bits / bytes_per_token,
            f"{prefix}bits_per_byte_change_percent": 100 * (bits / dense_bits - 1),
            f"{prefix}kl": float(kl[rows].mean()),
            f"{prefix}top1": float(same[rows].mean()),
        }
    return found
