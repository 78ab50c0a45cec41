"""The prototype of a 1×1 convolution with statistics in its epilogue, interpreted on a CPU and compiled on a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from numerics import KERNEL_DEVICE, STORED, assert_close, dtype_id, poisoned, shape_id  # noqa: F401
from prototypes import pointwise_conv as prototype
from torch import Tensor

from cast_kernels.launch import Launch

pytestmark = [pytest.mark.gpu] if KERNEL_DEVICE.type == "cuda" else []

# The interpreter multiplies raw bits where a product's operands are bfloat16: 16-bit types run on a GPU only.
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if KERNEL_DEVICE.type == "cuda" else [torch.float32]
SHAPES = [(2, 64, 7, 7, 256), (1, 1, 1, 1, 1), (3, 5, 9, 11, 67), (1, 130, 12, 12, 40), (1, 200, 3, 5, 129)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    samples, channels, height, width, channels_out = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn((samples, channels, height, width), generator=generator) + offset
    weight = torch.randn((channels_out, channels, 1, 1), generator=generator)
    x = x.to(KERNEL_DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    return x, weight.to(KERNEL_DEVICE, dtype)


@pytest.fixture(params=[None, prototype.Tiles(32, 32, 16, 4, 2)], ids=["chosen tiles", "small tiles"])
def tiles(request: pytest.FixtureRequest) -> prototype.Tiles | None:
    """Small tiles make many of them, also where the tensors are small."""
    return request.param


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_product_and_statistics(shape: tuple[int, ...], dtype: torch.dtype, tiles: prototype.Tiles | None) -> None:
    x, weight = inputs(shape, dtype)
    y, mean, var = prototype.pointwise_conv(x, weight, tiles)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    truth, _, _ = prototype.reference(x.double(), weight.double())
    scale = prototype.reference(x.double().abs(), weight.double().abs())[0]
    assert_close("y", y, truth, scale, STORED[dtype])
    # Of the stored output, whatever its rounding was.
    stored_var, stored_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    level = y.double().square().mean((0, 2, 3)).sqrt()
    assert_close("mean", mean, stored_mean, level, STORED[torch.float32])
    assert_close("variance", var, stored_var, stored_var, STORED[torch.float32])


@pytest.mark.usefixtures("poisoned")
def test_statistics_survive_a_mean_far_from_zero(tiles: prototype.Tiles | None) -> None:
    """With a mean of about 800 standard deviations, E[y²] - mean² in float32 has no correct digit left."""
    x, weight = inputs((2, 8, 16, 17, 32), torch.float32, offset=300.0)
    weight = weight.abs()
    y, _, var = prototype.pointwise_conv(x, weight, tiles)
    stored = y.double().var((0, 2, 3), correction=0)
    ratio = y.double().mean((0, 2, 3)) / stored.sqrt()
    assert ratio.median() > 500
    naive = y.square().mean((0, 2, 3)) - y.mean((0, 2, 3)).square()
    assert ((naive.double() - stored).abs() / stored).max() > 0.01
    assert_close("variance", var, stored, stored, 2e-5)


def test_more_tiles_than_a_group_are_joined_in_two_steps() -> None:
    x, weight = inputs((1, 16, 40, 41, 16), torch.float32)
    small = prototype.Tiles(16, 16, 16, 4, 2)
    launches = prototype.plan(
        x, weight[:, :, 0, 0], torch.empty_like(x), x.new_empty((1, 2, 16), dtype=torch.float32), small
    )
    assert launches[1].grid[1] > 1
    y, mean, var = prototype.pointwise_conv(x, weight, small)
    want_var, want_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert_close("mean", mean, want_mean, want_var.sqrt(), STORED[torch.float32])
    assert_close("variance", var, want_var, want_var, STORED[torch.float32])


@pytest.mark.parametrize("rows", [800, 797])
def test_joining_more_parts_than_a_block(rows: int) -> None:
    """200 parts of 4 rows, 64 at a time, as in the second step of a large layer; parts with means far apart."""
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn((rows, 20), generator=generator) + torch.arange(rows)[:, None] / 50
    parts = values.to(KERNEL_DEVICE).split(4)
    partial = torch.stack(
        [torch.stack([part.mean(0), part.var(0, correction=0) * len(part)]) for part in parts]
    ).contiguous()
    joined = partial.new_full((1, 2, 20), torch.nan)
    constants = {"BLOCK_P": 64, "BLOCK_C": 32}
    Launch(prototype._join_kernel, (1, 1), (partial, joined, rows, 4, 200, 200, 20), constants, 4).run()
    want_var, want_mean = torch.var_mean(values.double(), 0, correction=0)
    assert_close("mean", joined[0, 0], want_mean, want_mean.abs() + want_var.sqrt(), STORED[torch.float32])
    assert_close("variance", joined[0, 1] / rows, want_var, want_var, STORED[torch.float32])


def test_statistics_are_those_of_the_rounded_output() -> None:
    """Stored in bfloat16 from float32 operands, which the interpreter multiplies right."""
    x, weight = inputs((2, 24, 10, 10, 32), torch.float32)
    y = torch.empty((2, 32, 10, 10), dtype=torch.bfloat16, device=x.device).to(memory_format=torch.channels_last)
    joined = x.new_empty((1, 2, 32), dtype=torch.float32)
    tiles = prototype.Tiles(64, 32, 32, 4, 2)
    for launch in prototype.plan(x, weight[:, :, 0, 0].contiguous(), y, joined, tiles):
        launch.run()
    mean, m2 = joined[0].double()
    want_var, want_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    exact = torch.nn.functional.conv2d(x.double(), weight.double()).mean((0, 2, 3))
    assert (mean - want_mean).abs().max() < 0.01 * (exact - want_mean).abs().max()
    assert_close("variance", m2 / 200, want_var, want_var, STORED[torch.float32])


def test_normalising_by_these_statistics_is_batch_norm() -> None:
    x, weight = inputs((4, 32, 9, 9, 48), torch.float32)
    y, mean, var = prototype.pointwise_conv(x, weight)
    scale, bias = torch.randn(2, 48, generator=torch.Generator().manual_seed(0)).to(KERNEL_DEVICE).unbind()
    normalised = torch.nn.functional.batch_norm(y, mean, var, scale, bias, training=False)
    expected = torch.nn.functional.batch_norm(y.double(), None, None, scale.double(), bias.double(), training=True)
    torch.testing.assert_close(normalised.double(), expected, rtol=1e-5, atol=1e-5)


def test_nan_stays_in_its_channel() -> None:
    x, weight = inputs((2, 8, 4, 4, 16), torch.float32)
    weight[3, 2] = torch.nan
    y, mean, var = prototype.pointwise_conv(x, weight)
    broken = torch.arange(16, device=y.device) == 3
    for name, values in (("y", y.isnan().any(dim=(0, 2, 3))), ("mean", mean.isnan()), ("variance", var.isnan())):
        assert torch.equal(values, broken), name


def test_chosen_tiles_are_among_the_candidates_of_every_layer() -> None:
    for channels_in, channels_out, _ in prototype.LAYERS.values():
        found = prototype.candidates(channels_in, channels_out)
        assert len(set(found)) == len(found) >= 2
        for each in found:
            assert each.rows * each.columns <= 128 * 256 and channels_in % each.inner == 0


def test_wrong_arguments_are_named() -> None:
    x, weight = inputs((2, 8, 4, 4, 16), torch.float32)
    with pytest.raises(ValueError, match="x: got strides"):
        prototype.pointwise_conv(x.contiguous(), weight)
    with pytest.raises(ValueError, match="weight: got shape"):
        prototype.pointwise_conv(x, weight[:, :4])
    with pytest.raises(ValueError, match="weight: got dtype"):
        prototype.pointwise_conv(x, weight.half())
    with pytest.raises(ValueError, match="x: got dtype"):
        prototype.pointwise_conv(x.double(), weight.double())
    with pytest.raises(ValueError, match="not empty"):
        prototype.pointwise_conv(x[:0], weight)


def test_no_candidate_spills_in_the_committed_table() -> None:
    """Compiled for sm_80, sm_90 and sm_100 by ``pointwise_conv.py --offline --write``."""
    tables = sorted(prototype.RESULTS.glob("pointwise-conv-triton-*.json"))
    assert tables
    for path in tables:
        table = json.loads(path.read_text())["tiles"]
        for channels_in, channels_out, _ in prototype.LAYERS.values():
            for tiles in prototype.candidates(channels_in, channels_out):
                rows = table[prototype.case_name(tiles, channels_in)]
                assert rows.keys() == {"sm_80", "sm_90", "sm_100"}
                for row in rows.values():
                    assert row["local"] == 0 and row["registers"] <= 232, (tiles, row)
                    assert row["loads"].keys() <= {"128"}, (tiles, row)
