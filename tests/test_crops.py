"""``cast-fast crops``: what it measures against counting by hand, what it draws, both layouts, users' mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cast_fast import cli
from cast_fast.data.pack_sample import PackRule
from cast_fast.data.prepare import prepare
from cast_fast.data.saliency_crop import CropRule, Windows
from cast_fast.evaluate import crops
from cast_fast.evaluate.crops import KEY, QUERY, TILE, Tally, choose, draw, measure, shared_salient, window_pairs
from cast_fast.evaluate.pictures import FolderPictures, Pictures, ShardPictures, open_pictures


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures with a small object in a corner, one with an empty map, one whose map is missing."""
    root = tmp_path_factory.mktemp("crops")
    for folder in ("images", "saliency"):
        (root / folder).mkdir()
    rng = np.random.default_rng(1)
    for number in range(10):
        mask = np.zeros((90, 120), np.uint8)
        if number != 8:
            mask[5:25, 5 + number : 30 + number] = 255
        image = rng.integers(60, 120, (90, 120, 3), dtype=np.uint8)
        image[mask > 0] = (250, 250, 20)
        Image.fromarray(image).save(root / "images" / f"p{number}.jpg", quality=95)
        if number != 9:
            Image.fromarray(mask).save(root / "saliency" / f"p{number}.png")
    return root


@pytest.fixture(scope="module")
def pictures(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return open_pictures(root / "images", root / "saliency", None, need_maps=True)


def windows(query: list[int], key: list[int]) -> Windows:
    return Windows(np.array(query, np.int32), np.array(key, np.int32), np.array([False, True]), np.zeros(2))


def test_the_shared_part_is_what_lies_in_both_windows() -> None:
    saliency = np.zeros((10, 12), np.uint8)
    saliency[2:6, 3:9] = 128  # 24 pixels
    saliency[9, 11] = 127
    assert shared_salient(saliency, windows([0, 0, 10, 6], [3, 2, 7, 10])) == 3 * 3 / 24
    assert shared_salient(saliency, windows([0, 0, 10, 6], [0, 6, 10, 6])) == 0
    assert shared_salient(saliency, windows([0, 0, 10, 12], [0, 0, 10, 12])) == 1
    tally = Tally()
    tally.add(saliency, windows([0, 0, 10, 6], [3, 2, 7, 10]))
    tally.add(saliency, windows([0, 0, 10, 6], [0, 6, 10, 6]))
    assert (tally.sharing, tally.shared, tally.fallbacks) == ([True, False], [9 / 24, 0], 2)


def test_constrained_pairs_always_share_and_others_do_not(pictures: Pictures) -> None:
    """A small object in a corner is out of many plain crops."""
    assert len(pictures) == 8
    constrained, unconstrained = measure(pictures, range(8), CropRule(), pairs=20, seed=0)
    assert len(constrained.sharing) == 160 and all(constrained.sharing)
    assert 0.2 < np.mean(unconstrained.sharing) < 0.8
    assert np.mean(constrained.shared) > np.mean(unconstrained.shared)


def test_numbers_depend_on_the_seed_alone(pictures: Pictures) -> None:
    def shared(indices: list[int], seed: int = 4) -> list[float]:
        return measure(pictures, indices, CropRule(), pairs=3, seed=seed)[1].shared

    one = shared([2, 5])
    assert one == shared([2]) + shared([5])
    assert one != shared([2, 5], seed=5)


def test_every_pair_of_every_picture_has_its_own_random_numbers() -> None:
    saliency = np.zeros((300, 400), np.uint8)
    saliency[100:200, 150:250] = 255
    found = [crops.window_pairs(saliency, index, CropRule(), pairs=2, seed=3) for index in range(3)]
    windows = {(*w.query.tolist(), *w.key.tolist()) for pairs in found for both in pairs for w in both}
    assert len(windows) == 3 * 2 * 2


def test_rows_are_random_pictures_and_those_that_share_least() -> None:
    tally = Tally(shared=[0.5, 0.4, 0.3, 0.0, 0.9, 0.8, 0.1, 0.7])
    found = [(e.index, e.pair, e.reason) for e in choose([7, 3, 5, 1], tally, 3, pairs=2)]
    assert found == [(7, 0, "at random"), (3, 0, "at random"), (1, 0, "least shared")]
    assert [e.index for e in choose([7, 3, 5, 1], tally, 9, pairs=2)] == [7, 3, 5, 1]


def test_the_sheet_shows_the_windows_and_what_they_cut_out(pictures: Pictures) -> None:
    rule = CropRule()
    examples = [crops.Example(3, 1, "at random")]
    sheet = draw(pictures, examples, rule, pairs=2, seed=0, note="")
    drawn = np.asarray(sheet.image())
    saliency = pictures.saliency(3)
    assert saliency is not None
    pair = window_pairs(saliency, 3, rule, pairs=2, seed=0)[1]
    scale = min(TILE[0] / 90, TILE[1] / 120)
    for first, found in zip((0, 4), pair, strict=True):
        for column in (first, first + 1):
            left, top, right, bottom = sheet.box(0, column)
            tile = drawn[top:bottom, left:right]
            for (y, x, h, w), colour in ((found.query.tolist(), QUERY), (found.key.tolist(), KEY)):
                marked = np.argwhere((tile == colour).all(axis=2))
                low, high = marked.min(axis=0), marked.max(axis=0)
                margin = (TILE[1] - 120 * scale) / 2
                expected = np.array([y, x + margin / scale, y + h, x + w + margin / scale]) * scale
                assert np.abs(np.concatenate([low, high + 1]) - expected).max() <= 2
        for column, box in ((first + 2, found.query), (first + 3, found.key)):
            left, top, right, bottom = sheet.box(0, column)
            crop = drawn[top:bottom, left + 25 : right - 25]  # 150 of 200 pixels
            yellow = (crop[..., 2] < 60) & (crop[..., 0] > 200)
            y, x, h, w = box.tolist()
            share = (saliency[y : y + h, x : x + w] > 127).mean()
            assert abs(yellow.mean() - share) < 0.05


@pytest.mark.parametrize("layout", ["folder", "shards", "foreign shards"])
def test_the_command_measures_and_draws_either_layout(
    layout: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = ["--images", str(root / "images"), "--saliency", str(root / "saliency")]
    if layout != "folder":
        rule = PackRule(map_side=60, map_format="npy")
        prepare(root / "images", root / "saliency", tmp_path / "shards", rule=rule, workers=1)
        source = ["--data", str(tmp_path / "shards")]
    if layout == "foreign shards":
        (tmp_path / "shards" / "manifest.json").unlink()
    out = tmp_path / "deeper" / "crops.png"
    assert cli.main(["crops", *source, "--out", str(out), "--count", "2", "--pairs", "5", "--measure", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second = (line for line in lines if "share salient pixels" in line)
    assert first.startswith("constrained (overlap, phi 0.2): 100.0% of 30 pairs share salient pixels")
    found = re.match(r"unconstrained: ([\d.]+)% of 30 pairs", second)
    assert found and 0 < float(found[1]) < 90
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width > 8 * TILE[1]


def test_pictures_of_shards_with_an_index_keep_stems_and_class_names(root: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("stem,class\np1,zebra\np2,ape\n")
    for kind in ("npy", "jpeg"):
        rule = PackRule(map_side=60, map_format=kind)
        prepare(root / "images", root / "saliency", tmp_path / kind, rule=rule, labels=labels, workers=1)
        pictures = open_pictures(None, None, tmp_path / kind, need_labels=True)
        assert (list(pictures.names), list(pictures.labels)) == (["p1", "p2"], ["zebra", "ape"])
        saliency = pictures.saliency(0)
        assert saliency is not None and saliency.shape == (45, 60) and (saliency > 127).any()
        whole = open_pictures(None, None, tmp_path / kind)
        assert isinstance(whole, FolderPictures) and whole.image(0).size == (120, 90)
        assert len(whole.fingerprint()) == 64
    assert json.loads((tmp_path / "npy" / "manifest.json").read_text())["classes"] == ["ape", "zebra"]
    (tmp_path / "npy" / "manifest.json").unlink()
    assert isinstance(open_pictures(None, None, tmp_path / "npy"), ShardPictures)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out", "crops.jpg"], "expected a file name that ends in .png"),
        (["--out", "{root}/images/p0.jpg/x.png"], "--out: cannot write"),
        (["--count", "0"], "expected at least 1"),
        (["--phi", "2"], "--phi: got 2.0"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--pair-constraint", "both"], "invalid choice"),
        (["--data", "{root}"], "expected one dataset, got both layouts"),
    ],
)
def test_a_users_mistake_is_one_line(
    flags: list[str],
    words: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = ["--images", str(root / "images"), "--saliency", str(root / "saliency"), "--out", str(tmp_path / "x.png")]
    try:
        code = cli.main(["crops", *source, *(flag.format(root=root) for flag in flags)])
    except SystemExit as stop:
        code = stop.code
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert code == 2 and len(error) == 1 and words in error[0]
