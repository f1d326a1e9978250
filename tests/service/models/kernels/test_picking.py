"""Which kernels a device gets; a library that no step would use is not tried."""

import importlib.util

import pytest
import torch

from service.models.kernels import eager, pick_module_kernels, quack_modules, triton_modules

CUDA = torch.device("cuda")


def picked(*args) -> list[object]:
    return list(pick_module_kernels(*args))


@pytest.fixture
def _quack(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(quack_modules, "works_on", lambda _: True)


def test_a_cpu_gets_pytorch():
    assert picked(torch.device("cpu")) == [eager]


@pytest.mark.usefixtures("_quack")
@pytest.mark.parametrize("max_step_tokens", [None, 4096, 8192])
def test_long_steps_try_the_library_first(max_step_tokens):
    assert picked(CUDA, max_step_tokens) == [quack_modules, triton_modules]


@pytest.mark.usefixtures("_quack")
def test_short_steps_do_without_it(monkeypatch):
    monkeypatch.setattr(quack_modules, "works_on", lambda _: pytest.fail("it compiles"))
    assert picked(CUDA, 2048) == [triton_modules]


@pytest.mark.usefixtures("_quack")
def test_a_library_that_does_not_work_is_left_out(monkeypatch):
    monkeypatch.setattr(quack_modules, "works_on", lambda _: False)
    assert picked(CUDA) == [triton_modules]


def test_a_device_gets_triton_where_there_is_no_library(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert picked(CUDA) == [triton_modules]
