"""Trunks keep torchvision's names, heads pull back exactly, and the grid is known without a forward pass."""

from __future__ import annotations

import pytest
import torch
import torchvision
from tiny_encoder import CHANNELS, STRIDE, tiny_encoder

from cast_fast.encoder import LinearHead, MLPHead, architectures, build_encoder, build_trunk, cam_grid
from cast_fast.errors import UserError


@pytest.mark.parametrize(("arch", "keys"), [("resnet18", 120), ("resnet50", 318)])
def test_trunk_has_the_keys_of_torchvision(arch: str, keys: int) -> None:
    with torch.device("meta"):
        trunk, features = build_trunk(arch)
        network = torchvision.models.get_model(arch, weights=None)
    expected = {name: value.shape for name, value in network.state_dict().items() if not name.startswith("fc.")}
    assert {name: value.shape for name, value in trunk.state_dict().items()} == expected
    assert len(expected) == keys
    assert features == network.fc.in_features


def test_trunk_computes_what_torchvision_computes() -> None:
    network = torchvision.models.resnet18(weights=None).eval()
    trunk, _ = build_trunk("resnet18")
    trunk.load_state_dict({name: value for name, value in network.state_dict().items() if not name.startswith("fc.")})
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled = trunk.eval()(images).mean((2, 3))
        torch.testing.assert_close(network.fc(pooled), network(images))


def test_output_is_pooled_projected_and_normalised() -> None:
    encoder = tiny_encoder(dim=8, head="mlp")
    output = encoder(torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0)))
    assert output.activations.shape == (3, CHANNELS, 3, 3)
    torch.testing.assert_close(output.pooled, output.activations.mean((2, 3)))
    torch.testing.assert_close(output.projection, encoder.head(output.pooled))
    torch.testing.assert_close(output.embedding.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(output.embedding * output.projection.norm(dim=1, keepdim=True), output.projection)


def test_head_stays_in_float32_under_autocast() -> None:
    encoder = tiny_encoder(head="mlp")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = encoder(images)
    assert output.activations.dtype == torch.bfloat16
    assert output.pooled.dtype == output.projection.dtype == output.embedding.dtype == torch.float32
    # Exactly the float32 head, not a bfloat16 one whose result was widened.
    torch.testing.assert_close(
        output.projection, encoder.head(output.activations.float().mean((2, 3))), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("head_class", [LinearHead, MLPHead])
def test_pullback_is_the_transposed_jacobian(head_class: type[LinearHead] | type[MLPHead]) -> None:
    torch.manual_seed(0)
    head = head_class(6, 4).double()
    pooled = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    vector = torch.randn(5, 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad(head(pooled), pooled, vector)
    torch.testing.assert_close(head.pullback(pooled, vector), expected)


def test_pullback_is_differentiable() -> None:
    torch.manual_seed(0)
    head = MLPHead(6, 4).double()
    pooled = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    vector = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head.pullback, (pooled, vector))


@pytest.mark.parametrize(("arch", "size", "grid"), [("resnet18", 224, 7), ("resnet50", 224, 7), ("resnet18", 100, 4)])
def test_cam_grid_by_name(arch: str, size: int, grid: int) -> None:
    assert cam_grid(arch, size) == (grid, grid)


def test_cam_grid_of_an_encoder_changes_nothing_in_it() -> None:
    encoder = tiny_encoder().double()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert cam_grid(encoder, 5 * STRIDE) == (5, 5)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert encoder.training


def test_unknown_architecture_names_the_flag_and_close_matches() -> None:
    with pytest.raises(UserError, match=r"--arch: got 'resnet5'.*resnet50"):
        build_encoder("resnet5", 128, "linear")
    with pytest.raises(UserError, match="--arch"):
        build_encoder("vgg16", 128, "linear")
    assert "resnext50_32x4d" in architectures()
    assert "vgg16" not in architectures()


def test_callers_mistakes() -> None:
    with pytest.raises(ValueError, match="head: got 'deep', expected one of linear, mlp"):
        build_encoder("resnet18", 128, "deep")
    with pytest.raises(ValueError, match="dim: got 0"):
        build_encoder("resnet18", 0, "linear")
    with pytest.raises(UserError, match="--size: got 0"):
        cam_grid("resnet18", 0)


def test_encoder_is_channels_last() -> None:
    encoder = build_encoder("resnet18", 8, "linear")
    assert all(
        parameter.is_contiguous(memory_format=torch.channels_last)
        for parameter in encoder.parameters()
        if parameter.ndim == 4
    )
    with torch.no_grad():
        activations = encoder(torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)).activations
    assert activations.is_contiguous(memory_format=torch.channels_last)
