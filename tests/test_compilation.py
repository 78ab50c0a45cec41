"""Tests of cast_fast.compilation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cast_fast.compilation import compile_fault, compiled, own_code
from cast_fast.forward import step_losses

LIMIT = torch._dynamo.config.recompile_limit


def test_copies_have_code_of_their_own_and_do_the_same() -> None:
    for name in (None, "other"):
        copied = own_code(step_losses, name)
        assert copied.__name__ == copied.__code__.co_name == (name or "step_losses")
        assert copied.__code__ is not step_losses.__code__
        assert copied.__defaults__ == step_losses.__defaults__
    offset = 5
    assert own_code(lambda x, *, y=1: x + y + offset)(2) == 8


def test_one_function_is_compiled_more_often_than_torch_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, *, mode, **given: plain(f, backend="eager", **given))

    def total(x: Tensor) -> Tensor:
        return x.sum()

    for size in range(2, LIMIT + 4):
        assert compiled(total)(torch.ones(size)) == size
    once = compiled(total)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):  # else this test would show nothing
        _ = [once(torch.ones(size)) for size in range(2, LIMIT + 4)]


def test_a_trial_works_however_often_threads_change() -> None:
    threads = torch.get_num_threads()
    try:
        for number in range(1, LIMIT + 3):
            torch.set_num_threads(number)
            assert compile_fault(torch.device("cpu")) is None
    finally:
        torch.set_num_threads(threads)
