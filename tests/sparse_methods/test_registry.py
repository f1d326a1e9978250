import copy
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from typing_extensions import override

from sparse_methods import (
    SparseAttentionMethod,
    UnknownMethodError,
    UnknownVersionError,
    get_sparse_method,
    latest_version,
    list_sparse_methods,
    register_sparse_method,
    registry,
)


@pytest.fixture(autouse=True)
def _clean_registry(monkeypatch):
    """Whatever a test registers is gone after it."""
    list_sparse_methods()  # discover first, or the restored copy would lack the real methods
    monkeypatch.setattr(registry, "_registry", copy.deepcopy(registry._registry))


def make_method() -> type[SparseAttentionMethod]:
    class Example(SparseAttentionMethod):
        @property
        @override
        def name(self) -> str:
            return "example"

        @override
        def calculate_sparsity(self, attention_scores):
            return torch.ones_like(attention_scores, dtype=torch.bool), {}

        @override
        def apply_sparsity(self, attention_scores, sparse_mask=None):
            return attention_scores

    return Example


def run_fresh(code: str) -> str:
    """Run code in a process that has imported nothing yet and return what it printed."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    root = Path(registry.__file__).parent.parent
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=100, cwd=root
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_decorator_returns_the_very_class_and_tells_it_its_id():
    cls = make_method()
    assert register_sparse_method("example", version="v3")(cls) is cls
    assert (cls.registered_name, cls.registered_version) == ("example", "v3")
    assert get_sparse_method("example", "v3") is cls


def test_version_is_v1_unless_named():
    cls = register_sparse_method("example")(make_method())
    assert get_sparse_method("example", "v1") is cls


def test_a_taken_id_is_replaced_with_a_warning():
    register_sparse_method("example")(make_method())
    with pytest.warns(RuntimeWarning, match="Overriding existing sparse method 'example'.*'v1'"):
        second = register_sparse_method("example")(make_method())
    assert get_sparse_method("example") is second


def test_registering_the_same_class_twice_is_silent():
    cls = make_method()
    register_sparse_method("example")(cls)
    assert register_sparse_method("example")(cls) is cls


@pytest.mark.parametrize(
    ("versions", "latest"),
    [
        (["v1"], "v1"),
        (["v2", "v10"], "v10"),
        (["v10", "v9", "v2"], "v10"),
        (["v2.3", "v2.3.1", "v2.2.9"], "v2.3.1"),
        (["v2.3.1", "v2.10"], "v2.10"),
        (["v2.3.1", "v3"], "v3"),
        (["experimental", "v1"], "v1"),
        (["experimental"], "experimental"),
    ],
)
def test_no_version_means_the_latest_by_numeric_parts(versions, latest):
    classes = {v: register_sparse_method("example", version=v)(make_method()) for v in versions}
    assert get_sparse_method("example") is classes[latest]
    assert latest_version("example") == latest
    assert list_sparse_methods()["example"][-1] == latest


def test_versions_are_listed_oldest_first():
    for version in ("v10", "v2", "latest", "v2.3.1"):
        register_sparse_method("example", version=version)(make_method())
    assert list_sparse_methods()["example"] == ["latest", "v2", "v2.3.1", "v10"]


def test_every_listed_id_resolves_to_the_class_that_bears_it():
    for name, versions in list_sparse_methods().items():
        for version in versions:
            cls = get_sparse_method(name, version)
            assert (cls.registered_name, cls.registered_version) == (name, version)


def test_unknown_name_is_a_value_error_that_names_all_and_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'flash_skip_softmax'") as caught:
        get_sparse_method("flash_skip_sofmax")
    assert isinstance(caught.value, UnknownMethodError)
    assert all(repr(name) in str(caught.value) for name in list_sparse_methods())


def test_unknown_version_is_a_value_error_that_names_all_and_the_nearest():
    for version in ("v1", "v2"):
        register_sparse_method("example", version=version)(make_method())
    with pytest.raises(
        ValueError, match=r"'example' has no version 'v12'\. Did you mean"
    ) as caught:
        get_sparse_method("example", "v12")
    assert isinstance(caught.value, UnknownVersionError)
    assert "Available versions: ['v1', 'v2']" in str(caught.value)


def test_nothing_is_suggested_when_nothing_is_near():
    with pytest.raises(UnknownMethodError) as caught:
        get_sparse_method("zzzzzz")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    "ask", [get_sparse_method, lambda given: get_sparse_method("dense", given)]
)
def test_an_error_repeats_only_the_head_of_what_was_given(ask):
    with pytest.raises(ValueError, match=r"x{64}\.\.\.'") as caught:
        ask("x" * 100_000)
    assert str(caught.value).count("x") < 100


def test_a_hundred_threads_see_every_method_while_a_hundred_are_registered():
    barrier, failures = threading.Barrier(200), []
    before = list_sparse_methods()

    def read():
        barrier.wait()
        listed = list_sparse_methods()
        if get_sparse_method("dense").__name__ != "Dense" or not before.keys() <= listed.keys():
            failures.append(listed)

    def write(version):
        barrier.wait()
        register_sparse_method("example", version=f"v{version}")(make_method())

    threads = [threading.Thread(target=read) for _ in range(100)]
    threads += [threading.Thread(target=write, args=[i]) for i in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list_sparse_methods()["example"] == [f"v{i}" for i in range(100)]


def test_a_hundred_threads_may_be_the_first_to_ask():
    printed = run_fresh("""
        import threading
        from sparse_methods import get_sparse_method, list_sparse_methods

        barrier, answers = threading.Barrier(100), []

        def ask():
            barrier.wait()
            answers.append((get_sparse_method("dense").__name__, str(list_sparse_methods())))

        threads = [threading.Thread(target=ask) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(len(answers), len(set(answers)))
    """)
    assert printed == "100 1"


def test_importing_every_method_imports_no_triton_and_no_service():
    printed = run_fresh("""
        import sys
        from sparse_methods import get_sparse_method, list_sparse_methods

        assert get_sparse_method("flash_skip_softmax")
        assert list_sparse_methods()
        unwanted = {"triton", "fastapi", "transformers", "prometheus_client", "service"}
        print(sorted(unwanted & {name.partition(".")[0] for name in sys.modules}))
    """)
    assert printed == "[]"
