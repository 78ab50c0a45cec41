"""Classification on features, and what lies under all evaluation: pictures, crops, intervals, sheets."""

from __future__ import annotations

import csv
import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from cast_fast import cli
from cast_fast.data import dali_loader
from cast_fast.data.saliency_crop import CropRule
from cast_fast.encoder import build_trunk
from cast_fast.errors import UserError
from cast_fast.evaluate import backgrounds, features, figures, finetune, knn, linear_probe, pictures, probe, statistics
from cast_fast.evaluate.weights import load_classifier, load_encoder
from cast_fast.export import save_safetensors

# Statistics


def test_intervals_of_constants_and_of_nothing():
    assert statistics.bootstrap_mean([0.1] * 7) == statistics.Interval(0.1, 0.1, 0.1, 7)
    empty = statistics.bootstrap_mean([])
    assert empty.count == 0 and math.isnan(empty.mean) and empty.to_json()["mean"] is None and empty.text() == "–"
    with pytest.raises(ValueError, match="NaN"):
        statistics.bootstrap_mean([1.0, math.nan])


def test_interval_of_a_share_is_close_to_the_binomial_one():
    values = np.repeat([1.0, 0.0], [120, 280])
    found = statistics.bootstrap_mean(values, seed=1)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert found.mean == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - half, abs=0.006) and found.high == pytest.approx(0.3 + half, abs=0.006)
    assert found == statistics.bootstrap_mean(values, seed=1) != statistics.bootstrap_mean(values, seed=2)


def test_paired_differences_are_narrower_than_unpaired_ones():
    rng = np.random.default_rng(0)
    first = rng.normal(size=200)
    second = first + 0.1 + 0.01 * rng.normal(size=200)
    found = statistics.bootstrap_difference(first, second)
    assert found.mean == pytest.approx(0.1, abs=0.005) and found.high - found.low < 0.01
    with pytest.raises(ValueError, match="shapes"):
        statistics.bootstrap_difference([1, 2], [1, 2, 3])


def test_student_and_sign_test_against_tables():
    assert statistics.student_quantile(0.975, 2) == pytest.approx(4.30265, abs=1e-4)
    assert statistics.student_quantile(0.975, 10) == pytest.approx(2.22814, abs=1e-4)
    found = statistics.student_interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high - found.mean == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    assert math.isnan(statistics.student_interval([1.0]).low)
    assert statistics.sign_test(8, 2) == pytest.approx(0.109375)
    assert statistics.sign_test(0, 0) == 1.0 and statistics.sign_test(5, 5) == 1.0


# Pictures


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**31))
def test_cell_average_is_the_exact_area_average(height, width, rows, columns, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    fine = np.kron(mask.astype(float), np.ones((rows, columns)))
    expected = fine.reshape(rows, height, columns, width).mean(axis=(1, 3))
    assert np.allclose(pictures.cell_average(mask, (rows, columns)), expected, atol=1e-5)


def test_image_and_map_are_cut_alike():
    mask = np.zeros((60, 90), np.uint8)
    mask[20:40, 30:45] = 255
    image = Image.fromarray(np.repeat(mask[:, :, None], 3, axis=2))
    small = np.asarray(Image.fromarray(mask).resize((30, 20), Image.Resampling.NEAREST))
    box = (0.2, 0.25, 0.9, 0.8)
    cut = pictures.cut(image, box, 64)[:, :, 0] > 127
    assert cut.any() and np.array_equal(cut, pictures.cut_map(mask, box, 64))
    assert np.mean(cut != pictures.cut_map(small, box, 64)) < 0.03
    assert pictures.cut_map(np.full((2, 2), 127, np.uint8), (0, 0, 1, 1), 4).sum() == 0


def test_results_go_into_the_first_run_or_beside_the_first_file(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "weights.pth").touch()
    assert pictures.output_folder(None, tmp_path / "run", "probe") == tmp_path / "run" / "probe"
    assert pictures.output_folder(None, tmp_path / "weights.pth", "probe") == tmp_path / "probe"
    assert pictures.output_folder(Path("x"), tmp_path / "run", "probe") == Path("x")
    assert pictures.open_output(tmp_path / "a" / "b", tmp_path, "x").is_dir()
    with pytest.raises(UserError, match=r"--out: cannot write into .*weights\.pth"):
        pictures.open_output(tmp_path / "weights.pth", tmp_path, "x")
    with pytest.raises(UserError, match="--out: cannot write into /proc"):  # a folder that takes no files, even root's
        pictures.open_output(Path("/proc"), tmp_path, "x")


def test_central_box_is_the_usual_one():
    assert pictures.central_box(256, 256) == (1 / 16, 1 / 16, 15 / 16, 15 / 16)
    top, left, bottom, right = pictures.central_box(400, 200)
    assert (bottom - top) * 200 == pytest.approx(175) == pytest.approx((right - left) * 400)


def test_batches_keep_their_order_and_pass_errors_on():
    found = list(pictures.batches(range(10), lambda i: i * i, 4, threads=3))
    assert found == [([0, 1, 2, 3], [0, 1, 4, 9]), ([4, 5, 6, 7], [16, 25, 36, 49]), ([8, 9], [64, 81])]
    assert list(pictures.batches([], str, 4)) == []
    with pytest.raises(ZeroDivisionError):
        list(pictures.batches([1, 0], lambda i: 1 // i, 1))


def test_long_work_is_reported_where_no_terminal_is(monkeypatch, caplog):
    monkeypatch.setattr(pictures, "_LOG_EVERY", 0.0)
    with caplog.at_level("INFO", logger="cast_fast"):
        assert list(pictures.progress([1, 2, 3], "features")) == [1, 2, 3]
        assert list(pictures.progress([1, 2, 3], "")) == [1, 2, 3]
    assert [r.getMessage() for r in caplog.records] == [
        f"features: {n} of 3 ({p} %)" for n, p in ((0, 0), (1, 33), (2, 67))
    ]
    caplog.clear()
    monkeypatch.setattr(pictures, "_LOG_EVERY", 60.0)
    with caplog.at_level("INFO", logger="cast_fast"):
        list(pictures.progress([1, 2, 3], "features"))
    assert not caplog.records


COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def write_dataset(folder: Path, count: int = 30, split: bool = False) -> Path:
    """Noisy pictures in the colour of their class, with maps and labels."""
    rng = np.random.default_rng(3)
    (folder / "images").mkdir(parents=True)
    (folder / "saliency").mkdir()
    rows = ["stem,class,split" if split else "stem,class"]
    for number in range(count):
        name, colour = list(COLOURS.items())[number % 3]
        noise = rng.integers(-25, 26, (40, 56, 3))
        Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(folder / "images" / f"p{number:02d}.png")
        saliency = np.zeros((40, 56), np.uint8)
        saliency[10:30, 10:30] = 255
        Image.fromarray(saliency).save(folder / "saliency" / f"p{number:02d}.png")
        rows.append(f"p{number:02d},{name}" + (f",{'test' if number >= 21 else 'train'}" if split else ""))
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "d", split=True)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("weights")
    paths = []
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        trunk, _ = build_trunk("resnet18")
        paths.append(folder / f"{name}.safetensors")
        save_safetensors(trunk.state_dict(), paths[-1], {"name": name, "arch": "resnet18"})
    return paths[0], paths[1]


def test_shards_and_folders_hold_the_same(dataset, tmp_path):
    for number in range(2):
        with tarfile.open(tmp_path / f"shard-{number}.tar", "w") as archive:
            for path in sorted((dataset / "images").iterdir())[number::2]:
                label = list(COLOURS)[int(path.stem[1:]) % 3]
                members = {
                    "png": path.read_bytes(),
                    "saliency.png": (dataset / "saliency" / path.name).read_bytes(),
                    "cls": label.encode(),
                }
                for suffix, content in members.items():
                    info = tarfile.TarInfo(f"{path.stem}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    shards = pictures.open_pictures(None, None, tmp_path, need_labels=True, need_maps=True)
    folder = pictures.open_pictures(
        dataset / "images", dataset / "saliency", None, labels=dataset / "labels.csv", need_maps=True, need_labels=True
    )
    assert sorted(shards.names) == list(folder.names) and len(shards) == 30
    for i, name in enumerate(folder.names):
        j = list(shards.names).index(name)
        assert shards.labels[j] == folder.labels[i]
        assert np.array_equal(np.asarray(shards.image(j)), np.asarray(folder.image(i)))
        maps = shards.saliency(j), folder.saliency(i)
        assert all(found is not None for found in maps)
        assert np.array_equal(np.asarray(maps[0]), np.asarray(maps[1]))
    assert shards.fingerprint() == pictures.ShardPictures(tmp_path).fingerprint() != folder.fingerprint()
    (tmp_path / "shard-1.tar").write_bytes(b"junk" * 500)
    with pytest.raises(UserError, match=r"shard-1\.tar cannot be read"):
        pictures.ShardPictures(tmp_path)


def test_maps_in_foreign_shards_are_read_for_what_they_are_or_refused(tmp_path):
    salient = np.zeros((4, 6), bool)
    salient[1:3, 2:5] = True
    picture, arrays = io.BytesIO(), {
        "bytes": (255 * salient).astype(np.uint8),
        "flags": salient,
        "shares": salient[:, :, None].astype(np.float16),
        "levels": 255.0 * salient,
        "colours": np.zeros((4, 6, 3), np.uint8),
    }  # fmt: skip
    Image.new("RGB", (6, 4)).save(picture, "PNG")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for key, values in arrays.items():
            stored = io.BytesIO()
            np.save(stored, values)
            image = picture.getvalue() if key != "flags" else b"no image"
            for suffix, content in (("png", image), ("saliency.npy", stored.getvalue())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    opened = pictures.ShardPictures(tmp_path)
    for index, key in enumerate(("bytes", "flags", "shares")):
        found = opened.saliency(index)
        assert opened.names[index] == key and found is not None and found.dtype == np.uint8
        assert np.array_equal(found, 255 * salient)
    for index, message in ((3, "the map of levels .*got float64"), (4, r"the map of colours .*got shape \(4, 6, 3\)")):
        with pytest.raises(UserError, match=message):
            opened.saliency(index)
    with pytest.raises(UserError, match=r"s\.tar: the image of flags cannot be decoded"):
        opened.image(1)


def test_a_map_of_16_bits_is_salient_above_one_half(tmp_path):
    values = np.array([[0, 200, 32639], [32897, 65535, 257 * 127]], np.uint16)
    for suffix, content in (("png", Image.new("RGB", (3, 2))), ("saliency.png", Image.fromarray(values))):
        content.save(tmp_path / f"a.{suffix}", "PNG")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for suffix in ("png", "saliency.png"):
            archive.add(tmp_path / f"a.{suffix}", f"a.{suffix}")
    found = pictures.ShardPictures(tmp_path).saliency(0)
    assert found is not None and np.array_equal(found > 127, [[False, False, False], [True, True, False]])


def kinds_of_pictures() -> dict[str, bytes]:
    """One picture as every kind of file that the loader reads, but not all of them as Pillow would show it."""
    rows, columns = np.mgrid[0:24, 0:32]
    colour = np.stack([8 * columns, 10 * rows, 255 - 8 * columns], axis=-1).astype(np.uint8)
    picture, grey = Image.fromarray(colour), Image.fromarray((257 * (4 * columns + 5 * rows)).astype(np.uint16))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    kinds: dict[str, tuple[Image.Image, str, dict]] = {
        "plain.png": (picture, "PNG", {}),
        "rgb.jpg": (picture, "JPEG", {}),
        "progressive.jpg": (picture, "JPEG", {"progressive": True}),
        "rotated.jpg": (picture, "JPEG", {"exif": rotated}),
        "cmyk.jpg": (picture.convert("CMYK"), "JPEG", {}),
        "grey.jpg": (picture.convert("L"), "JPEG", {}),
        "grey16.png": (grey, "PNG", {}),
        "palette.png": (picture.quantize(16), "PNG", {"transparency": 3}),
        "bits.png": (picture.convert("1"), "PNG", {}),
        "alpha.png": (Image.fromarray(np.dstack([colour, colour[..., 0]])), "PNG", {}),
        "greyalpha.png": (picture.convert("LA"), "PNG", {}),
    }
    contents = {}
    for name, (image, kind, options) in kinds.items():
        file = io.BytesIO()
        image.save(file, kind, **options)
        contents[name] = file.getvalue()
    return contents


@pipeline_def(batch_size=1, num_threads=1, prefetch_queue_depth=1)
def decoding() -> Any:
    recipe = dali_loader.Recipe(
        32, (1, 1), CropRule(), constrained=False, attention=False, colour=False, blur=False, cuda=False, native=False
    )
    return dali_loader.decoded_image(fn.external_source(name="content", dtype=types.UINT8, ndim=1), recipe)


def test_pictures_are_what_the_loader_decodes(tmp_path):
    define: Any = decoding
    pipeline = define(device_id=None)
    contents = kinds_of_pictures()
    (tmp_path / "images").mkdir()
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, content in contents.items():
            (tmp_path / "images" / name).write_bytes(content)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    folder = pictures.open_pictures(tmp_path / "images", None, None)
    shards = pictures.open_pictures(None, None, tmp_path)
    assert len(folder) == len(shards) == len(contents)
    for opened in (folder, shards):
        for index, stem in enumerate(opened.names):
            name = next(name for name in contents if name.startswith(f"{stem}."))
            (decoded,) = pipeline.run(content=[np.frombuffer(contents[name], np.uint8)])
            found = np.asarray(opened.image(index)).astype(int)
            # two builds of libjpeg may round differently
            assert np.abs(found - np.array(decoded.as_tensor())[0]).max() <= 2, name
            assert np.array_equal(found, backgrounds.read_image(tmp_path / "images" / name)), name


# Sheets


def test_tiles_of_a_sheet_are_the_arrays():
    rng = np.random.default_rng(0)
    tiles = [rng.integers(0, 256, (48, 48, 3), dtype=np.uint8) for _ in range(6)]
    sheet = figures.Sheet(
        ["a", "a long heading that has to wrap", "c"],
        tile=(48, 48),
        title="title",
        note="note " * 60,
        groups=[("", 1), ("group", 2)],
        legend=[figures.HeatBar(), figures.Swatch(figures.OUTLINE, "outline")],
    )
    sheet.add_row(tiles[:3], label="first row", captions=[figures.Caption("below"), None])
    sheet.add_row([tiles[3], None, tiles[5]], label="second")
    image = np.asarray(sheet.image())
    for row, column, tile in ((0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 0, 3), (1, 2, 5)):
        left, top, right, bottom = sheet.box(row, column)
        assert np.array_equal(image[top:bottom, left:right], tiles[tile])
    left, top, right, bottom = sheet.box(1, 1)
    assert (image[top:bottom, left:right] == 255).all()
    with pytest.raises(ValueError, match="expected one for each of 3 columns"):
        sheet.add_row(tiles[:2])


def test_heat_lies_on_its_picture():
    picture = np.full((77, 77, 3), 100, np.uint8)
    cam = np.zeros((7, 7), np.float32)
    cam[2, 5] = 3.0
    drawn = figures.overlay(picture, cam)
    hot = figures.heat(np.ones((1, 1)))[0, 0].astype(float)
    expected = np.round(figures.HEAT_SHARE * hot + (1 - figures.HEAT_SHARE) * 100)
    brightest = np.unravel_index(drawn.sum(axis=2).argmax(), (77, 77))
    assert brightest == (27, 60)  # the middle of the cell's 11 × 11 pixels
    assert np.abs(drawn[brightest] - expected).max() <= 1
    assert np.array_equal(drawn[:10, :10], figures.overlay(picture, np.zeros((7, 7)))[:10, :10])
    assert np.array_equal(figures.overlay(picture, 1e-20 * cam), drawn)


def test_outlines_enclose_the_mask():
    picture = np.full((20, 20, 3), 100, np.uint8)
    mask = np.zeros((20, 20), bool)
    mask[5:15, 5:15] = True
    drawn = figures.outline(picture, mask)
    assert (drawn[5, 5:15] == figures.OUTLINE).all() and (drawn[4, 5:15] == 0).all()
    assert (drawn[8:12, 8:12] == 100).all() and (drawn[:3] == 100).all()
    assert np.array_equal(figures.outline(picture, np.zeros((20, 20))), picture)
    with pytest.raises(ValueError, match="mask"):
        figures.outline(picture, mask[:5])


def test_text_is_broken_to_fit():
    face = figures.font(14)
    lines = figures.wrap("several words and averyveryverylongword that must be cut", 90, face)
    assert all(face.getlength(line) <= 90 for line in lines) and len(lines) > 3
    assert "".join(lines).replace(" ", "") == "severalwordsandaveryveryverylongwordthatmustbecut"
    assert figures.wrap("demo-moco-linear", 110, face) == ["demo-moco-", "linear"]
    assert figures.wrap("a-verylongword", 60, face)[0] != "a-"  # a break so early would leave the line empty


# k nearest neighbours and linear classification


def test_knn_by_hand():
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 2.0]])
    labels = torch.tensor([0, 1, 1])
    test = torch.tensor([[3.0, 0.0]])
    one = knn.knn_scores(train, labels, test, 2, k=1)
    assert one.tolist() == [[1.0, 0.0]]
    three = knn.knn_scores(train, labels, test, 2, k=3, temperature=0.5)
    assert three[0].tolist() == pytest.approx([1.0, math.exp(-0.2 / 0.5) + math.exp(-1 / 0.5)])
    assert knn.knn_scores(train, labels, test, 2, k=50, temperature=1e-3).isfinite().all()


def test_classifiers_are_the_same_on_every_device(device):
    generator = torch.Generator().manual_seed(2)
    x, labels = torch.randn(60, 7, generator=generator), torch.arange(60) % 3
    here = linear_probe.fit_linear(x, labels, 3, 0.1, epochs=5)
    there = linear_probe.fit_linear(x.to(device), labels.to(device), 3, 0.1, epochs=5)
    assert torch.allclose(here(x), there.cpu()(x), atol=1e-3)
    votes = knn.knn_scores(x.to(device), labels.to(device), x.to(device), 3, k=5)
    assert torch.allclose(votes.cpu(), knn.knn_scores(x, labels, x, 3, k=5), atol=1e-3)
    found = linear_probe.sweep(x.to(device), labels.to(device), 3, rates=(0.01, 0.1), epochs=5)
    assert len(found.accuracy) == 2


def test_linear_layers_take_raw_features_and_all_rates_are_independent():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    x = torch.randn(90, 12, generator=generator) * torch.logspace(-2, 2, 12) + 50
    x[:, 0] += 0.03 * labels
    rates = (0.01, 0.1, 1.0)
    layers = linear_probe.train_linear(x, labels, 3, rates, epochs=30)
    for index, rate in enumerate(rates):
        alone = linear_probe.fit_linear(x, labels, 3, rate, epochs=30)
        assert torch.allclose(alone.weight, layers[index].weight, atol=1e-4, rtol=1e-3)
    accuracy = [(layer(x).argmax(1) == labels).float().mean().item() for layer in layers]
    assert max(accuracy) > 0.9


def test_linear_gradient_is_that_of_cross_entropy():
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(40, 5, generator=generator), torch.arange(40) % 4
    layer = linear_probe.train_linear(x, labels, 4, [0.1], epochs=1)[0]  # a single step from zero
    z = ((x - x.mean(0)) / x.std(0, correction=0)).requires_grad_()
    weight, bias = torch.zeros(4, 5, requires_grad=True), torch.zeros(4, requires_grad=True)
    torch.nn.functional.cross_entropy(z @ weight.T + bias, labels).backward()
    assert weight.grad is not None and bias.grad is not None
    expected = z.detach() @ (-0.1 * weight.grad).T - 0.1 * bias.grad
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_hold_out_is_stratified_and_leaves_every_class_something():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    held = linear_probe.hold_out(labels, 0.2, seed=0)
    assert [int(held[labels == c].sum()) for c in range(4)] == [10, 2, 1, 0]
    assert torch.equal(held, linear_probe.hold_out(labels, 0.2, seed=0))


def test_the_smallest_of_equal_rates_is_taken():
    assert linear_probe.Sweep((0.1, 1.0, 10.0), (0.5, 0.7, 0.7)).best == 1.0
    assert linear_probe.Sweep((0.1, 1.0, 10.0), (0.9, 0.7, 0.7)).at_edge


def test_division_follows_the_column_or_the_share():
    labels = torch.arange(20) % 2
    split = ["train"] * 15 + ["test"] * 5
    assert probe.divide(labels, split, 0.3, 0) == (list(range(15)), list(range(15, 20)))
    training, test = probe.divide(labels, [None] * 20, 0.3, 0)
    assert len(test) == 6 and not set(training) & set(test)
    with pytest.raises(UserError, match="15 of 20"):
        probe.divide(labels, ["train"] * 15 + [None] * 5, 0.3, 0)
    with pytest.raises(UserError, match="0 test"):
        probe.divide(labels, ["train"] * 20, 0.3, 0)


def test_accuracy_by_hand():
    scores = torch.tensor([[3.0, 1, 2], [0, 5, 1], [1, 0, 2], [9, 1, 1]])
    found = probe.accuracy(scores, torch.tensor([0, 1, 1, 1]), resamples=100, seed=0)
    assert found["top1"]["mean"] == 0.5 and found["by_class"] == {0: 1.0, 1: pytest.approx(1 / 3)}
    assert found["class_mean"] == pytest.approx(2 / 3) and "top5" not in found


def test_equal_scores_mean_the_first_class_everywhere():
    torch.manual_seed(0)
    for classes in (3, 40, 400):  # sorting is stable by itself for a few classes only
        scores = torch.randint(0, 3, (50, classes)).float()
        truth = scores.argmax(dim=1)
        assert probe.accuracy(scores, truth, resamples=10, seed=0)["top1"]["mean"] == 1


def test_classes_without_training_pictures_are_named(dataset, encoders, tmp_path, caplog):
    rows = (dataset / "labels.csv").read_text().splitlines()
    moved = [row.replace("green,train", "green,test") for row in rows]
    (tmp_path / "labels.csv").write_text("\n".join(moved) + "\n")
    flags = ["--images", dataset / "images", "--labels", tmp_path / "labels.csv", "--out", tmp_path / "out"]
    flags += ["--size", 32, "--epochs", 1, "--resamples", 10, "--no-cache"]
    assert cli.main(["probe", str(encoders[0]), *map(str, flags)]) == 0
    assert "no training picture of green: its test pictures can only count as wrong" in caplog.text
    assert probe.untrained(torch.tensor([0, 1, 2, 0, 2]), [0, 1], [2, 3, 4]) == [2]


def test_random_views_stay_inside_and_repeat(dataset):
    rng = np.random.default_rng(0)
    for width, height in ((100, 50), (50, 100), (64, 64), (1000, 10)):
        for _ in range(20):
            top, left, bottom, right = finetune.random_box(width, height, rng)
            assert 0 <= top < bottom <= 1 + 1e-9 and 0 <= left < right <= 1 + 1e-9
    opened = pictures.open_pictures(dataset / "images", None, None)
    first, again = (finetune.random_view(opened, 3, 32, (0, 1)) for _ in range(2))
    assert np.array_equal(first, again) and not np.array_equal(first, finetune.random_view(opened, 3, 32, (0, 2)))


# The command


def test_features_are_kept_and_recomputed_when_something_changes(dataset, encoders, tmp_path):
    opened = pictures.open_pictures(dataset / "images", None, None)
    model = load_encoder(encoders[0])
    arguments = {"size": 32, "batch": 8, "device": torch.device("cpu"), "cache": tmp_path}
    first = features.extract(model, opened, **arguments)
    expected = model.features(features.central_images(opened, [4], 32))
    assert torch.allclose(first[4:5], expected, atol=1e-5)
    (kept,) = tmp_path.iterdir()
    time = kept.stat().st_mtime_ns
    assert torch.equal(features.extract(model, opened, **arguments), first) and kept.stat().st_mtime_ns == time
    features.extract(load_encoder(encoders[1]), opened, **arguments)
    assert len(list(tmp_path.iterdir())) == 2
    other = load_encoder(encoders[0])
    other.mean = (0.5, 0.5, 0.5)
    assert not torch.allclose(features.extract(other, opened, **arguments), first)
    kept.write_bytes(b"damaged")
    assert torch.equal(features.extract(model, opened, **arguments), first)


def test_command_line_with_two_encoders_and_finetuning(dataset, encoders, tmp_path, capsys):
    flags = ["--images", dataset / "images", "--labels", dataset / "labels.csv", "--out", tmp_path / "out"]
    flags += ["--size", 32, "--epochs", 20, "--resamples", 100, "--no-cache", "--finetune", "--finetune-lrs", 0.01]
    flags += ["--finetune-epochs", 2, "--finetune-batch", 8]
    assert cli.main(["probe", *map(str, encoders), *map(str, flags)]) == 0
    result = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert result["classes"] == ["blue", "green", "red"]
    assert (result["training_pictures"], result["test_pictures"]) == (21, 9)
    assert set(result["differences"]) == {"second - first"}
    with (tmp_path / "out" / "probe.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["stem"] for row in rows] == [f"p{n}" for n in range(21, 30)]
    for name in ("first", "second"):
        found = result["models"][name]
        for method in ("knn", "linear", "finetune"):
            right = np.mean([row["class"] == row[f"{name}: {method}"] for row in rows])
            assert found[method]["top1"]["mean"] == pytest.approx(right)
        assert found["linear"]["top1"]["mean"] == 1.0 and len(found["linear"]["held_out_accuracy"]) == 8
        model = load_classifier(tmp_path / "out" / name / "linear.safetensors")
        assert model.classes is not None
        assert model.classes == ("blue", "green", "red") and model.size == 32
        opened = pictures.open_pictures(dataset / "images", None, None)
        said = model.scores(features.central_images(opened, list(range(21, 30)), 32)).argmax(1)
        assert [model.classes[i] for i in said] == [row[f"{name}: linear"] for row in rows]
        assert load_classifier(tmp_path / "out" / name / "finetune.safetensors").classes == model.classes
    assert "second - first" in capsys.readouterr().out


def test_the_first_weights_are_left_alone_by_finetuning(dataset, encoders):
    model = load_encoder(encoders[0])
    before = {name: value.clone() for name, value in model.trunk.state_dict().items()}
    opened = pictures.open_pictures(dataset / "images", None, None, labels=dataset / "labels.csv")
    _, labels = probe.class_numbers(opened)
    schedule = finetune.Schedule(epochs=1, batch=8, size=32)
    trained = finetune.finetune(model, opened, list(range(16)), labels, 3, 0.01, schedule, torch.device("cpu"))
    assert all(torch.equal(value, before[name]) for name, value in model.trunk.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in trained.trunk.state_dict().items())
    assert model.classifier is None and not trained.trunk.training


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels", "LABELS"], "no dataset"),
        (["--images", "IMAGES"], "--labels is missing"),
        (["--images", "IMAGES", "--labels", "LABELS", "--test-share", "1"], "--test-share"),
        (["--images", "IMAGES", "--labels", "LABELS", "--size", "8"], "--size"),
        (["--images", "IMAGES", "--labels", "LABELS", "--seed", "-1"], "--seed: got -1"),
        (["--images", "IMAGES", "--labels", "LABELS", "--lrs", "0"], "--lrs"),
        (["--images", "IMAGES", "--labels", "nowhere.csv"], "nowhere.csv"),
        (["--images", "IMAGES", "--data", "IMAGES", "--labels", "LABELS"], "both layouts"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], message, dataset, encoders, tmp_path, capsys):
    names: dict[str, str] = {"IMAGES": str(dataset / "images"), "LABELS": str(dataset / "labels.csv")}
    filled = [names.get(flag, flag) for flag in flags]
    code = cli.main(
        [
            "probe",
            str(encoders[0]),
            "--out",
            str(tmp_path),
            "--no-cache",
            *filled,
        ]
    )
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and message in error[-1] and "error" in error[-1]
