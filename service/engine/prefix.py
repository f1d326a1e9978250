"""Names of the pages of a prompt: equal where the pages hold equal keys and values."""

import hashlib
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

from typing_extensions import override

from sparse_methods.method import SparseAttentionMethod


@dataclass(frozen=True)
class PrefixOwner:
    """Whose keys and values a page holds, apart from the tokens.

    The method is compared as the value it is, its knobs and its calibration included, so nothing
    of it can be forgotten in a digest.

    Attributes:
        method: What computed them.
        regime: What the prompt's length decided; see ``SparseAttentionMethod.prompt_regime``.
        salt: Keeps apart what clients want apart.
    """

    method: SparseAttentionMethod
    regime: Hashable
    salt: str | None

    @override
    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # of every page that is looked for
        return hash((self.method, self.regime, self.salt))


PageKey = tuple[bytes, PrefixOwner]  # SHA-256 over all tokens up to the page's end, and the rest


class PrefixKeys:
    """The keys of a prompt's full pages, each made of the one before when it is first asked for.

    Args:
        prompt_ids: The prompt.
        page_size: Tokens of a page.
        method: What the request runs through.
        salt: See ``PrefixOwner``.
        may_reuse: Whether pages that are found may take the place of computing them.

    Attributes:
        num_pages: Pages that the prompt fills, which may be found once they are computed.
        num_reusable: Those of them that need not be computed if they are found: never the one of
            the last token, whose row gives the first new token, and none with rows that leave
            more behind than keys and values.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        page_size: int,
        method: SparseAttentionMethod,
        salt: str | None = None,
        *,
        may_reuse: bool = True,
    ) -> None:
        length = len(prompt_ids)
        self._prompt_ids = prompt_ids
        self._page_size = page_size
        self._owner = PrefixOwner(method, method.prompt_regime(length), salt)
        self._keys: list[PageKey] = []
        self.num_pages = length // page_size
        num_rows = min(length - 1, method.num_independent_rows(length))
        self.num_reusable = num_rows // page_size if may_reuse else 0

    def key(self, page: int) -> PageKey:
        """Key of logical page ``page``, one of ``num_pages``."""
        while len(self._keys) <= page:
            start = len(self._keys) * self._page_size
            tokens = array("q", self._prompt_ids[start : start + self._page_size])
            before = self._keys[-1][0] if self._keys else b""
            self._keys.append((hashlib.sha256(before + tokens.tobytes()).digest(), self._owner))
        return self._keys[page]
