"""apex as an optional accelerator: none, the wrong package, one that raises, one that computes wrongly, one that fits.

The stand-ins have the interface of NVIDIA apex's FusedSGD (a skip flag in ``_dummy_overflow_buf``, momentum buffers
made in its first step); on a GPU with the real package, the real one is probed.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from cast_fast import accelerators
from cast_fast.errors import UserError

CPU = torch.device("cpu")


class StandIn(torch.optim.Optimizer):
    """SGD with momentum, with the interface of apex's FusedSGD and a plain implementation."""

    def __init__(self, params, lr, momentum=0.0, weight_decay=0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int)

    @torch.no_grad()
    def step(self, closure=None):
        if self._dummy_overflow_buf.item():
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad + group["weight_decay"] * parameter
                state = self.state[parameter]
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
                buffer.mul_(group["momentum"]).add_(gradient)
                parameter.sub_(group["lr"] * buffer)


class Forgetful(StandIn):
    """Ignores the skip flag."""

    def step(self, closure=None):
        self._dummy_overflow_buf.zero_()
        return super().step(closure)


class WithoutDecay(StandIn):
    """Leaves out the weight decay."""

    def __init__(self, params, lr, momentum=0.0, weight_decay=0.0) -> None:
        super().__init__(params, lr, momentum, 0.0)


class Raising(StandIn):
    """Raises when it is used, like a build for another CUDA."""

    def step(self, closure=None):
        raise RuntimeError("no kernel image is available for execution on the device")


def install(monkeypatch: pytest.MonkeyPatch, sgd: type | None, *, amp_c: bool = True) -> None:
    """Puts packages called apex and amp_C in place; ``sgd`` None is the unrelated package of PyPI."""
    apex = types.ModuleType("apex")
    apex.__path__ = []  # type: ignore[attr-defined]
    apex.__spec__ = types.SimpleNamespace(name="apex", submodule_search_locations=[])  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "apex", apex)
    for name in ("apex.optimizers", "amp_C", "apex.contrib.groupbn"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if sgd is not None:
        optimizers = types.ModuleType("apex.optimizers")
        optimizers.__spec__ = types.SimpleNamespace(name="apex.optimizers")  # type: ignore[assignment]
        optimizers.FusedSGD = sgd  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    if amp_c:
        extension = types.ModuleType("amp_C")
        extension.multi_tensor_sgd = object()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "amp_C", extension)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]


def test_without_apex_torch_is_taken_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators.importlib.util, "find_spec", lambda name: None)
    assert accelerators.find_apex() == accelerators.Apex(None, "not installed")
    optimizer, record = accelerators.build_sgd(parameters(), 0.1, 0.9, 0.0, apex="auto")
    assert type(optimizer) is torch.optim.SGD
    assert record == "torch SGD, fused (apex: not installed)"


def test_the_unrelated_package_is_told_from_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None, amp_c=False)
    found = accelerators.find_apex()
    assert found.sgd is None and "not NVIDIA's" in found.reason
    with pytest.raises(UserError, match=r"--apex: got on, .*not NVIDIA's"):
        accelerators.build_sgd(parameters(), 0.1, 0.9, 0.0, apex="on")


def test_nvidias_without_its_extension_is_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandIn, amp_c=False)
    found = accelerators.find_apex()
    assert found.sgd is None and "unusable" in found.reason and "amp_C" in found.reason


def test_a_package_that_raises_on_import_does_not_stop_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('built for another CUDA')\n")
    for name in ("apex", "apex.optimizers", "amp_C"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    optimizer, record = accelerators.build_sgd(parameters(), 0.1, 0.9, 0.0, apex="auto")
    assert type(optimizer) is torch.optim.SGD
    assert "cannot be imported (RuntimeError: built for another CUDA)" in record


def test_a_fitting_one_passes_the_probe() -> None:
    assert accelerators.parity_fault(StandIn, CPU) is None


@pytest.mark.parametrize(
    ("sgd", "words"),
    [(Forgetful, "differ from torch's SGD"), (WithoutDecay, "differ from torch's SGD"), (Raising, "no kernel image")],
)
def test_the_probe_refuses_one_that_computes_wrongly_or_raises(sgd: type, words: str) -> None:
    fault = accelerators.parity_fault(sgd, CPU)
    assert fault is not None and words in fault


def test_apex_is_not_taken_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandIn)
    optimizer, record = accelerators.build_sgd(parameters(), 0.1, 0.9, 0.0, apex="auto")
    assert type(optimizer) is torch.optim.SGD and "CUDA only" in record


def test_off_does_not_even_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "find_apex", lambda: pytest.fail("looked for apex"))
    optimizer, record = accelerators.build_sgd(parameters(), 0.1, 0.9, 0.0, apex="off")
    assert type(optimizer) is torch.optim.SGD and record == "torch SGD, fused"


@pytest.mark.gpu
def test_the_real_apex_where_it_is_installed(cuda: torch.device) -> None:
    found = accelerators.find_apex()
    if found.sgd is None:
        pytest.skip(f"apex: {found.reason}")
    assert accelerators.parity_fault(found.sgd, cuda) is None
