"""Made scenes: exact maps, repeatability, chosen correlation, resumable and careful writing."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from full_disk import full_disk
from killed import environment, killed_at_rename
from PIL import Image

from cast_fast import cli
from cast_fast.data import synthetic
from cast_fast.data.layout import scan
from cast_fast.data.synthetic import OWN_BACKGROUND, identity, make_scene, write_dataset
from cast_fast.data.synthetic_backgrounds import BACKGROUNDS
from cast_fast.data.synthetic_objects import CLASSES, Pose, Sprite
from cast_fast.errors import UserError
from cast_fast.files import exclusive

SMALL = (160, 120)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".cast-fast.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def square(top: int, left: int, side: int, main: bool, alpha: float = 1.0) -> synthetic._Layer:
    colour = np.full((side, side, 3), 0.5, np.float32)
    return synthetic._Layer(Sprite(colour, np.full((side, side), alpha, np.float32), top, left), main)


def test_coverage_is_what_is_left_of_the_main_objects() -> None:
    layers = [
        square(0, 0, 6, main=False),
        square(2, 2, 6, main=True),
        square(4, 4, 2, main=False),  # a hole in the middle of the first
        square(6, 6, 4, main=True),
        square(-3, 6, 6, main=False, alpha=0.25),  # reaches over the upper rim, covers a quarter
        square(20, 20, 3, main=True),  # outside the picture
    ]
    expected = np.zeros((10, 12), np.float32)
    expected[2:8, 2:8] = 1
    expected[4:6, 4:6] = 0
    expected[6:10, 6:10] = 1
    expected[0:3, 6:12] *= 0.75
    np.testing.assert_array_equal(synthetic._main_coverage(layers, 10, 12), expected)


@pytest.mark.parametrize("index", range(8))
def test_map_holds_exactly_what_is_seen_of_the_main_objects(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paints the main objects black, then white: what changes in the composed picture is what one sees of them."""
    monkeypatch.setattr(synthetic, "_SHADOW", 0.0)  # later shadows would darken the change
    width, height = 320, 240
    label, _ = identity(7, index, 1.0)
    layers, light = synthetic._draw_layers(synthetic._stream(7, index, synthetic._OBJECTS), label, width, height)
    assert {True, False} == {layer.main for layer in layers}
    scenery = np.full((height, width, 3), 0.5, np.float32)

    def painted(value: float) -> np.ndarray:
        recoloured = [
            synthetic._Layer(layer.sprite._replace(colour=np.full_like(layer.sprite.colour, value)), True)
            if layer.main
            else layer
            for layer in layers
        ]
        return synthetic._compose(scenery, recoloured, light)[..., 0]

    ambience = 0.72 + 0.45 * 0.5
    seen = (painted(1.0) - painted(0.0)) / ambience
    decided = np.abs(seen - 0.5) > 1e-3
    saliency = make_scene(7, index, 1.0, (width, height)).saliency
    assert decided.mean() > 0.99
    assert np.array_equal((saliency == 255)[decided], (seen >= 0.5)[decided])


def test_too_much_cover_is_moved_behind_the_main_object() -> None:
    layers = [square(0, 0, 8, main=True), square(0, 0, 7, main=False)]
    moved = synthetic._uncover_main(layers, 10, 10)
    assert [layer.main for layer in moved] == [False, True]
    light_cover = [square(0, 0, 8, main=True), square(0, 0, 2, main=False)]
    assert synthetic._uncover_main(light_cover, 10, 10) is light_cover


def test_scenes_have_a_visible_main_object_and_smaller_others() -> None:
    shares = []
    for index in range(24):
        scene = make_scene(1, index, 0.5, SMALL)
        assert scene.image.shape == (120, 160, 3) and scene.image.dtype == np.uint8
        assert scene.saliency.shape == (120, 160) and scene.saliency.dtype == np.uint8
        assert set(np.unique(scene.saliency)) == {0, 255}
        assert scene.image.std() > 10
        shares.append((scene.saliency == 255).mean())
    assert min(shares) > 0.015 and max(shares) < 0.7
    for index in range(200):
        placed = synthetic._arrange(np.random.default_rng(index), "fish", 640, 480)
        mains = [p for p in placed if p.main]
        assert 1 <= len(mains) <= 2 and all(p.name == "fish" for p in mains)
        others = [p for p in placed if not p.main]
        assert len(others) >= 2 and all(p.name != "fish" for p in others)
        assert max(p.pose.radius for p in others) < 0.6 * min(p.pose.radius for p in mains)


def test_a_scene_varies_in_size_unless_told() -> None:
    sizes = {make_scene(0, index, 1.0).saliency.shape for index in (0, 1, 4, 7)}
    assert len(sizes) > 1
    assert all((w, h) in synthetic.SIZES for h, w in sizes)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_draws_at_any_size_and_pose(name: str) -> None:
    light = np.array([0.0, -0.6, 0.8], np.float32)
    for radius, turn, mirror in ((8.0, 0.3, False), (90.0, -2.0, True)):
        sprite = synthetic.draw_object(name, Pose(50, 40, radius, turn, mirror), light, np.random.default_rng(3))
        assert sprite.colour.shape == (*sprite.alpha.shape, 3)
        assert np.isfinite(sprite.colour).all() and sprite.colour.min() >= 0 and sprite.colour.max() <= 1
        covered = sprite.alpha.sum() / (np.pi * radius * radius)
        assert 0.2 < covered < 1.1
        assert not sprite.alpha[0].any() and not sprite.alpha[:, -1].any()  # nothing is cut off at the rim


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_every_background_draws_at_any_size(name: str) -> None:
    for height, width in ((64, 64), (200, 90)):
        picture = synthetic.draw_background(name, np.random.default_rng(5), height, width)
        assert picture.shape == (height, width, 3) and picture.dtype == np.float32
        assert np.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1
        assert picture.std() > 0.02


def test_classes_are_balanced_and_backgrounds_follow_the_correlation() -> None:
    labels = [identity(3, index, 0.5)[0] for index in range(60)]
    assert all(labels.count(name) == 5 for name in CLASSES)
    assert sorted(OWN_BACKGROUND) == list(CLASSES) and sorted(OWN_BACKGROUND.values()) == list(BACKGROUNDS)

    def own_share(correlation: float) -> float:
        pairs = [identity(3, index, correlation) for index in range(1200)]
        return float(np.mean([OWN_BACKGROUND[label] == background for label, background in pairs]))

    assert own_share(1.0) == 1.0
    for correlation in (0.0, 0.5):
        expected = correlation + (1 - correlation) / len(BACKGROUNDS)
        deviation = np.sqrt(expected * (1 - expected) / 1200)
        assert abs(own_share(correlation) - expected) < 4 * deviation


def test_correlation_changes_nothing_but_the_background() -> None:
    index = next(i for i in range(50) if identity(0, i, 0.0)[1] != identity(0, i, 1.0)[1])
    free, bound = make_scene(0, index, 0.0, SMALL), make_scene(0, index, 1.0, SMALL)
    assert free.label == bound.label and free.background != bound.background
    assert np.array_equal(free.saliency, bound.saliency)
    assert not np.array_equal(free.image, bound.image)


def test_seed_and_index_make_different_scenes() -> None:
    first = make_scene(0, 0, 1.0, SMALL)
    assert np.array_equal(first.image, make_scene(0, 0, 1.0, SMALL).image)
    assert not np.array_equal(first.image, make_scene(1, 0, 1.0, SMALL).image)
    assert not np.array_equal(first.saliency, make_scene(0, 12, 1.0, SMALL).saliency)


def test_bytes_depend_on_neither_workers_nor_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "one", 6, seed=5, size=SMALL, workers=1)
    monkeypatch.setattr(synthetic, "_FEW", 1)
    write_dataset(tmp_path / "two", 6, seed=5, size=SMALL, workers=2)
    write_dataset(tmp_path / "grown", 2, seed=5, size=SMALL, workers=1)
    write_dataset(tmp_path / "grown", 6, seed=5, size=SMALL, workers=1)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two") == contents(tmp_path / "grown")
    assert len(one) == 6 * 2 + 3


def test_written_files_follow_the_contract(tmp_path: Path) -> None:
    out = write_dataset(tmp_path / "made", 3, seed=2, correlation=1.0, workers=1)
    with (out / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["stem"] for row in rows] == ["scene_000000", "scene_000001", "scene_000002"]
    for index, row in enumerate(rows):
        assert (row["class"], row["background"]) == identity(2, index, 1.0)
        scene = make_scene(2, index, 1.0)
        with Image.open(out / "images" / f"{row['stem']}.jpg") as image:
            assert image.format == "JPEG" and image.mode == "RGB"
            error = np.abs(np.asarray(image).astype(float) - scene.image).mean()
            assert error < 6  # JPEG at high quality of the same scene
        with Image.open(out / "saliency" / f"{row['stem']}.png") as saliency:
            assert saliency.mode == "L"
            assert np.array_equal(np.asarray(saliency), scene.saliency)
    with Image.open(out / "preview.jpg") as preview:
        assert preview.width > preview.height


def test_an_interrupted_folder_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_dataset(tmp_path / "made", 4, seed=9, size=SMALL, workers=1)
    whole = contents(out)
    (out / "images" / "scene_000002.jpg").unlink()
    (out / "saliency" / "scene_000001.png").unlink()
    (out / "labels.csv").unlink()
    drawn: list[int] = []
    draw = make_scene

    def counted(seed: int, index: int, correlation: float, size: tuple[int, int] | None = None) -> synthetic.Scene:
        drawn.append(index)
        return draw(seed, index, correlation, size)

    monkeypatch.setattr(synthetic, "make_scene", counted)
    write_dataset(out, 4, seed=9, size=SMALL, workers=1)
    assert drawn == [1, 2]
    assert contents(out) == whole


def test_a_full_disk_leaves_no_partial_file(tmp_path: Path) -> None:
    out = write_dataset(tmp_path / "made", 1, seed=0, size=SMALL, workers=1)
    before = contents(out)
    whole = contents(write_dataset(tmp_path / "whole", 2, seed=0, size=SMALL, workers=1))
    with full_disk(1000), pytest.raises(UserError, match=f"cannot write {out}: File too large"):
        write_dataset(out, 2, seed=0, size=SMALL, workers=1)  # there is room for the record and a map, not for a scene
    after = contents(out)
    assert after == {**before, **{name: whole[name] for name in ("demo.json", "saliency/scene_000001.png")}}
    assert contents(write_dataset(out, 2, seed=0, size=SMALL, workers=1)) == whole


def test_foreign_and_different_folders_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        write_dataset(foreign, 1, seed=0, workers=1)
    assert contents(foreign) == {"notes.txt": b"mine"}
    with pytest.raises(UserError, match="is not a folder"):
        write_dataset(foreign / "notes.txt", 1, seed=0, workers=1)

    made = write_dataset(tmp_path / "made", 2, seed=0, size=SMALL, workers=1)
    before = contents(made)
    with pytest.raises(UserError, match="seed 0, expected 1"):
        write_dataset(made, 2, seed=1, size=SMALL, workers=1)
    with pytest.raises(UserError, match=r"correlation 0\.8, expected 0\.1"):
        write_dataset(made, 2, seed=0, size=SMALL, correlation=0.1, workers=1)
    with pytest.raises(UserError, match="size"):
        write_dataset(made, 2, seed=0, workers=1)
    with pytest.raises(UserError, match="already holds 2 scenes"):
        write_dataset(made, 1, seed=0, size=SMALL, workers=1)
    assert contents(made) == before
    for content in ("{", "[]", '{"count": "2"}', '{"count": 1e999}', "[" * 100_000):
        (made / "demo.json").write_text(content)
        with pytest.raises(UserError, match=r"demo\.json is damaged"):
            write_dataset(made, 2, seed=0, size=SMALL, workers=1)


def test_a_killed_call_is_completed_by_the_next(tmp_path: Path) -> None:
    """SIGKILL in place of each rename, the record's among them."""
    whole = contents(write_dataset(tmp_path / "whole", 2, seed=0, size=SMALL, workers=1))
    for number in range(1, 20):
        out = tmp_path / str(number)
        if not killed_at_rename(number, "demo-data", out, "--count", 2, "--size", "160x120", "--workers", 1):
            break
        assert len(list(out.rglob(".cast-fast-*.part"))) == 1
        assert contents(write_dataset(out, 2, seed=0, size=SMALL, workers=1)) == whole
    assert number == 8  # the record, two maps and images, the labels and the preview


def test_two_calls_do_not_write_one_folder(tmp_path: Path) -> None:
    made = write_dataset(tmp_path / "made", 1, seed=0, size=SMALL, workers=1)
    before = contents(made)
    command = [sys.executable, "-m", "cast_fast", "demo-data", made, "--count", "2", "--size", "160x120"]
    with exclusive(made / ".cast-fast.lock", "this test"):
        result = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert result.returncode == 2 and "in use by another cast-fast demo-data (process" in result.stderr
    assert contents(made) == before


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    """Also where the terminal takes UTF-8 alone."""
    out = tmp_path / "a\nb\udcff"
    command = [sys.executable, "-m", "cast_fast", "demo-data", out, "--count", "1", "--size", "160x120"]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**environment(), "PYTHONIOENCODING": "utf-8:strict"}
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1 and r"a\nb\udcff/images" in result.stdout


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"count": 0}, "--count"),
        ({"seed": -1}, "--seed"),
        ({"correlation": 1.5}, "--correlation"),
        ({"correlation": float("nan")}, "--correlation"),
        ({"size": (20, 480)}, "--size"),
        ({"workers": 0}, "--workers"),
    ],
)
def test_bad_settings_name_their_flag(tmp_path: Path, change: dict[str, float], flag: str) -> None:
    settings: dict = {"count": 1, "seed": 0, **change}
    with pytest.raises(UserError, match=flag):
        write_dataset(tmp_path / "made", **settings)
    assert not (tmp_path / "made").exists()


def test_make_scene_refuses_what_it_cannot_draw() -> None:
    for arguments in ((-1, 0, 0.5, None), (0, -1, 0.5, None), (0, 0, -0.1, None), (0, 0, 0.5, (8, 480))):
        with pytest.raises(ValueError, match="got"):
            make_scene(*arguments)


def test_command_line_writes_a_valid_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made"
    assert cli.main(["demo-data", str(out), "--count", "2", "--size", "128x96", "--workers", "1"]) == 0
    assert "2 scenes" in capsys.readouterr().out
    dataset = scan(out / "images", out / "saliency", labels=out / "labels.csv", manifest=tmp_path / "m.json", workers=1)
    assert [(s.stem, s.width, s.height, s.empty) for s in dataset.samples] == [
        ("scene_000000", 128, 96, False),
        ("scene_000001", 128, 96, False),
    ]
    assert [s.label for s in dataset.samples] == [identity(0, i, synthetic.DEFAULT_CORRELATION)[0] for i in range(2)]
    assert not dataset.faults

    assert cli.main(["demo-data", str(out), "--count", "2", "--seed", "4"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "seed" in error
    with pytest.raises(SystemExit) as refused:
        cli.main(["demo-data", str(out), "--count", "2", "--size", "wide"])
    assert refused.value.code == 2
