"""Structured output: which tokens may come next, so that a text stays within a grammar.

The grammars and their masks are llguidance's. A mask is computed on the host from the tokens so
far; an engine that runs ahead therefore waits for the tokens of such a sequence before it goes on.
"""

import asyncio
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Literal

import torch

from service.engine.tokenizer import Tokenizer
from service.errors import BadRequestError

if TYPE_CHECKING:  # or a server without it, which serves all but this, could not start
    import llguidance

_NUM_KEPT = 64  # compiled grammars
# A model that likes white space could otherwise write nothing else until it is cut off.
_JSON_SPACE = r"( |\n {0,16})?"

GrammarKind = Literal["json_schema", "regex", "choice", "lark"]


@dataclass(frozen=True)
class Grammar:
    """What the text of a generation must be like.

    Attributes:
        source: A JSON schema or a list of choices, either as JSON; a regular expression for the
            whole text; or a grammar in llguidance's dialect of Lark.
        param: The request field it came from.
    """

    kind: GrammarKind
    source: str
    param: str


class Matcher:
    """Follows one generation through its grammar."""

    def __init__(self, matcher: "llguidance.LLMatcher") -> None:
        self._matcher = matcher
        self._num_consumed = 0

    def fork(self) -> "Matcher":
        """Another one for another generation, from the start."""
        return Matcher(self._matcher.deep_copy())

    @property
    def failure(self) -> str:
        """Why the grammar cannot be followed any further; empty as long as it can."""
        return _first_line(self._matcher.get_error())

    def allowed(self, output_ids: list[int]) -> torch.Tensor:
        """[V] bool, on the host: tokens that may follow those generated so far; none on failure.

        Where the text is complete and nothing can be added, only ends of sequence may follow.
        """
        self._matcher.consume_tokens(output_ids[self._num_consumed :])
        self._num_consumed = len(output_ids)
        mask = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        return mask.bool() & (not self._matcher.is_error())


class GrammarCompiler:
    """Compiles grammars for one tokenizer; nothing is done until the first one comes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._compiled = lru_cache(_NUM_KEPT)(self._compile)

    async def matcher(self, grammar: Grammar | None) -> Matcher | None:
        """A matcher to fork from; None if there is no grammar.

        Raises:
            BadRequestError: The grammar is invalid, or no text could satisfy it.
        """
        if grammar is None:
            return None
        return await asyncio.to_thread(self._compiled, grammar)

    @cached_property
    def _vocabulary(self) -> "llguidance.LLTokenizer":
        import llguidance

        adapter = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer))
        return llguidance.LLTokenizer(adapter, eos_token=sorted(self._tokenizer.eos_token_ids))

    def _compile(self, grammar: Grammar) -> Matcher:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise BadRequestError(
                "This server was installed without llguidance, which formats need.", grammar.param
            ) from None
        if not self._tokenizer.eos_token_ids:
            raise BadRequestError(
                "The model has no token for the end of a text, so none can be held to a grammar.",
                grammar.param,
            )
        try:
            written = _written(grammar)
        except ValueError as error:
            raise _invalid(grammar, str(error)) from None
        limits = LLParserLimits(verbose_errors=False)  # no text of a client in an error
        matcher = LLMatcher(self._vocabulary, written, log_level=0, limits=limits)
        if matcher.is_error():
            raise _invalid(grammar, matcher.get_error())
        trial = matcher.deep_copy()
        trial.compute_logit_bias()
        if trial.is_error():
            raise _invalid(grammar, "no text can satisfy it")
        return Matcher(matcher)


class _Vocabulary:
    """A tokenizer as llguidance wants to see it: every token stands for the bytes we print."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = range(tokenizer.vocab_size)
        self.eos_token_id = min(tokenizer.eos_token_ids)
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in ids]
        self.special_token_ids = [token_id for token_id in ids if not tokenizer.has_text(token_id)]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text if isinstance(text, str) else text.decode()
        return self._tokenizer.encode(plain, adds_special_tokens=False)


def _written(grammar: Grammar) -> str:
    """The grammar in llguidance's own terms; ValueError if it is not even JSON."""
    from llguidance import LLMatcher

    match grammar.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(
                grammar.source, overrides={"whitespace_pattern": _JSON_SPACE}
            )
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "choice":
            words = " | ".join(json.dumps(word) for word in json.loads(grammar.source))
            return LLMatcher.grammar_from_lark(f"start: {words}")
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.source)


def _invalid(grammar: Grammar, reason: str) -> BadRequestError:
    kind = grammar.kind.replace("_", " ")
    return BadRequestError(f"The {kind} is not usable: {_first_line(reason)}", grammar.param)


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
