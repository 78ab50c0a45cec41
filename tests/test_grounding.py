"""Where encoders look: the four numbers by hand, Grad-CAM against automatic differentiation, sheets against arrays."""

from __future__ import annotations

import csv
import functools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_export import write_run
from torch import nn

from cast_fast import cli
from cast_fast.data import layout
from cast_fast.data.saliency_crop import CropRule
from cast_fast.encoder import Encoder, LinearHead, MLPHead
from cast_fast.errors import UserError
from cast_fast.evaluate import figures, grounding
from cast_fast.evaluate.grounding import METRICS, Pair, attend, score
from cast_fast.evaluate.pictures import FolderPictures, Pictures, cell_average
from cast_fast.evaluate.weights import IdentityHead, Model, load_encoder, normalise
from cast_fast.moco import MoCo

CPU = torch.device("cpu")


# Numbers


def test_a_perfect_map_scores_one():
    mask = np.zeros((28, 28), bool)
    mask[4:12, 8:20] = True
    found = score(cell_average(mask, (7, 7)), mask)
    assert found["cosine"] == pytest.approx(1) and found["pointing"] == 1
    exact = score(mask.astype(np.float32), mask)
    assert exact == {"cosine": pytest.approx(1), "pointing": 1, "energy": pytest.approx(1), "iou": 1}


def test_numbers_by_hand():
    mask = np.zeros((4, 4), bool)
    mask[:2, :2] = True  # the first of four cells
    cam = np.array([[3.0, 1.0], [0.0, 0.0]], np.float32)
    found = score(cam, mask, tolerance=0)
    assert found["cosine"] == pytest.approx(3 / np.sqrt(10))
    # bilinear to 4×4: along x 3, 2.5, 1.5, 1 and along y 1, 0.75, 0.25, 0
    large = np.outer([1, 0.75, 0.25, 0], [3, 2.5, 1.5, 1])
    assert found["energy"] == pytest.approx(large[:2, :2].sum() / large.sum())
    region = large >= 1.5
    assert region.sum() == 5 and found["iou"] == pytest.approx(4 / 5)
    assert found["pointing"] == 1
    assert score(cam[:, ::-1].copy(), mask, tolerance=0)["pointing"] == 0


def test_pointing_tolerance_is_a_distance():
    mask = np.zeros((40, 40), bool)
    mask[:, :10] = True
    cam = np.zeros((40, 40), np.float32)
    cam[20, 15] = 1  # six pixels from the region
    assert score(cam, mask, tolerance=5.9 / 40)["pointing"] == 0 and score(cam, mask, tolerance=6 / 40)["pointing"] == 1


@pytest.mark.parametrize(("side", "cells"), [(224, 7), (96, 6), (128, 4), (64, 2), (30, 7), (5, 7)])
def test_pointing_has_no_favourite_side(side, cells):
    rng = np.random.default_rng(0)
    found = []
    for row in range(cells):  # every cell, those at the border too
        for column in np.repeat(range(cells), 8):
            cam = 0.5 * rng.random((cells, cells)).astype(np.float32)
            cam[row, column] = 1
            mask = np.zeros((side, side), bool)
            top, left = rng.integers(0, side - side // 4, 2)
            mask[top : top + side // 4, left : left + side // 3] = True
            ways = [(cam, mask), (cam[::-1], mask[::-1]), (cam[:, ::-1], mask[:, ::-1]), (cam.T, mask.T)]
            points = {score(np.ascontiguousarray(c), np.ascontiguousarray(m))["pointing"] for c, m in ways}
            assert len(points) == 1, (row, column)
            found.append(points.pop())
    assert 0 < np.mean(found) < 1


def test_a_peak_in_a_border_cell_points_to_the_cells_middle():
    cam = np.zeros((2, 2), np.float32)
    cam[0, 0] = 1
    mask = np.zeros((64, 64), bool)
    mask[15:17, 15:17] = True
    assert score(cam, mask, tolerance=0)["pointing"] == 1
    corner = np.zeros((64, 64), bool)
    corner[0, 0] = True  # where the enlarged map is as large, but the cell's middle is far away
    assert score(cam, corner, tolerance=15 / 64)["pointing"] == 0


def test_cells_that_tie_share_the_point():
    cam = np.array([[1, 1 - 1e-7], [0.5, 1]], np.float32)
    mask = np.zeros((32, 32), bool)
    mask[:16, :16] = True
    assert score(cam, mask, tolerance=0)["pointing"] == pytest.approx(1 / 3)
    middle = np.zeros((96, 96), bool)
    middle[40:56, 40:56] = True  # the middles of the four inner cells of six by six, just
    assert score(grounding.baseline_maps((6, 6))["centre"], middle, tolerance=0)["pointing"] == 1


def test_zero_maps_and_impossible_input():
    mask = np.eye(8, dtype=bool)
    assert set(score(np.zeros((2, 2), np.float32), mask).values()) == {0.0}
    tiny = score(np.full((2, 2), 1e-38, np.float32), mask)
    assert tiny["cosine"] == pytest.approx(np.sqrt(0.5)) and np.isfinite(list(tiny.values())).all()
    with pytest.raises(ValueError, match="mask"):
        score(np.ones((2, 2), np.float32), np.zeros((8, 8), bool))
    for bad in (np.nan, -1.0):
        with pytest.raises(ValueError, match="cam"):
            score(np.full((2, 2), bad, np.float32), mask)


def test_baselines_by_hand():
    mask = np.zeros((16, 16), bool)
    mask[:4] = True
    found = score(np.ones((4, 4), np.float32), mask, tolerance=0)
    assert found == {name: pytest.approx(value) for name, value in zip(METRICS, (0.5, 0.25, 0.25, 0.25))}
    # on two rows of cells the salient shares are 1/2 and 0, and half of every cell above counts as much as a whole one
    assert score(np.ones((2, 2), np.float32), mask)["cosine"] == pytest.approx(np.sqrt(0.5))
    maps = grounding.baseline_maps((7, 7))
    assert np.unravel_index(maps["centre"].argmax(), (7, 7)) == (3, 3)
    assert np.allclose(maps["centre"], maps["centre"].T) and (maps["uniform"] == 1).all()


# Grad-CAM


def small_encoder(head: nn.Module, seed: int) -> Encoder:
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Conv2d(3, 6, 8, stride=8), nn.ReLU())
    return Encoder(trunk, head).eval().requires_grad_(False)


def random_pairs(count: int, size: int = 32) -> list[Pair]:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (count, 2, size, size, 3), dtype=np.uint8)
    masks = rng.random((count, 2, size, size)) < 0.5
    return [Pair(p[0], p[1], m[0], m[1], False) for p, m in zip(pictures, masks)]


@pytest.mark.parametrize("head", ["linear", "mlp", "none"])
def test_attention_is_grad_cam_by_automatic_differentiation(head, device):
    torch.manual_seed(9)
    heads = {"linear": lambda: LinearHead(6, 4), "mlp": lambda: MLPHead(6, 4), "none": IdentityHead}
    query, key = small_encoder(heads[head](), 1), small_encoder(heads[head](), 2)
    pairs = random_pairs(5)
    prepare = functools.partial(normalise, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25)) if head == "mlp" else normalise
    found = attend(query.to(device), key.to(device), pairs, device, prepare)
    query, key = query.cpu(), key.cpu()
    images = torch.from_numpy(np.stack([p.query for p in pairs])).permute(0, 3, 1, 2)
    keys = prepare(torch.from_numpy(np.stack([p.key for p in pairs])).permute(0, 3, 1, 2))
    masks = torch.from_numpy(np.stack([p.key_mask for p in pairs]))[:, None]
    for target, inputs in (("key", keys), ("masked_key", keys * masks)):
        embedding = key(inputs).embedding
        activations = query.trunk(prepare(images)).requires_grad_()
        similarity = (F.normalize(query.head(activations.mean(dim=(2, 3)))) * embedding).sum(1)
        (gradient,) = torch.autograd.grad(similarity.sum(), activations)
        cam = (gradient.mean(dim=(2, 3), keepdim=True) * activations).sum(1).relu().detach()
        expected = cam / cam.amax(dim=(1, 2), keepdim=True)
        ours = torch.from_numpy(np.stack([figures.relative_to_peak(c) for c in found[target].cam]))
        assert torch.allclose(ours, expected, atol=1e-4)
        assert np.allclose(found[target].similarity, similarity.detach(), atol=1e-5)


def test_masked_keys_see_the_mean_colour_outside_the_region():
    pair = random_pairs(1)[0]
    mean = normalise(torch.from_numpy(pair.masked_key[None]).permute(0, 3, 1, 2))[0]
    outside = torch.from_numpy(~pair.key_mask)
    assert mean[:, outside].abs().max() < 0.01  # half a level of 255, in units of the deviation
    assert np.array_equal(pair.masked_key[pair.key_mask], pair.key[pair.key_mask])


# Crops, sheets, the command


def write_dataset(folder: Path, count: int = 6) -> Path:
    """A bright square on a noisy ground in each picture, and its map."""
    rng = np.random.default_rng(5)
    (folder / "images").mkdir(parents=True)
    (folder / "saliency").mkdir()
    for number in range(count):
        image = rng.integers(0, 90, (80, 110, 3), dtype=np.uint8)
        saliency = np.zeros((80, 110), np.uint8)
        y, x = rng.integers(5, 40), rng.integers(5, 70)
        saliency[y : y + 30, x : x + 30] = 255
        image[saliency > 0] = rng.integers(160, 256, (900, 3))
        Image.fromarray(image).save(folder / "images" / f"p{number}.png")
        Image.fromarray(saliency).save(folder / "saliency" / f"p{number}.png")
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture(scope="module")
def opened(dataset) -> Pictures:
    return FolderPictures(layout.scan(dataset / "images", dataset / "saliency"))


def test_crops_are_aligned_with_their_maps_and_depend_on_the_name_alone(opened):
    for index in range(len(opened)):
        pair = grounding.cut_pair(opened, index, 64, 3, CropRule())
        for crop, mask in ((pair.query, pair.query_mask), (pair.key, pair.key_mask)):
            assert mask.any() and np.mean((crop.mean(axis=2) > 125) == mask) > 0.97
    alone = grounding.Selection(opened, [4])
    first, again = grounding.cut_pair(opened, 4, 64, 3, CropRule()), grounding.cut_pair(alone, 0, 64, 3, CropRule())
    assert np.array_equal(first.query, again.query) and np.array_equal(first.key, again.key)
    other = grounding.cut_pair(opened, 4, 64, 4, CropRule())
    assert not np.array_equal(first.query, other.query)


def bright_model(name: str, sign: float) -> Model:
    """Looks at what is bright (sign 1) or dark (−1)."""
    trunk = nn.Sequential(nn.Conv2d(3, 2, 16, stride=16), nn.ReLU())
    convolution = trunk[0]
    assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
    with torch.no_grad():
        convolution.weight.fill_(sign / 768)
        convolution.weight[1].neg_()
        convolution.bias.zero_()
    return Model(name, "none", Encoder(trunk, LinearHead(2, 4)).requires_grad_(False), None, None, None, 128, {})


def test_tiles_of_the_sheet_are_the_measured_maps(opened):
    torch.manual_seed(0)
    models = [bright_model("bright", 1.0), bright_model("dark", -1.0)]
    sheet = grounding.draw_sheet(models, opened, [1, 3], size=128, device=CPU, seed=2)
    image = np.asarray(sheet.image())

    def tile(row: int, column: int) -> np.ndarray:
        left, top, right, bottom = sheet.box(row, column)
        return image[top:bottom, left:right]

    assert len(sheet.rows) == 2 and len(sheet.columns) == 8
    for row, index in enumerate((1, 3)):
        pair = grounding.cut_pair(opened, index, 128, 2, CropRule())
        assert np.array_equal(tile(row, 0), figures.outline(pair.query, pair.query_mask))
        assert np.array_equal(tile(row, 1), figures.outline(pair.key, pair.key_mask))
        assert np.array_equal(tile(row, 2), pair.masked_key)
        assert np.array_equal(tile(row, 3) > 127, np.repeat(pair.query_mask[:, :, None], 3, 2))
        for number, model in enumerate(models):
            found = attend(model.query, model.query, [pair], CPU)
            for place, target in enumerate(grounding.TARGETS):
                drawn = figures.outline(figures.overlay(pair.query, found[target].cam[0]), pair.query_mask)
                assert np.array_equal(tile(row, 4 + 2 * number + place), drawn)


def test_an_encoder_that_responds_to_the_object_scores_higher(opened):
    """Queries and keys share the bright object; a head that reads the bright channel attends to it."""
    models = [bright_model("bright", 1.0), bright_model("dark", 1.0)]
    for model, weights in zip(models, ([[5.0, 0.0]], [[0.0, 5.0]])):
        head = model.query.head
        assert isinstance(head, LinearHead)
        with torch.no_grad():
            head.fc.weight.zero_()
            head.fc.weight[:1] = torch.tensor(weights)
            head.fc.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    measured = grounding.measure(models, opened, size=64, batch=4, device=CPU)
    result = grounding.summarise(measured, models, resamples=200, seed=0)
    bright, dark = (result["models"][name]["masked_key"] for name in ("bright", "dark"))
    assert bright["energy"]["mean"] > 0.65 > 0.35 > dark["energy"]["mean"]
    assert bright["pointing"]["mean"] == 1.0
    assert bright["cosine"]["mean"] > result["baselines"]["uniform"]["cosine"]["mean"]
    difference = result["differences"]["dark - bright"]["masked_key"]["energy"]
    assert difference["mean"] == pytest.approx(dark["energy"]["mean"] - bright["energy"]["mean"])
    assert difference["high"] < 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return write_run(folder / "one", head="mlp")[0], write_run(folder / "two")[0]


def test_command_line_writes_numbers_and_sheets(dataset, runs, tmp_path, capsys):
    flags = ["--images", dataset / "images", "--saliency", dataset / "saliency", "--out", tmp_path / "out"]
    flags += ["--rows", 2, "--sheets", 2, "--resamples", 100]
    assert cli.main(["grounding", *map(str, runs), *map(str, flags)]) == 0
    result = json.loads((tmp_path / "out" / "grounding.json").read_text())
    assert all(found["momentum_encoder"] for found in result["models"].values())
    assert result["pictures"] == 6 and set(result["models"]) == {"one", "two"} and result["settings"]["size"] == 64
    with (tmp_path / "out" / "grounding.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 2 * 2
    for name in ("one", "two"):
        for target in grounding.TARGETS:
            own = [row for row in rows if (row["model"], row["target"]) == (name, target)]
            for metric in grounding.METRICS:
                found = result["models"][name][target][metric]
                assert found["mean"] == pytest.approx(np.mean([float(row[metric]) for row in own]), abs=1e-5)
                assert 0 <= found["low"] <= found["mean"] <= found["high"] <= 1 and found["count"] == 6
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["grounding-01.png", "grounding-02.png"]
    assert "looks at nothing" in capsys.readouterr().out


def test_either_layout_gives_the_same_numbers(dataset, runs, tmp_path):
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as archive:
        for number in range(6):
            archive.add(dataset / "images" / f"p{number}.png", f"p{number}.png")
            archive.add(dataset / "saliency" / f"p{number}.png", f"p{number}.saliency.png")
    tables = []
    folders = ["--images", str(dataset / "images"), "--saliency", str(dataset / "saliency")]
    for name, data in (("folders", folders), ("shards", ["--data", str(tmp_path / "shards")])):
        flags = ["--sheets", "1", "--rows", "2", "--resamples", "10", "--out", str(tmp_path / name)]
        assert cli.main(["grounding", str(runs[0]), *data, *flags]) == 0
        tables.append((tmp_path / name / "grounding.csv").read_text())
    assert tables[0] == tables[1] and tables[0].count("\n") == 1 + 2 * 6
    sheets = [np.asarray(Image.open(tmp_path / name / "grounding-01.png")) for name in ("folders", "shards")]
    assert np.array_equal(sheets[0], sheets[1])


def test_chosen_pictures_have_the_numbers_of_the_whole_run(dataset, runs, tmp_path):
    flags = ["--images", str(dataset / "images"), "--saliency", str(dataset / "saliency"), "--sheets", "0"]
    rows = []
    for name, more in (("all", []), ("one", ["--only", "p4"])):
        assert cli.main(["grounding", str(runs[0]), *flags, "--out", str(tmp_path / name), *more]) == 0
        with (tmp_path / name / "grounding.csv").open() as file:
            rows.append([row for row in csv.DictReader(file) if row["stem"] == "p4"])
    assert len(rows[0]) == 2
    for whole, alone in zip(*rows):
        assert all(float(whole[m]) == pytest.approx(float(alone[m]), abs=1e-4) for m in grounding.METRICS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "IMAGES"], "--saliency is missing"),
        ([], "no dataset"),
        (["--images", "IMAGES", "--saliency", "SALIENCY", "--only", "nobody"], "--only"),
        (["--images", "IMAGES", "--saliency", "SALIENCY", "--phi", "0"], "--phi"),
        (["--images", "IMAGES", "--saliency", "SALIENCY", "--iou-share", "1.5"], "--iou-share"),
        (["--images", "IMAGES", "--saliency", "SALIENCY", "--size", "16"], "--size"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], message, dataset, tmp_path, capsys):
    names: dict[str, str] = {"IMAGES": str(dataset / "images"), "SALIENCY": str(dataset / "saliency")}
    moco = MoCo("resnet18", 8, "linear", 8)
    torch.save(moco.query.trunk.state_dict(), tmp_path / "trunk.pth")
    filled = [names.get(flag, flag) for flag in flags]
    assert cli.main(["grounding", str(tmp_path / "trunk.pth"), "--out", str(tmp_path), *filled]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_momentum_encoders_must_exist_to_be_asked_for():
    with pytest.raises(UserError, match="--keys key: bright holds no momentum encoder"):
        grounding.key_encoder(bright_model("bright", 1.0), "key")


def test_the_momentum_encoder_embeds_keys_where_there_is_one(runs):
    model, bare = load_encoder(runs[0]), bright_model("bright", 1.0)
    assert model.key is not None
    assert grounding.key_encoder(model, "auto") is model.key is grounding.key_encoder(model, "key")
    assert grounding.key_encoder(model, "query") is model.query
    assert grounding.key_encoder(bare, "auto") is bare.query


def test_spread_is_even_and_distinct():
    assert (
        grounding.spread(10, 4) == [0, 3, 6, 9] and grounding.spread(3, 8) == [0, 1, 2] and grounding.spread(0, 4) == []
    )
