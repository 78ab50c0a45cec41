"""Shared set-up of the tests: where kernels run, how many threads, Hypothesis profiles, made scenes."""

from __future__ import annotations

import os
import resource
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

# The Triton interpreter must be chosen before Triton is imported: without a GPU every kernel test runs in it.
# CAST_FAST_REQUIRE_GPU=1 says that a GPU is promised: tests marked ``gpu`` then fail instead of being skipped.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")

import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis  # noqa: E402

torch.set_num_threads(1)
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=100)
hypothesis.settings.load_profile("ci")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if HAS_CUDA and config.pluginmanager.hasplugin("xdist"):
        # Tens of gigabytes each: one after the other, in one process (--dist loadgroup).
        for item in items:
            if "beyond_31_bits" in item.name:
                item.add_marker(pytest.mark.xdist_group("large"))
    if HAS_CUDA or os.environ.get("CAST_FAST_REQUIRE_GPU") == "1":
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def device_settings(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU float32 means float32, also in convolutions, and memory is given back for the next process to take."""
    if "gpu" not in request.keywords or not HAS_CUDA:
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.cuda.empty_cache()


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """The settings of the process after a file of tests are those before: else the next files depend on their order."""
    before = process_settings()
    yield
    after = process_settings()
    changed = {name: (before[name], after.get(name)) for name in before if before[name] != after.get(name)}
    assert not changed, f"{request.node.name} leaves changed (before, after): {changed}"


def process_settings() -> dict[str, Any]:
    """What tests might set and forget. Modules of torch that are not imported yet have no settings so far."""
    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "file size": resource.getrlimit(resource.RLIMIT_FSIZE),
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "folder": os.getcwd(),
    }
    found.update((name, value) for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST")
    for module in ("torch._dynamo.config", "torch._inductor.config", "torch._functorch.config"):
        config = sys.modules.get(module)
        names = config.get_config_copy() if config is not None else ()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # some settings are deprecated
            # Each is read by itself: a copy also holds settings that have lost their value.
            found.update((f"{module}.{name}", getattr(config, name, "no value")) for name in names)
    return found


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The CUDA device; use together with ``@pytest.mark.gpu``."""
    if not HAS_CUDA:
        pytest.fail("CAST_FAST_REQUIRE_GPU=1, but torch finds no CUDA device")
    return torch.device("cuda")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Runs a test on the CPU, and on a GPU where there is one."""
    if request.param == "cuda" and not HAS_CUDA:
        pytest.fail("CAST_FAST_REQUIRE_GPU=1, but torch finds no CUDA device")
    return torch.device(request.param)
