"""The traffic model against layers worked out by hand, and against what torch's scheduler was counted to move."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import traffic_model as model  # noqa: E402

COUNTED = {"forward": 119.49, "backward": 244.63, "backward, pool scattered": 260.68}
"""MB an image of the ResNet-50 trunk at batch 256, as ``step_bytes.py`` counted them with torch 2.14.1."""


def parts(design: str, layer: str) -> dict[str, list[float]]:
    """Kind → bytes of the kernels of one layer, in MB an image without weights."""
    chosen = model.DESIGNS[design]
    found: dict[str, list[float]] = {}
    for part in (*model.forward(chosen, 10**9), *model.backward(chosen, 10**9)):
        if part.layer == layer:
            found.setdefault(part.kind, []).append(round(part.bytes / 1e6, 3))
    return found


def test_the_network_is_resnet50() -> None:
    """Against torchvision's own numbers: 23,454,912 weights of convolutions, 4.09 GMAC, 11.1 M outputs an image."""
    layers = model.convolutions()
    assert len(layers) == 53
    assert sum(layer.weights for layer in layers) == 23_454_912
    assert sum(layer.flops for layer in layers) / 2 == 4_087_136_256
    assert sum(layer.elements_out for layer in layers) == 11_113_984
    assert layers[-1].side_out == 7 and layers[-1].channels_out == 2048


def test_layers_match_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision")
    import torch

    seen: list[tuple[int, ...]] = []

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(module, torch.nn.Conv2d)
        seen.append((module.kernel_size[0], *inputs[0].shape[1:3], *output.shape[1:3]))

    network = torchvision.models.resnet50(weights=None).to("meta")
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(note)
    network(torch.empty(1, 3, 224, 224, device="meta"))
    ours = [(c.kernel, c.channels_in, c.side_in, c.channels_out, c.side_out) for c in model.convolutions()]
    assert sorted(ours) == sorted(seen)


def test_one_layer_by_hand() -> None:
    """layer1.1.conv3: 64 → 256 channels at 56×56, that is 0.401 MB in and 1.606 MB out in bfloat16."""
    by_name = {layer.name: layer for layer in model.convolutions()}
    layer = by_name["layer1.1.conv3"]
    assert layer.flops == 2 * 64 * 256 * 56 * 56
    found = parts("inductor", "layer1.1.conv3")
    assert found["convolution"] == [2.007] and found["statistics"] == [1.606]
    assert found["normalise"] == [4.817]  # output and identity read, sum written
    fused = parts("statistics", "layer1.1.conv3")
    # A mean and an M2 in float32 for 128 rows: 1/32 of the output, written by the product and read once.
    assert fused["convolution"] == [2.057] and fused["statistics"] == [0.05]


@pytest.mark.parametrize(
    ("layer", "kind", "megabytes"),
    [
        # As scheduled by torch 2.14.1 for the trunk alone at batch 256 (step_bytes.py), kernel by kernel.
        ("layer1.2.conv3", "reduction", [6.426]),
        ("layer1.2.conv3", "apply", [8.028]),
        ("layer1.1.conv3", "join", [9.634]),
        ("layer1.1.conv3", "reduction", [3.214]),
        ("layer1.1.conv3", "apply", [4.817]),
        ("layer1.0.conv3", "reduction", [8.034]),
        ("layer1.0.conv3", "apply", [11.239]),
        ("layer1.1.conv2", "reduction", [1.206]),
        ("layer1.1.conv2", "apply", [1.606]),
        ("layer4.2.conv3", "reduction", [0.305]),
        ("layer4.2.conv3", "apply", [0.502]),
        ("stem", "pool", [2.208, 4.215]),
        ("stem", "reduction", [3.214]),
        ("stem", "apply", [4.817]),
    ],
)
def test_kernels_of_inductor(layer: str, kind: str, megabytes: list[float]) -> None:
    found = parts("inductor", layer)[kind]
    assert found == pytest.approx(megabytes, rel=0.02)


def test_totals_against_counted_ones() -> None:
    """Within 2 %: left out are partial sums, and single joins that torch writes in float32."""
    design = model.DESIGNS["inductor"]
    assert model.megabytes(model.forward(design)) == pytest.approx(COUNTED["forward"], rel=0.02)
    # The table counts a convolution's two gradients as one kernel; the model has the upstream gradient read by both.
    again = sum(2 * c.elements_out for c in model.convolutions() if c.role != "stem") / 1e6
    backward = model.megabytes(model.backward(design))
    assert backward - again == pytest.approx(COUNTED["backward"], rel=0.02)
    scattered = COUNTED["backward, pool scattered"] - COUNTED["backward"]
    assert abs(model.SCATTERED / 1e6 - scattered) < 0.02


@pytest.mark.parametrize(
    ("design", "forward", "backward"),
    [
        ("streaming", 115, 212),
        ("statistics", 97, 212),
        ("reductions", 97, 187),
        ("normalise-on-load", 91, 187),
        ("every-convolution", 80, 184),
    ],
)
def test_designs_against_sums_by_hand(design: str, forward: float, backward: float) -> None:
    """MB an image added up on paper, without weights and the partial statistics of tiles (under 2.5 together)."""
    chosen = model.DESIGNS[design]
    bare = [part for part in model.forward(chosen, 10**9) if part.layer != "weights"]
    tiles = 2 * 2 * 4 / model.TILE_ROWS  # bytes an element: written and read
    own = sum(c.elements_out for c in model.convolutions() if c.role in chosen.statistics) * tiles / 1e6
    assert model.megabytes(bare) - own == pytest.approx(forward, abs=1)
    assert model.megabytes(model.backward(chosen, 10**9)) == pytest.approx(backward, abs=1)


def test_shares_of_the_elementwise_work() -> None:
    """By category, forward: convolutions 44, statistics 22, normalisation 49; backward: gradients 42 + 44."""
    design = model.DESIGNS["streaming"]
    ahead, back = model.forward(design, 10**9), model.backward(design, 10**9)
    assert model.megabytes(ahead, "convolution") == pytest.approx(43.6, abs=0.1)
    assert model.megabytes(ahead, "statistics") == pytest.approx(22.2, abs=0.1)
    assert model.megabytes(back, "dgrad") == pytest.approx(41.6, abs=0.2)
    assert model.megabytes(back, "wgrad") == pytest.approx(43.6, abs=0.2)


def test_time_is_the_larger_of_arithmetic_and_traffic() -> None:
    gpu = model.Gpu("made up", flops=10.0, bandwidth=2.0)
    product = model.Part("a", "convolution", bytes=4.0, flops=100.0, own=True)
    copy = model.Part("b", "normalise", bytes=8.0)
    assert model.seconds([product, copy], gpu) == 10.0 + 4.0
    assert model.seconds([product, copy], gpu, own=0.5) == 20.0 + 4.0
    assert model.seconds([dataclasses.replace(product, own=False)], gpu, own=0.5) == 10.0
    assert model.seconds([dataclasses.replace(product, flops=1.0)], gpu) == 2.0


@pytest.mark.parametrize("calibration", model.GPUS)
def test_every_design_gains_on_the_one_before(calibration: str) -> None:
    for gpu in model.GPUS[calibration].values():
        rates = [model.rates(design, gpu)["cast"] for design in model.DESIGNS.values()]
        assert rates == sorted(rates) and len(set(rates)) == len(rates)
        for name in ("statistics", "reductions", "normalise-on-load"):
            design, base = model.DESIGNS[name], model.DESIGNS["streaming"]
            share = model.break_even(design, base, gpu)
            assert model.rates(design, gpu, own=share)["cast"] == pytest.approx(
                model.rates(base, gpu)["cast"], rel=1e-6
            )


def test_anchored_shares_reproduce_their_anchors() -> None:
    for name, design, published, _ in model.ANCHORS:
        modelled = model.rates(model.DESIGNS[design], model.GPUS["anchored"][name])["supervised"]
        assert modelled == pytest.approx(published, rel=0.03)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main(["--out", str(tmp_path / "table.json")]) == 0
    stored = json.loads((tmp_path / "table.json").read_text())["designs"]
    assert stored.keys() == model.DESIGNS.keys()
    assert stored["statistics"]["anchored H200"] > stored["streaming"]["anchored H200"]
    assert "every-convolution" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        model.main(["--batch", "0"])
