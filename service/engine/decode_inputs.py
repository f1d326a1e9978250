"""The inputs of a decode step on the host, rewritten only where they change from step to step."""

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from weakref import ReferenceType, ref

import numpy as np
import torch

from service.engine.grouping import overrides
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence
from service.engine.transfer import Landmark
from service.models.method_fault import MethodFaultError
from sparse_methods.method import SparseAttentionMethod
from sparse_methods.views import Phase

TOKEN, POSITION, SLOT, PROMPT_LEN, METHOD, DIAGONAL_FIRST, NUM_FIELDS = range(7)
DENSE = -1  # number of no method: the row reads everything


@dataclass
class _Tenant:
    """Whom a row describes, and what of it stays the same for as long as it runs.

    Attributes:
        sequence: Weak, so that a row which nobody asks for keeps no sequence alive.
        number: Of its method, where that is in force.
        has_threshold: Whether the method may skip blocks inside the softmax.
    """

    sequence: "ReferenceType[Sequence]"
    num_preemptions: int
    slot: int | None
    method: SparseAttentionMethod
    break_even: int
    number: int
    has_threshold: bool
    num_pages: int = 0

    def is_still(self, sequence: Sequence) -> bool:
        """Whether the row's pages are still the first ones of ``sequence``."""
        return (
            self.sequence() is sequence
            and self.num_preemptions == sequence.num_preemptions
            and self.slot == sequence.slot
            and self.num_pages <= len(sequence.pages)
        )


class HostInputs:
    """One set of host buffers: fields [rows, NUM_FIELDS + pages] int64, thresholds [rows] float32.

    A sequence mostly keeps its row, so a step writes its tokens, positions and thresholds, and the
    pages that were added since these buffers were last used.

    Args:
        size: Rows, and most pages of a row.
        methods: Those that have numbers, in their order.
        padding: Physical page and statistics slot of rows that belong to nobody.
        is_pinned: Whether a device reads the buffers.
    """

    def __init__(
        self,
        size: tuple[int, int],
        methods: Items[SparseAttentionMethod],
        padding: tuple[int, int],
        *,
        is_pinned: bool,
    ) -> None:
        num_rows, num_pages = size
        self._methods = methods
        self.fields = torch.zeros(
            num_rows, NUM_FIELDS + num_pages, dtype=torch.int64, pin_memory=is_pinned
        )
        self.thresholds = torch.zeros(num_rows, pin_memory=is_pinned)
        self._fields, self._thresholds = self.fields.numpy(), self.thresholds.numpy()  # same memory
        self._tenants: list[_Tenant | None] = [None] * num_rows
        self._num_used = num_rows
        page, slot = padding
        self._padding = np.zeros(NUM_FIELDS + num_pages, dtype=np.int64)
        self._padding[: NUM_FIELDS + 1] = [0, 0, slot, 1, DENSE, 0, page]
        self._last_read: Landmark | None = None

    def describe(self, chunks: Items[Chunk]) -> None:
        """Write the rows of a step, once the device has read those of the step before."""
        if self._last_read is not None:
            self._last_read.wait()
        # Should a method raise, the rows written so far must become padding again.
        self._num_used = max(self._num_used, len(chunks))
        changing, thresholds = [], []
        for row, chunk in enumerate(chunks):
            sequence, kv_len = chunk.sequence, chunk.stop
            tenant = self._tenant(row, sequence)
            is_sparse = kv_len >= tenant.break_even
            number = tenant.number if is_sparse else DENSE
            changing.append((sequence.token(chunk.start), chunk.start, number))
            thresholds.append(_log_threshold(tenant, kv_len) if is_sparse else -math.inf)
        count = len(chunks)
        if count:
            self._fields[:count, (TOKEN, POSITION, METHOD)] = changing
        self._thresholds[:count] = thresholds
        self._empty(count)

    def send(self, fields: torch.Tensor, thresholds: torch.Tensor) -> None:
        """Copy everything to tensors of the device, which nobody waits for."""
        fields.copy_(self.fields, non_blocking=True)
        thresholds.copy_(self.thresholds, non_blocking=True)
        self._last_read = Landmark(fields.device)

    def _tenant(self, row: int, sequence: Sequence) -> _Tenant:
        """Who lives in the row from now on, its pages complete."""
        tenant, fields = self._tenants[row], self._fields[row]
        if tenant is None or not tenant.is_still(sequence):
            tenant = self._tenants[row] = self._new_tenant(sequence)
            fields[SLOT] = sequence.slot or 0
            fields[PROMPT_LEN] = sequence.num_prompt_tokens
            fields[DIAGONAL_FIRST] = tenant.method.visits_diagonal_first(Phase.DECODE)
            fields[NUM_FIELDS:] = 0
        before, tenant.num_pages = tenant.num_pages, len(sequence.pages)
        if before < tenant.num_pages:
            added = slice(NUM_FIELDS + before, NUM_FIELDS + tenant.num_pages)
            fields[added] = sequence.pages[before:]
        return tenant

    def _new_tenant(self, sequence: Sequence) -> _Tenant:
        method = sequence.method
        return _Tenant(
            sequence=ref(sequence),
            num_preemptions=sequence.num_preemptions,
            slot=sequence.slot,
            method=method,
            break_even=method.break_even(Phase.DECODE),
            number=self._methods.index(method) if method in self._methods else DENSE,
            has_threshold=overrides(method, "skip_threshold"),
        )

    def _empty(self, count: int) -> None:
        """Make padding of every row from ``count`` on that is not padding yet."""
        for row in range(count, self._num_used):
            self._tenants[row] = None
            self._fields[row] = self._padding
            self._thresholds[row] = -math.inf
        self._num_used = count


def _log_threshold(tenant: _Tenant, kv_len: int) -> float:
    if not tenant.has_threshold:
        return -math.inf
    try:
        threshold = tenant.method.skip_threshold(Phase.DECODE, kv_len)
    except Exception as error:
        raise MethodFaultError(tenant.method, tenant.slot) from error
    return -math.inf if threshold is None else math.log(threshold)
