"""gradcam_cosine: the kernels against float64 truth, and the operator under autograd, opcheck and torch.compile."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    CASE_DTYPES,
    INTERPRETED,
    KERNEL_DEVICE,
    STORED,
    assert_close,
    dtype_id,
    far_apart,
    kernel_marks,
    poisoned,  # noqa: F401  (a fixture)
    shape_id,
)
from torch import Tensor

import cast_kernels
from cast_kernels import reference

module = importlib.import_module("cast_kernels.gradcam_cosine")

pytestmark = kernel_marks()

SHAPES = [
    (0, 8, 7, 7),
    (1, 1, 1, 1),
    (3, 5, 1, 1),
    (2, 37, 7, 7),
    (5, 64, 1, 3),
    (2, 300, 5, 9),
    (1, 2048, 7, 7),
    (1, 16, 32, 32),
]
LARGE = [(512, 2048, 7, 7), (3, 2048, 32, 32), (2, 8192, 7, 7), (1, 16384, 7, 7), (700, 41, 3, 5)]
"""For a compiled kernel only: the interpreter would take minutes."""
if not INTERPRETED:
    SHAPES += LARGE


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Activations as after a ReLU in channels-last memory, channel weights of both signs, a map in [0, 1]."""
    samples, channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(shape, generator=generator).relu().to(dtype).to(memory_format=torch.channels_last)
    alpha = torch.randn(samples, channels, generator=generator)
    saliency = torch.rand(samples, height, width, generator=generator)
    return activations.to(KERNEL_DEVICE), alpha.to(KERNEL_DEVICE), saliency.to(KERNEL_DEVICE)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def scales(activations: Tensor, alpha: Tensor, truth: reference.GradcamTerms) -> tuple[Tensor, ...]:
    """Natural scales of loss, cam, slope and alpha_gradient, per sample.

    A term of the map is at most |alpha| |A|; slope is a difference of unit vectors over |cam|, and alpha_gradient sums
    it against A. Where the map is a small difference of large terms, its relative error reaches the other three.
    """
    terms = torch.einsum("nchw,nc->nhw", activations.double().abs(), alpha.double().abs()).flatten(1)
    norm = truth.cam.flatten(1).norm(dim=1)
    zero = norm == 0
    inverse = torch.where(zero, 0, 1 / torch.where(zero, 1, norm))
    loss = (1 + terms.norm(dim=1) * inverse) * (truth.loss != 1)
    largest = activations.double().flatten(1).norm(dim=1)
    slope = loss * inverse
    return loss, terms[..., None].view_as(truth.cam), slope[:, None, None], (slope * largest)[:, None]


def check_terms(actual: tuple[Tensor, ...], activations: Tensor, alpha: Tensor, saliency: Tensor) -> None:
    truth = reference.gradcam_terms(*wide(activations, alpha, saliency))
    for name, got, expected, scale in zip(truth._fields, actual, truth, scales(activations, alpha, truth)):
        assert_close(name, got, expected, scale, STORED[torch.float32])


@pytest.mark.gpu
def test_the_kernels_are_compiled_where_a_gpu_is_promised() -> None:
    assert KERNEL_DEVICE.type == "cuda"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", CASE_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_kernel_matches_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    activations, alpha, saliency = inputs(shape, dtype)
    check_terms(module._launch(activations, alpha, saliency, True), activations, alpha, saliency)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", CASE_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_kernel_from_gradient_matches_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    activations, _, saliency = inputs(shape, dtype)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    gradient = gradient.to(memory_format=torch.channels_last).to(KERNEL_DEVICE)
    *terms, alpha = module._launch_from_gradient(activations, gradient, saliency, True)
    truth = gradient.double().mean((2, 3))
    assert_close("alpha", alpha, truth, 4.0, STORED[torch.float32])
    check_terms(tuple(terms), activations, truth, saliency)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("from_gradient", [False, True], ids=["alpha", "gradient"])
@pytest.mark.parametrize("dtype", CASE_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(2, 130, 3, 5), (1, 64, 7, 7), (0, 70, 2, 2)], ids=shape_id)
def test_wide_kernel_matches_float64(
    shape: tuple[int, ...], dtype: torch.dtype, from_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ROW_CHANNELS", 16)
    monkeypatch.setattr(module, "WIDE_BLOCK", 32)
    activations, alpha, saliency = inputs(shape, dtype)
    if from_gradient:
        gradient = torch.randn(shape, device=KERNEL_DEVICE).to(dtype)
        *terms, alpha = module._launch_from_gradient(activations, gradient, saliency, True)
        assert_close("alpha", alpha, gradient.double().mean((2, 3)), 4.0, STORED[torch.float32])
    else:
        terms = module._launch(activations, alpha, saliency, True)
    check_terms(tuple(terms), activations, alpha, saliency)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("most", [8192, 16], ids=["row", "wide"])
def test_without_gradient_loss_and_map_are_the_same(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROW_CHANNELS", most)
    activations, alpha, saliency = inputs((3, 40, 7, 7), torch.float32)
    loss, cam, slope, alpha_gradient = module._launch(activations, alpha, saliency, False)
    full = module._launch(activations, alpha, saliency, True)
    assert torch.equal(loss, full[0])
    assert torch.equal(cam, full[1])
    assert slope.numel() == alpha_gradient.numel() == 0


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("most", [8192, 16], ids=["row", "wide"])
@pytest.mark.parametrize("alpha_scale", [1e-30, 1e-12, 1e12, 1e25])
def test_any_magnitude_gives_the_same_cosine(alpha_scale: float, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of these maps leave float32; a positive factor of alpha cancels in the loss."""
    monkeypatch.setattr(module, "MAX_ROW_CHANNELS", most)
    activations, alpha, saliency = inputs((2, 20, 7, 7), torch.float16)
    activations = (activations * 1000).to(memory_format=torch.channels_last)
    check_terms(
        module._launch(activations, alpha * alpha_scale, saliency * 1e-20, True),
        activations,
        alpha * alpha_scale,
        saliency * 1e-20,
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("most", [8192, 16], ids=["row", "wide"])
def test_zero_map_or_saliency_has_loss_one_and_zero_gradients(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROW_CHANNELS", most)
    activations, alpha, saliency = inputs((5, 20, 4, 4), torch.float32)
    activations[0] = 0
    saliency[1] = 0
    alpha[2] = -alpha[2].abs()
    saliency[3], alpha[3] = 0, 0
    alpha[[1, 4]] = alpha[[1, 4]].abs()
    loss, cam, slope, alpha_gradient = module._launch(activations, alpha, saliency, True)
    assert loss[:4].tolist() == [1, 1, 1, 1]
    assert 0 < loss[4] < 1
    assert not slope[:4].any()
    assert not alpha_gradient[:4].any()
    assert not cam[[0, 2, 3]].any()
    assert cam[1].any()
    check_terms((loss, cam, slope, alpha_gradient), activations, alpha, saliency)


@pytest.mark.parametrize("most", [8192, 16], ids=["row", "wide"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_activation_breaks_its_own_sample_alone(
    bad: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ROW_CHANNELS", most)
    activations, alpha, saliency = inputs((3, 20, 4, 4), torch.float32)
    good = module._launch(activations, alpha, saliency, True)
    alpha[1, 7] = 1.0
    activations[1, 7, 2, 2] = bad
    broken = module._launch(activations, alpha, saliency, True)
    assert broken[0].isfinite().tolist() == [True, False, True]
    for before, after in zip(good, broken):
        assert torch.equal(before[[0, 2]], after[[0, 2]])


def _channels_sliced(tensor: Tensor) -> Tensor:
    doubled = tensor.repeat_interleave(2, dim=1).contiguous(memory_format=torch.channels_last)
    return doubled[:, ::2]


def _window(tensor: Tensor) -> Tensor:
    padded = F.pad(tensor, (1, 2, 3, 1), value=7.0).contiguous(memory_format=torch.channels_last)
    return padded[:, :, 3:-1, 1:-2]


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda tensor: tensor.contiguous(),
    "channels-sliced": _channels_sliced,
    "window": _window,
    "transposed": lambda tensor: tensor.contiguous().transpose(2, 3).contiguous().transpose(2, 3),
    "every-second-sample": lambda tensor: tensor.repeat_interleave(2, dim=0)[::2],
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("most", [8192, 16], ids=["row", "wide"])
@pytest.mark.parametrize("layout", STRIDES)
def test_strides_are_taken_as_they_are(layout: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROW_CHANNELS", most)
    activations, alpha, saliency = inputs((3, 24, 5, 6), torch.float32)
    view = STRIDES[layout](activations)
    assert torch.equal(view, activations)
    alpha_view = alpha.t().contiguous().t()
    saliency_view = saliency.transpose(1, 2).contiguous().transpose(1, 2)
    check_terms(module._launch(view, alpha_view, saliency_view, True), activations, alpha, saliency)
    *terms, mean = module._launch_from_gradient(view, view, saliency_view, True)
    check_terms(tuple(terms), activations, mean, saliency)


@pytest.mark.usefixtures("poisoned")
def test_expanded_inputs_share_their_memory() -> None:
    activations, alpha, saliency = inputs((1, 24, 5, 6), torch.float32)
    activations, alpha, saliency = activations.expand(4, -1, -1, -1), alpha.expand(4, -1), saliency.expand(4, -1, -1)
    terms = module._launch(activations, alpha, saliency, True)
    check_terms(terms, activations, alpha, saliency)
    constant = torch.ones(1, 1, 1, 1, device=KERNEL_DEVICE).expand(2, 3, 4, 5)
    check_terms(
        module._launch(constant, alpha[:2, :3].abs(), saliency[:2, :4, :5], True),
        constant,
        alpha[:2, :3].abs(),
        saliency[:2, :4, :5],
    )


@pytest.mark.parametrize("most", [8192, 16], ids=["row", "wide"])
@pytest.mark.parametrize("far", ["samples", "rows", "channels"])
def test_offsets_beyond_31_bits(far: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROW_CHANNELS", most)
    activations, alpha, saliency = inputs((4, 20, 2, 3), torch.float16)
    # A stride that fits 31 bits is a 32-bit argument, and its product with an index must not be; a longer one is not.
    strides = {
        "samples": (2**30 + 64, 1, 60, 20),
        "rows": (120, 1, 2**31 + 64, 20),
        "channels": (200, 2**27 + 4, 3, 1),
    }[far]
    count = sum((size - 1) * stride for size, stride in zip(activations.shape, strides)) + 1
    with far_apart(count, torch.float16, KERNEL_DEVICE) as memory:
        view = memory.as_strided(activations.shape, strides)
        view.copy_(activations)
        check_terms(module._launch(view, alpha, saliency, True), activations, alpha, saliency)
        *terms, mean = module._launch_from_gradient(view, view, saliency, True)
        check_terms(tuple(terms), activations, mean, saliency)


def test_two_runs_give_the_same_bits() -> None:
    activations, alpha, saliency = inputs((4, 100, 7, 7) if INTERPRETED else (512, 2048, 7, 7), torch.bfloat16)
    first = module._launch(activations, alpha, saliency, True)
    for _ in range(3):
        for one, two in zip(first, module._launch(activations, alpha, saliency, True)):
            assert torch.equal(one, two)


def test_channels_that_are_not_contiguous_are_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_warned_of_slow_strides", False)
    activations, alpha, saliency = inputs((2, 4, 3, 3), torch.float32)
    with caplog.at_level(logging.WARNING, "cast_kernels"):
        module._launch(activations, alpha, saliency, True)
        assert not caplog.records
        module._launch(activations.contiguous(), alpha, saliency, True)
        module._launch(activations.contiguous(), alpha, saliency, True)
    assert len(caplog.records) == 1
    assert "channels-last" in caplog.text


# The reference itself


def test_reference_is_one_minus_the_cosine_similarity() -> None:
    activations, alpha, saliency = (x.cpu() for x in wide(*inputs((4, 9, 3, 5), torch.float32)))
    loss, cam = reference.gradcam_cosine(activations, alpha, saliency)
    by_hand = torch.zeros(4, 3, 5, dtype=torch.float64)
    for channel in range(9):
        by_hand += alpha[:, channel, None, None] * activations[:, channel]
    by_hand = by_hand.clamp(min=0)
    assert_close("cam", cam, by_hand, 10.0, 1e-14)
    cosine = F.cosine_similarity(by_hand.flatten(1), saliency.flatten(1))
    assert_close("loss", loss, 1 - cosine, 1.0, 1e-14)


def test_formulas_of_the_reference_are_its_autograd() -> None:
    activations, alpha, saliency = (x.cpu().requires_grad_() for x in wide(*inputs((4, 9, 3, 5), torch.float32)))
    loss, cam = reference.gradcam_cosine(activations, alpha, saliency)
    terms = reference.gradcam_terms(activations.detach(), alpha.detach(), saliency.detach())
    by_autograd = torch.autograd.grad(loss.sum(), (activations, alpha, saliency))
    assert torch.equal(terms.cam, cam.detach())
    assert_close("loss", terms.loss, loss, 1.0, 1e-14)
    assert_close("alpha", terms.alpha_gradient, by_autograd[1], 1.0, 1e-14)
    rank_one = terms.slope[:, None] * alpha.detach()[:, :, None, None]
    assert_close("activations", rank_one, by_autograd[0], 1.0, 1e-14)
    by_formula = reference.saliency_gradient(terms.cam, saliency.detach())
    assert_close("saliency", by_formula, by_autograd[2], 1.0, 1e-14)


# The operator


def leaves(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Activations, alpha, saliency and weight that want gradients."""
    activations, alpha, saliency = inputs(shape, dtype)
    weight = torch.rand(shape[0], generator=torch.Generator().manual_seed(3))
    return [x.to(device).detach().requires_grad_() for x in (activations, alpha, saliency, weight)]


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(1)
    activations, gradient = (torch.randn(2, 4, 2, 3, generator=generator).double() for _ in range(2))
    alpha = torch.randn(2, 4, generator=generator).double()
    saliency = torch.rand(2, 2, 3, generator=generator).double()
    weight = torch.rand(2, generator=generator).double()
    # A position without any activation would sit on the kink of the ReLU.
    assert torch.einsum("nchw,nc->nhw", activations, alpha).abs().min() > 1e-3
    arguments = tuple(x.requires_grad_() for x in (activations, alpha, saliency, weight))
    assert torch.autograd.gradcheck(lambda *x: cast_kernels.gradcam_cosine(*x)[0], arguments)
    arguments = tuple(x.requires_grad_() for x in (activations, gradient, saliency, weight))
    assert torch.autograd.gradcheck(lambda *x: cast_kernels.gradcam_cosine_from_gradient(*x)[0], arguments)


@pytest.mark.parametrize("upstream", ["one", "scaled", "expanded", "strided"])
@pytest.mark.parametrize("dtype", CASE_DTYPES, ids=dtype_id)
def test_gradients_match_float64(dtype: torch.dtype, upstream: str, device: torch.device) -> None:
    shape = (6, 33, 7, 7)
    arguments = leaves(shape, dtype, device)
    truths = [x.detach().cpu().double().requires_grad_() for x in arguments]
    incoming = {
        "one": torch.ones(6, device=device),
        "scaled": torch.linspace(-3e4, 1e4, 6, device=device),
        "expanded": torch.tensor(2.5, device=device).expand(6),
        "strided": torch.linspace(-1, 1, 12, device=device)[::2],
    }[upstream]
    loss, cam = cast_kernels.gradcam_cosine(*arguments)
    loss.backward(incoming)
    true_loss, true_cam = reference.gradcam_cosine(*truths)
    true_loss.backward(incoming.cpu().double())
    assert loss.dtype == cam.dtype == torch.float32
    assert_close("loss", loss, true_loss, 10.0, STORED[torch.float32])
    assert_close("cam", cam, true_cam, 100.0, STORED[torch.float32])
    names = ("activations", "alpha", "saliency", "weight")
    for name, got, truth in zip(names, arguments, truths, strict=True):
        assert got.grad is not None and truth.grad is not None
        assert got.grad.dtype == got.dtype
        # The largest entry of a sample's gradient is its scale; float32 errors of the map add up to some tens of it.
        scale = truth.grad.abs().flatten(1).amax(1) if truth.dim() > 1 else truth.grad.abs()
        scale = scale.view(-1, *[1] * (truth.dim() - 1)) + (10.0 if name == "weight" else 0.0)
        assert_close(
            name, got.grad, truth.grad, 8 * scale if got.dtype == torch.float32 else 2 * scale, STORED[got.dtype]
        )


@pytest.mark.parametrize("dtype", CASE_DTYPES, ids=dtype_id)
def test_gradients_from_gradient_match_float64(dtype: torch.dtype, device: torch.device) -> None:
    shape = (4, 21, 3, 5)
    activations, _, saliency, _ = leaves(shape, dtype, device)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype).to(device).requires_grad_()
    arguments = [activations, gradient, saliency]
    truths = [x.detach().cpu().double().requires_grad_() for x in arguments]
    incoming = torch.linspace(-2, 3, 4, device=device)
    cast_kernels.gradcam_cosine_from_gradient(activations, gradient, saliency)[0].backward(incoming)
    reference.gradcam_cosine_from_gradient(*truths)[0].backward(incoming.cpu().double())
    for name, got, truth in zip(("activations", "gradient", "saliency"), arguments, truths, strict=True):
        assert got.grad is not None and truth.grad is not None
        scale = truth.grad.abs().flatten(1).amax(1).view(-1, *[1] * (truth.dim() - 1))
        assert_close(
            name, got.grad, truth.grad, 8 * scale if got.dtype == torch.float32 else 2 * scale, STORED[got.dtype]
        )


def test_zero_saliency_has_zero_gradients_in_everything(device: torch.device) -> None:
    arguments = leaves((3, 8, 4, 4), torch.float32, device)
    with torch.no_grad():
        arguments[2][1] = 0
        arguments[0][2] = 0
    loss, _ = cast_kernels.gradcam_cosine(*arguments)
    loss.sum().backward()
    for argument in arguments[:3]:
        assert argument.grad is not None
        assert argument.grad[0].any()
        assert not argument.grad[1:].any()


def test_only_the_wanted_gradients_are_made(device: torch.device) -> None:
    for wanted in range(3):
        arguments = [x.detach() for x in leaves((2, 8, 4, 4), torch.float32, device)[:3]]
        arguments[wanted].requires_grad_()
        loss, cam = cast_kernels.gradcam_cosine(*arguments)
        assert not cam.requires_grad
        loss.sum().backward()
        assert [x.grad is not None for x in arguments] == [i == wanted for i in range(3)]


def test_backward_keeps_nothing_of_the_size_of_the_activations(device: torch.device) -> None:
    arguments = leaves((2, 64, 7, 7), torch.float32, device)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cast_kernels.gradcam_cosine(*arguments)
    assert kept
    assert max(kept) < arguments[0].numel() / 7


def test_gradient_of_the_activations_has_channels_innermost(device: torch.device) -> None:
    """What reads it then reads it in the order of the activations."""
    arguments = leaves((2, 8, 4, 4), torch.float32, device)
    loss, _ = cast_kernels.gradcam_cosine(*arguments)
    (gradient,) = torch.autograd.grad(loss.sum(), arguments[0])
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_second_derivative_is_refused(device: torch.device) -> None:
    arguments = leaves((2, 8, 4, 4), torch.float32, device)
    loss, _ = cast_kernels.gradcam_cosine(*arguments)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(loss.sum(), arguments, create_graph=True)


def test_autocast_does_not_lower_the_precision(device: torch.device) -> None:
    arguments = [x.detach() for x in leaves((2, 64, 7, 7), torch.float32, device)]
    plain = cast_kernels.gradcam_cosine(*arguments)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = cast_kernels.gradcam_cosine(*arguments)
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("name", ["gradcam_cosine", "gradcam_cosine_from_gradient"])
def test_opcheck(name: str, with_gradient: bool, device: torch.device) -> None:
    activations, alpha, saliency, _ = leaves((2, 12, 3, 4), torch.float32, device)
    source = alpha if name == "gradcam_cosine" else torch.rand_like(activations).requires_grad_()
    arguments: tuple[Any, ...] = (activations, source, saliency, True)
    if not with_gradient:
        arguments = (activations.detach(), source.detach(), saliency.detach(), False)
    torch.library.opcheck(getattr(torch.ops.cast_kernels, name).default, arguments)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic: bool, device: torch.device) -> None:
    def step(activations: Tensor, alpha: Tensor, saliency: Tensor, weight: Tensor) -> Tensor:
        activations = (activations * 1.5).relu()
        first, _ = cast_kernels.gradcam_cosine(activations, alpha, saliency, weight)
        second, cam = cast_kernels.gradcam_cosine_from_gradient(activations, activations * 0.5, saliency)
        return (first + second + cam.mean((1, 2))).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for samples in (3, 5) if dynamic else (3,):
        eager, traced = (leaves((samples, 24, 4, 4), torch.float32, device) for _ in range(2))
        first, second = step(*eager), compiled(*traced)
        first.backward()
        second.backward()
        assert_close("loss", second, first, 10.0, STORED[torch.float32])
        for one, two in zip(eager, traced):
            assert one.grad is not None and two.grad is not None
            assert_close("gradient", two.grad, one.grad, one.grad.abs().max().cpu() * 8, STORED[torch.float32])


def _good() -> dict[str, Any]:
    return {
        "activations": torch.zeros(2, 8, 4, 4),
        "alpha": torch.zeros(2, 8),
        "saliency": torch.zeros(2, 4, 4),
        "weight": torch.ones(2),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("activations", torch.zeros(2, 8, 4), "activations: got 3 dimensions, expected 4"),
        ("activations", torch.zeros(2, 0, 4, 4), "got 0 channels, expected at least 1"),
        ("activations", torch.zeros(2, 8, 33, 32), r"got H·W = 33·32, expected 1 to 1024"),
        ("activations", torch.zeros(2, 8, 0, 4), r"got H·W = 0·4, expected 1 to 1024"),
        ("activations", torch.zeros(2, 8, 4, 4, dtype=torch.int32), "activations: got dtype torch.int32 on cpu"),
        ("alpha", torch.zeros(2, 7), r"alpha: got shape \(2, 7\), expected \(N, C\) = \(2, 8\)"),
        ("alpha", torch.zeros(2, 8, dtype=torch.complex64), "alpha: got dtype torch.complex64"),
        ("saliency", torch.zeros(2, 4, 5), r"saliency: got shape \(2, 4, 5\), expected \(N, H, W\) = \(2, 4, 4\)"),
        ("saliency", torch.zeros(2, 4, 4, dtype=torch.uint8), "saliency: got dtype torch.uint8"),
        ("saliency", torch.zeros(2, 4, 4, device="meta"), "saliency: got device meta, expected cpu"),
        ("weight", torch.ones(3), r"weight: got shape \(3,\), expected \(N,\) = \(2,\)"),
    ],
)
def test_a_callers_mistake_is_a_value_error(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cast_kernels.gradcam_cosine(**{**_good(), name: value})
    if name != "alpha":
        arguments = {**_good(), "gradient": torch.zeros(2, 8, 4, 4), name: value}
        del arguments["alpha"]
        with pytest.raises(ValueError, match=message):
            cast_kernels.gradcam_cosine_from_gradient(**arguments)


def test_a_gradient_of_another_shape_is_a_value_error() -> None:
    good = _good()
    with pytest.raises(ValueError, match=r"gradient: got shape \(2, 8, 4, 5\), expected \(N, C, H, W\)"):
        cast_kernels.gradcam_cosine_from_gradient(good["activations"], torch.zeros(2, 8, 4, 5), good["saliency"])


@pytest.mark.gpu
def test_float64_is_refused_on_a_gpu(cuda: torch.device) -> None:
    arguments = [x.detach().double() for x in leaves((2, 8, 4, 4), torch.float32, cuda)]
    with pytest.raises(ValueError, match=r"activations: got dtype torch\.float64 on cuda"):
        cast_kernels.gradcam_cosine(*arguments)
