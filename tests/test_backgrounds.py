"""The Backgrounds Challenge on hand-made sets: what is pasted where, who is right, and what the numbers are."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cast_fast import cli
from cast_fast.encoder import Encoder, build_trunk
from cast_fast.errors import UserError
from cast_fast.evaluate import backgrounds, backgrounds_make, figures
from cast_fast.evaluate.backgrounds import Answers, Challenge, Judge, Report, Variant
from cast_fast.evaluate.backgrounds_make import Cutout, draw_backgrounds, square_around, strip_beside, tile_over
from cast_fast.evaluate.weights import IdentityHead, Model, load_classifier
from cast_fast.export import save_safetensors


def channel_model(classes: tuple[str, ...] | None = ("red", "green", "blue")) -> Model:
    """A classifier that names the strongest mean colour channel."""
    trunk = nn.Conv2d(3, 3, 1, bias=False)
    classifier = nn.Linear(3, 3)
    with torch.no_grad():
        trunk.weight.copy_(torch.eye(3)[:, :, None, None] * torch.tensor([0.229, 0.224, 0.225])[:, None, None, None])
        classifier.weight.copy_(torch.eye(3) * 50)
        classifier.bias.copy_(torch.tensor([0.485, 0.456, 0.406]) * 50)
    encoder = Encoder(trunk, IdentityHead()).requires_grad_(False)
    return Model("channels", "none", encoder, None, classifier, classes, 8, {})


def judge(batch: int = 4, device: torch.device | str = "cpu") -> Judge:
    return Judge(channel_model(), np.arange(3), torch.device(device), batch)


def brute_force(foregrounds, masks, labels, scenery) -> np.ndarray:
    """The official loop: inp * (1 - mask) + mask * image, any wrong answer counts."""
    model, vulnerable = channel_model(), []
    for picture, mask, label in zip(foregrounds.float() / 255, masks.float(), labels):
        combined = (scenery.float() / 255) * (1 - mask) + mask * picture
        said = model.scores((combined * 255).round().to(torch.uint8)).argmax(1)
        vulnerable.append(bool((said != label).any()))
    return np.array(vulnerable)


@pytest.fixture
def arena() -> tuple[torch.Tensor, torch.Tensor, np.ndarray, torch.Tensor]:
    """Eleven random foregrounds of very different areas and seven backgrounds."""
    generator = torch.Generator().manual_seed(1)
    labels = np.arange(11) % 3
    foregrounds = torch.randint(0, 90, (11, 3, 8, 8), dtype=torch.uint8, generator=generator)
    foregrounds[torch.arange(11), torch.from_numpy(labels)] += 160
    masks = torch.rand(11, 8, 8, generator=generator) < torch.linspace(0.05, 0.95, 11)[:, None, None]
    scenery = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8, generator=generator)
    scenery[3, 0], scenery[3, 1:] = 255, 0
    return foregrounds, masks, labels, scenery


def fight(referee: Judge, arena, order: np.ndarray) -> Challenge:
    foregrounds, masks, labels, scenery = arena
    return backgrounds.challenge(referee, foregrounds, masks, labels, scenery, order)


@pytest.mark.parametrize("batch", [1, 3, 7, 16, 1000])
def test_challenge_equals_the_official_loop_for_any_batch_and_order(arena, batch, device):
    expected = brute_force(*arena)
    assert 0 < expected.sum() < 11
    for order in (np.arange(7), np.arange(7)[::-1].copy(), np.random.default_rng(0).permutation(7)):
        found = fight(judge(batch, device), arena, order)
        assert np.array_equal(found.vulnerable, expected)
        assert np.array_equal(found.breaker >= 0, expected) and np.array_equal(found.answer > -2, expected)


def test_the_breaker_is_a_background_that_misleads(arena):
    foregrounds, masks, labels, scenery = arena
    found = fight(judge(5), arena, np.arange(7))
    for row in np.flatnonzero(found.vulnerable):
        pasted = torch.where(masks[row], foregrounds[row], scenery[int(found.breaker[row])])
        said = int(channel_model().scores(pasted[None]).argmax())
        assert said == found.answer[row] != labels[row]


def test_early_exit_saves_work_and_standing_foregrounds_meet_every_background(arena):
    found = fight(judge(1), arena, np.arange(7))
    first = {int(row): int(found.breaker[row]) for row in np.flatnonzero(found.vulnerable)}
    assert found.judged == sum(first[row] + 1 if row in first else 7 for row in range(11)) < 11 * 7
    assert fight(judge(1000), arena, np.arange(7)).judged == 11 * 7  # one batch holds everything


def test_classes_outside_the_set_count_as_wrong():
    red = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 200
    outside = Judge(channel_model(), np.array([-1, 0, 1]), torch.device("cpu"), 4)
    assert outside.answers(red).predicted.tolist() == [-1]
    found = backgrounds.challenge(outside, red, torch.ones(1, 8, 8, dtype=torch.bool), np.array([0]), red, np.arange(1))
    assert found.vulnerable.tolist() == [True] and found.answer.tolist() == [-1]


def variant(name: str, labels: list[int], stems: list[str] | None = None) -> Variant:
    classes = ("00_red", "01_green", "02_blue")
    stems = stems or [f"s{i}" for i in range(len(labels))]
    paths = tuple(Path(classes[label]) / f"{stem}.JPEG" for label, stem in zip(labels, stems))
    return Variant(name, paths, np.array(labels), classes)


def answers(predicted: list[int]) -> Answers:
    return Answers(np.array(predicted), np.array(predicted), np.full(len(predicted), 0.5, np.float32))


def test_summary_by_hand():
    labels = [0, 0, 1, 1, 2]
    variants = {name: variant(name, labels) for name in ("original", "mixed_same", "mixed_rand")}
    said = {"original": [0, 0, 1, 1, 2], "mixed_same": [0, 0, 1, 0, 2], "mixed_rand": [0, 1, 0, 0, -1]}
    nothing = np.zeros(5, np.int64)
    found = Challenge(np.array([True, True, False, True, True]), nothing, nothing, 9)
    report = Report(judge(), {name: answers(p) for name, p in said.items()}, found)
    result = backgrounds.summary(report, variants, resamples=500, seed=0)
    assert [result["accuracy"][n]["mean"] for n in variants] == [1.0, 0.8, 0.2]
    assert result["accuracy"]["original"]["low"] == result["accuracy"]["original"]["high"] == 1.0
    assert result["by_class"]["mixed_same"] == {"red": 1.0, "green": 0.5, "blue": 1.0}
    assert result["bg_gap"]["mean"] == pytest.approx(0.6) and result["bg_gap"]["low"] < 0.6 < result["bg_gap"]["high"]
    assert result["challenge_accuracy"]["mean"] == pytest.approx(0.2)
    worse = Report(judge(), {name: answers([0] * 5) for name in said}, None)
    assert backgrounds.compare(report, worse, variants, resamples=100, seed=0)["original"]["mean"] == pytest.approx(
        -0.6
    )


def test_changed_decisions_pair_variants_by_foreground():
    labels = [0, 1]
    original = variant("original", labels, ["a", "b"])
    mixed = variant("mixed_rand", [0, 1], ["fg_a_bg_z", "fg_b_bg_y"])
    report = Report(judge(), {"original": answers([0, 1]), "mixed_rand": answers([2, 1])}, None)
    found = backgrounds.changed_decisions(
        [report], {"original": original, "mixed_rand": mixed}, ["original", "mixed_rand"]
    )
    assert found == [(("00_red", "a"), [0, 0])]


def test_tiles_of_the_decision_sheet_are_the_images(arena):
    foregrounds, masks, labels, scenery = arena
    stems = [f"s{i}" for i in range(11)]
    variants = {name: variant(name, labels.tolist(), stems) for name in ("original", "mixed_rand")}
    images = {"original": foregrounds, "mixed_rand": foregrounds.flip(3), "only_bg_t": scenery}
    said = {"original": answers(labels.tolist()), "mixed_rand": answers([2] * 11)}
    fought = fight(judge(), arena, np.arange(7))
    names = [(variants["original"].classes[label], stem) for label, stem in zip(labels, stems)]
    objects = backgrounds.Foregrounds(names, foregrounds, masks, labels)
    reports = [Report(judge(), said, fought)]
    sheet = backgrounds.decision_sheet(reports, variants, lambda name, i: images[name][i], objects, 20)
    shown = backgrounds.changed_decisions(reports, variants, ["original", "mixed_rand"])
    assert len(sheet.rows) == len(shown) == (labels != 2).sum() and len(sheet.columns) == 3
    for row, ((_, stem), (first, second)) in enumerate(shown):
        index = stems.index(stem)
        assert (first, second) == (index, index)
        pasted = torch.where(masks[index], foregrounds[index], scenery[int(fought.breaker[index])])
        expected = [foregrounds[index], foregrounds[index].flip(2), pasted if fought.vulnerable[index] else None]
        for tile, image in zip(sheet.rows[row].tiles, expected):
            assert (tile is None) == (image is None)
            if tile is not None and image is not None:
                assert np.array_equal(tile, figures.fit(backgrounds.picture(image), 150, 150))
        assert [caption.text for caption in sheet.rows[row].captions[1]] == ["blue 50%"]


def test_every_model_is_asked_about_the_adversary_that_is_shown():
    """Scenery 0 is blue and misleads the first model alone; scenery 1 is green and misleads both."""
    foregrounds = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    foregrounds[:, 0] = 200
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[:, :3] = True
    scenery = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    scenery[0, 2], scenery[1, 1] = 255, 255
    blind = channel_model()
    with torch.no_grad():
        assert blind.classifier is not None
        blind.classifier.bias[2] = -1e4  # never names blue
    variants = {"original": variant("original", [0], ["a"]), "mixed_rand": variant("mixed_rand", [0], ["fg_a_bg_b"])}
    objects = backgrounds.Foregrounds([("00_red", "a")], foregrounds, masks, np.array([0]))
    said = {"original": answers([0]), "mixed_rand": answers([1])}

    def captions(orders: list[list[int]]) -> list[figures.Caption]:
        judges = [judge(1), Judge(blind, np.arange(3), torch.device("cpu"), 1)]
        fought = [
            backgrounds.challenge(own, foregrounds, masks, np.array([0]), scenery, np.array(order))
            for own, order in zip(judges, orders)
        ]
        reports = [Report(own, said, found) for own, found in zip(judges, fought)]
        sheet = backgrounds.decision_sheet(reports, variants, lambda _, i: scenery[i], objects, 1)
        return sheet.rows[0].captions[-1]

    first, second = captions([[0, 1], [0, 1]])  # the tile is on blue
    assert (first.text, first.colour) == ("blue 100%", figures.WRONG)
    assert (second.text, second.colour) == ("red 100%; wrong on others", figures.RIGHT)
    first, second = captions([[1, 0], [0, 1]])  # on green
    assert (first.text, first.colour) == (second.text, second.colour) == ("green 100%", figures.WRONG)


def test_several_models_are_measured_with_one_reading_of_each_variant(arena):
    foregrounds, masks, labels, scenery = arena
    stems = [f"s{i}" for i in range(11)]
    variants = {"original": variant("original", labels.tolist(), stems), "only_bg_t": variant("only_bg_t", [0] * 7)}
    objects = backgrounds.Foregrounds([("00_red", stem) for stem in stems], foregrounds, masks, labels)
    images, read = {"original": foregrounds, "only_bg_t": scenery}, []

    def counted(name: str) -> torch.Tensor:
        read.append(name)
        return images[name]

    models = [channel_model(), channel_model(("blue", "red", "green"))]
    together = backgrounds.measure_all(models, variants, counted, objects, None, torch.device("cpu"), 4)
    assert read == ["original", "only_bg_t"]
    for model, found in zip(models, together):
        alone = backgrounds.measure(model, variants, images, objects, None, torch.device("cpu"), 5)
        for name in variants:
            assert np.array_equal(alone.variants[name].predicted, found.variants[name].predicted)
        assert alone.challenge is not None and found.challenge is not None
        assert np.array_equal(alone.challenge.vulnerable, found.challenge.vulnerable)
    assert not np.array_equal(together[0].variants["original"].predicted, together[1].variants["original"].predicted)


def test_outputs_are_matched_by_class_names():
    classes = ("00_red", "01_green", "02_blue")
    assert backgrounds.answer_table(channel_model(), classes, None).tolist() == [0, 1, 2]
    turned = channel_model(("Blue", "red", "02_green"))
    assert backgrounds.answer_table(turned, classes, None).tolist() == [2, 0, 1]
    assert backgrounds.answer_table(channel_model(None), classes, None).tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="knows no class green"):
        backgrounds.answer_table(channel_model(("red", "blue", "grey")), classes, None)
    with pytest.raises(UserError, match="3 outputs without names, expected 2"):
        backgrounds.answer_table(channel_model(None), classes[:2], None)


def test_imagenet_classes_go_through_the_mapping(tmp_path):
    model = channel_model(None)
    model.classifier = nn.Linear(3, 1000)
    classes = ("00_dog", "01_bird")
    with pytest.raises(UserError, match=r"in_to_in9\.json"):
        backgrounds.answer_table(model, classes, None)
    root = tmp_path / "root"
    root.mkdir()
    nine = tuple(f"{n:02d}_{'wheeled ' if n == 2 else ''}{name}" for n, name in enumerate(backgrounds.NINE))
    found = tmp_path / "in_to_in9.json"
    found.write_text(json.dumps({"151": 0, "8": 1, "999": 8, "0": -1}))
    table = backgrounds.answer_table(model, nine, backgrounds.find_mapping(root, None, nine))
    assert (table[151], table[8], table[999], table[0], table[998]) == (0, 1, 8, -1, -1) and (table >= 0).sum() == 3
    # it speaks of the official classes: other sets need a mapping of their own, and then their user names it
    for others in (nine[:8], (*nine[:8], "08_mug"), (nine[1], nine[0], *nine[2:])):
        assert backgrounds.find_mapping(root, None, others) is None
        assert backgrounds.find_mapping(root, found, others) == {151: 0, 8: 1, 999: 8, 0: -1}
    with pytest.raises(UserError, match="maps to class 8, but the set has 2"):
        backgrounds.answer_table(model, classes, backgrounds.find_mapping(root, found, classes))
    with pytest.raises(UserError, match="--mapping"):
        backgrounds.find_mapping(root, tmp_path / "no.json", nine)
    (tmp_path / "bad.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="JSON object"):
        backgrounds.find_mapping(root, tmp_path / "bad.json", nine)


def test_files_that_do_not_fit_are_named(tmp_path):
    folder = tmp_path / "original" / "val" / "00_a"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="holds no image"):
        backgrounds.read_variant(tmp_path, "original")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    Image.new("RGB", (8, 9)).save(folder / "b.png")
    read = backgrounds.read_variant(tmp_path, "original")
    with pytest.raises(UserError, match=r"b\.png: is 8x9, expected 8x8"):
        backgrounds.read_images(read.paths)
    (folder / "b.png").write_text("no image")
    with pytest.raises(UserError, match=r"b\.png: cannot be decoded"):
        backgrounds.read_images(read.paths)
    with pytest.raises(UserError, match="mixed_rand"):
        backgrounds.read_variant(tmp_path, "mixed_rand")


def test_strip_and_tiling_by_hand():
    assert strip_beside((2, 0, 8, 4), 8) == (2, 4, 8, 8)  # right: 6×4; above: 2×4
    assert strip_beside((0, 0, 8, 8), 8) is None
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    mask = np.zeros((8, 8), bool)
    mask[2:7, 0:5] = True
    cutout = Cutout(image, mask)
    assert cutout.box == (2, 0, 7, 5)
    tiled = tile_over(cutout)  # the strip is rows 2–6, columns 5–7, three broad: 3 + 2 columns fill the box
    assert np.array_equal(tiled[2:7, 0:3], image[2:7, 5:8]) and np.array_equal(tiled[2:7, 3:5], image[2:7, 5:7])
    outside = np.ones((8, 8), bool)
    outside[2:7, 0:5] = False
    assert np.array_equal(tiled[outside], image[outside])


def test_plain_variants_by_hand():
    rng = np.random.default_rng(0)
    image = rng.integers(1, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[4, 4:9] = mask[4:12, 6] = True
    made = backgrounds_make.plain_variants(Cutout(image, mask))
    assert (made["only_fg"][~mask] == 0).all() and np.array_equal(made["only_fg"][mask], image[mask])
    assert (made["no_fg"][mask] == 0).all() and np.array_equal(made["no_fg"][~mask], image[~mask])
    assert (made["only_bg_b"][4:12, 4:9] == 0).all() and np.array_equal(made["only_bg_b"][:4], image[:4])
    assert not (made["only_bg_t"] == 0).any() and np.array_equal(made["original"], image)
    other = np.full_like(image, 7)
    pasted = backgrounds_make.paste(Cutout(image, mask), other)
    assert (pasted[~mask] == 7).all() and np.array_equal(pasted[mask], image[mask])


def test_the_square_follows_the_object():
    saliency = np.zeros((10, 20), np.uint8)
    saliency[3:6, 14:20] = 255
    top, left, bottom, right = square_around(saliency, 200, 100)
    assert (top, bottom) == (0, 1) and (left, right) == (0.5, 1.0)
    saliency[:] = 0
    saliency[3:6, 9:11] = 255
    assert square_around(saliency, 200, 100)[1::2] == (0.25, 0.75)


def test_backgrounds_come_from_the_class_that_the_variant_says():
    labels = np.array([0, 0, 0, 1, 1, 2])
    drawn = draw_backgrounds(labels, 3, seed=4)
    assert np.array_equal(labels[drawn["mixed_same"]], labels)
    assert np.array_equal(labels[drawn["mixed_next"]], (labels + 1) % 3)
    assert (drawn["mixed_same"][:5] != np.arange(5)).all() and drawn["mixed_same"][5] == 5
    many = draw_backgrounds(np.repeat(np.arange(3), 300), 3, seed=4)["mixed_rand"] // 300
    assert all(250 < (many == label).sum() < 350 for label in range(3))


def write_scenes(folder: Path, count: int = 24) -> Path:
    """Squares of a class's colour on grounds of another colour, with maps and labels."""
    rng = np.random.default_rng(2)
    (folder / "images").mkdir(parents=True)
    (folder / "saliency").mkdir()
    rows = ["stem,class"]
    for number in range(count):
        label = number % 3
        image = rng.integers(0, 60, (48, 64, 3), dtype=np.uint8)
        image[:, :, (label + 1) % 3] += 60
        saliency = np.zeros((48, 64), np.uint8)
        y, x = rng.integers(4, 20), rng.integers(4, 36)
        image[y : y + 20, x : x + 20, label] = 250
        saliency[y : y + 20, x : x + 20] = 255
        Image.fromarray(image).save(folder / "images" / f"p{number}.png")
        Image.fromarray(saliency).save(folder / "saliency" / f"p{number}.png")
        rows.append(f"p{number},{('red', 'green', 'blue')[label]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set made by the command."""
    scenes = write_scenes(tmp_path_factory.mktemp("scenes") / "s")
    root = scenes.parent / "set"
    flags = ["--images", scenes / "images", "--saliency", scenes / "saliency", "--labels", scenes / "labels.csv"]
    code = cli.main(["backgrounds-make", *map(str, flags), "--out", str(root), "--size", "32", "--rows", "4"])
    assert code == 0
    return root


def test_made_sets_have_the_official_layout(made):
    classes = ["00_blue", "01_green", "02_red"]
    for name in backgrounds.VARIANTS:
        assert sorted(p.name for p in (made / name / "val").iterdir()) == classes
        assert len(list((made / name / "val").glob("*/*.JPEG"))) == 12
    trained = {p.stem for p in (made / "original" / "train").glob("*/*.JPEG")}
    tested = {p.stem for p in (made / "original" / "val").glob("*/*.JPEG")}
    assert len(trained) == 12 and not trained & tested
    mask_path = next((made / "fg_mask" / "val").glob("*/*.npy"))
    mask = np.load(mask_path)
    assert mask.shape == (32, 32) and set(np.unique(mask)) == {0, 1}
    with (made / "backgrounds_used.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for row in rows:
        label = row["image"].split("/")[0]
        assert row["class_of_mixed_same"] == label
        assert classes.index(row["class_of_mixed_next"]) == (classes.index(label) + 1) % 3
    assert (made / "examples.png").is_file() and json.loads((made / "made.json").read_text())["classes"] == classes


def test_made_images_are_the_compositions_that_they_claim(made):
    path = next((made / "original" / "val").glob("*/*.JPEG"))
    read = {n: backgrounds.read_image(made / n / "val" / path.parent.name / path.name).astype(int) for n in
            ("original", "only_fg", "no_fg", "mixed_rand")}  # fmt: skip
    inside = np.load(made / "fg_mask" / "val" / path.parent.name / f"{path.stem}.npy")[4:-4, 4:-4] > 0
    cut = {name: image[4:-4, 4:-4] for name, image in read.items()}
    assert inside.any() and not inside.all()
    # JPEG at quality 95 rings by a few levels next to an edge
    assert np.median(np.abs(cut["only_fg"] - cut["original"])[inside]) <= 4
    assert np.median(np.abs(cut["mixed_rand"] - cut["original"])[inside]) <= 4
    assert np.median(cut["only_fg"][~inside]) <= 4 and np.median(cut["no_fg"][inside]) <= 4


def write_resnet(path: Path, classes: list[str] | None, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    trunk, width = build_trunk("resnet18")
    state = dict(trunk.state_dict())
    about: dict = {"name": path.stem, "arch": "resnet18"}
    if classes is not None:
        state["fc.weight"], state["fc.bias"] = torch.randn(len(classes), width), torch.zeros(len(classes))
        about["classes"] = classes
    save_safetensors(state, path, about)
    return path


def test_command_line_measures_classifiers_and_encoders(made, tmp_path, capsys):
    named = write_resnet(tmp_path / "named.safetensors", ["green", "red", "blue"])
    bare = write_resnet(tmp_path / "bare.safetensors", None, seed=1)
    code = cli.main(
        ["backgrounds", str(named), str(bare), str(made), "--out", str(tmp_path / "out"), "--resamples", "100"]
    )
    assert code == 0
    result = json.loads((tmp_path / "out" / "backgrounds.json").read_text())
    assert set(result["models"]) == {"named", "bare"}
    for found in result["models"].values():
        assert set(found["accuracy"]) == set(backgrounds.VARIANTS) and 0 <= found["challenge_accuracy"]["mean"] <= 1
        gap = found["accuracy"]["mixed_same"]["mean"] - found["accuracy"]["mixed_rand"]["mean"]
        assert found["bg_gap"]["mean"] == pytest.approx(gap)
    assert "bare - named" in result["differences"]
    with (tmp_path / "out" / "backgrounds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * 12 and set(rows[0]) == {"variant", "file", "class", "named", "bare"}
    right = [row["class"] == row["bare"] for row in rows if row["variant"] == "original"]
    assert np.mean(right) == pytest.approx(result["models"]["bare"]["accuracy"]["original"]["mean"])
    with Image.open(tmp_path / "out" / "decisions.png") as sheet:
        assert sheet.width > 600
    assert "BG-Gap" in capsys.readouterr().out


def test_a_classifier_of_other_crops_is_named(made, tmp_path, caplog):
    path = write_resnet(tmp_path / "named.safetensors", ["green", "red", "blue"])
    model = load_classifier(path)
    assert model.classifier is not None
    with Image.open(next((made / "original" / "val").glob("*/*"))) as opened:
        side = opened.width
    for size, said in ((side, False), (side + 32, True), (None, False)):
        about = {"name": "named", "arch": "resnet18", "classes": ["green", "red", "blue"]}
        about |= {"preprocessing": {"size": size}} if size else {}
        fc = {f"fc.{name}": value for name, value in model.classifier.state_dict().items()}
        save_safetensors({**model.trunk.state_dict(), **fc}, path, about)
        caplog.clear()
        flags = ["--out", tmp_path / "out", "--resamples", 10, "--no-challenge", "--variants", "original"]
        assert cli.main(["backgrounds", str(path), str(made), *map(str, flags)]) == 0
        words = f"named was trained on crops of {side + 32} pixels and is measured on {side}"
        assert (words in caplog.text) == said, size


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "x", "nowhere.safetensors", "ROOT"], "no such file"),
        (["--out", "x", "MODEL", "nowhere"], "no such folder"),
        (["--out", "x", "MODEL", "ROOT", "--batch", "0"], "--batch"),
        (["--out", "x", "MODEL", "ROOT", "--seed", "-1"], "--seed: got -1"),
        (["--out", "x", "WRONG", "ROOT"], "knows no class"),
        (["--out", "x", "BARE", "ROOT", "--probe-on", "mixed_rand"], "holds no classifier"),
    ],
)
def test_mistakes_are_one_line(flags, message, made, tmp_path, capsys):
    names = {
        "MODEL": lambda: write_resnet(tmp_path / "m.safetensors", ["green", "red", "blue"]),
        "WRONG": lambda: write_resnet(tmp_path / "w.safetensors", ["cat", "dog"]),
        "BARE": lambda: write_resnet(tmp_path / "b.safetensors", None),
        "ROOT": lambda: made,
    }
    code = cli.main(["backgrounds", *(str(names[f]()) if f in names else f for f in flags)])
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error


def test_make_refuses_what_it_cannot_use(tmp_path, made, capsys):
    scenes = write_scenes(tmp_path / "few", 2)
    flags = ["--images", str(scenes / "images"), "--saliency", str(scenes / "saliency")]
    assert cli.main(["backgrounds-make", *flags, "--out", str(tmp_path / "o")]) == 2
    assert "--labels" in capsys.readouterr().err
    labelled = [*flags, "--labels", str(scenes / "labels.csv")]
    assert cli.main(["backgrounds-make", *labelled, "--out", str(made)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert cli.main(["backgrounds-make", *labelled, "--out", str(scenes / "labels.csv")]) == 2
    assert "cannot be a new folder" in capsys.readouterr().err
    assert cli.main(["backgrounds-make", *labelled, "--out", str(tmp_path / "o"), "--seed", "-1"]) == 2
    assert "--seed: got -1" in capsys.readouterr().err
    (scenes / "labels.csv").write_text("stem,class\np0,red\np1,red\n")
    assert cli.main(["backgrounds-make", *labelled, "--out", str(tmp_path / "o"), "--size", "32"]) == 2
    assert "expected at least 2" in capsys.readouterr().err
