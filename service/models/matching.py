"""Does a fused module compute what the original computes? Compared on random numbers at load."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from service.models.kernels.operations import Activation
from service.models.recording import Call, random_like

Outputs = tuple[torch.Tensor, ...]
Read = Callable[[Any], Outputs]  # what of a call's output, and of what it led to, is compared
Forward = Callable[..., Any]

# Accepted error in float32, as a share of the output's own size (root mean square): the order of
# a sum may differ, nothing else. In low precision both are held against the original in float32,
# and the fused module may err a fourth more than the original does, or a fourth of a rounding.
FLOAT32_TOLERANCE = 1e-5
LOW_PRECISION_FACTOR = 1.25
# Of the random hidden states, whose root mean square is 1: a bound that a model puts on queries or
# on activations shows only where numbers are large.
MAGNITUDES = (1.0, 16.0)
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}
_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act")


@torch.no_grad()
def mismatch(module: nn.Module, fused: Forward, call: Call, read: Read) -> str | None:
    """How the fused forward differs from the module's own, as the end of a sentence, or None.

    Args:
        module: A module that runs its own forward.
        fused: What may stand in for it.
        call: What the module was called with; its hidden states are replaced by random ones.
        read: Picks what is compared.
    """
    rows = call.rows
    if rows is None:
        return "gets no hidden states"
    for magnitude in MAGNITUDES:
        of_call = call.with_rows(random_like(rows) * magnitude)
        reason = _mismatch_of_call(module, fused, of_call, read, rows.dtype)
        if reason is not None:
            return reason
    return None


def _mismatch_of_call(
    module: nn.Module, fused: Forward, call: Call, read: Read, dtype: torch.dtype
) -> str | None:
    """``mismatch`` for the hidden states that the call has, of this type."""
    try:
        candidate = read(fused(*call.args, **call.kwargs))
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a library raises
        return f"fails with {type(error).__name__}: {error}"
    try:
        original = read(module.forward(*call.args, **call.kwargs))
        if dtype == torch.float32:
            return _difference(candidate, original, [FLOAT32_TOLERANCE] * len(original))
        exact = read(_run_in_float32(module, call))
    except FAILURES as error:
        return f"fails with {type(error).__name__}: {error}"
    unit = torch.finfo(dtype).eps / 4
    own_errors = [_relative_error(o, e) for o, e in zip(original, exact, strict=True)]
    return _difference(candidate, exact, [LOW_PRECISION_FACTOR * e + unit for e in own_errors])


@contextmanager
def replaced_forward(replacements: dict[nn.Module, Forward]) -> Iterator[None]:
    """Let modules compute something else for a moment."""
    before: dict[nn.Module, Forward | None] = {m: vars(m).get("forward") for m in replacements}
    for module, forward in replacements.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, earlier in before.items():
            if earlier is None:
                del module.forward
            else:
                module.forward = earlier


def _run_in_float32(module: nn.Module, call: Call) -> Any:  # noqa: ANN401 - the module's own type
    wide = call.in_float32()
    parameters = {name: parameter.float() for name, parameter in module.named_parameters()}
    return functional_call(module, parameters, wide.args, wide.kwargs)


def _difference(candidate: Outputs, expected: Outputs, allowed: list[float]) -> str | None:
    if len(candidate) != len(expected):
        return f"gives {len(candidate)} tensors for {len(expected)}"
    for actual, right, limit in zip(candidate, expected, allowed, strict=True):
        if actual.shape != right.shape:
            return f"gives {tuple(actual.shape)} for {tuple(right.shape)}"
        error = _relative_error(actual, right)
        if not error <= limit:  # NaN is no match
            return f"differs by {error:.2g} of its size, {limit:.2g} is allowed"
    return None


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def activations(module: nn.Module) -> list[Activation]:
    """What the activation of a gated product may be.

    Compared alone and in float64, as kinds of gelu differ by less than 16-bit products do.
    """
    own = next((getattr(module, n) for n in _ACTIVATION_NAMES if hasattr(module, n)), None)
    if own is None:
        return list(_ACTIVATIONS)
    grid = torch.linspace(-6, 6, 1025, dtype=torch.float64)
    return [
        name
        for name, known in _ACTIVATIONS.items()
        if torch.allclose(own(grid.clone()), known(grid), rtol=1e-6, atol=1e-9)
    ]
