"""Two classifiers side by side: who is right, and Grad-CAM of the true class."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from cast_fast import cli
from cast_fast.encoder import Encoder, build_trunk
from cast_fast.errors import UserError
from cast_fast.evaluate import downstream, figures
from cast_fast.evaluate.downstream import Decision, class_rows, decide, ranked
from cast_fast.evaluate.features import stack
from cast_fast.evaluate.weights import IdentityHead, Model, normalise
from cast_fast.export import save_safetensors

CPU = torch.device("cpu")


def classifier(names: tuple[str, ...] | None, outputs: int = 3, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Conv2d(3, 5, 8, stride=8), nn.ReLU())
    encoder = Encoder(trunk, IdentityHead()).requires_grad_(False)
    return Model("c", "none", encoder, None, nn.Linear(5, outputs).requires_grad_(False), names, 32, {})


def test_the_map_is_grad_cam_of_the_true_class():
    model = classifier(("a", "b", "c"))
    images = list(np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8))
    labels = ["a", "b", "c", "c", "b", "a"]
    rows = class_rows(model, labels)
    assert rows == {"a": [0], "b": [1], "c": [2]} and model.classifier is not None
    found = decide(model, images, labels, rows, CPU)
    activations = model.trunk(normalise(stack(images))).requires_grad_()
    scores = model.classifier(activations.mean(dim=(2, 3)))
    shares = scores.detach().softmax(1)
    for i, (label, decision) in enumerate(zip(labels, found)):
        row = rows[label][0]
        (gradient,) = torch.autograd.grad(scores[i, row], activations, retain_graph=True)
        cam = (gradient[i].mean(dim=(1, 2))[:, None, None] * activations[i]).sum(0).relu().detach().numpy()
        assert np.allclose(figures.relative_to_peak(decision.cam), figures.relative_to_peak(cam), atol=1e-5)
        assert decision.right == (int(scores[i].argmax()) == row)
        assert decision.answer == "abc"[int(scores[i].argmax())]
        assert decision.truth == pytest.approx(float(shares[i, row]), abs=1e-6)
        assert decision.confidence == pytest.approx(float(shares[i].max()), abs=1e-6)


def test_a_name_that_occurs_twice_stands_for_both_outputs():
    model = classifier(("crane", "dog", "Crane"))
    rows = class_rows(model, ["crane", "dog"])
    assert rows == {"crane": [0, 2], "dog": [1]}
    images = list(np.random.default_rng(1).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    for decision in decide(model, images, ["crane"] * 8, rows, CPU):
        assert decision.right == (decision.answer.lower() == "crane")
        assert decision.truth >= decision.confidence - 1e-6 or not decision.right


def test_labels_without_class_are_named():
    with pytest.raises(UserError, match=r"c: no class is called 'owl', .* its 3 classes begin with a, b, c"):
        class_rows(classifier(("a", "b", "c")), ["a", "owl"])
    assert class_rows(classifier(None), ["2"]) == {"2": [2]}


def test_labels_can_be_mapped_to_classes():
    model = classifier(("golden retriever", "beagle", "tabby"))
    mapping = {"dog": ["Beagle", 0], "tabby": [0]}
    assert class_rows(model, ["dog", "tabby"], mapping) == {"dog": [0, 1], "tabby": [2]}
    with pytest.raises(UserError, match="--mapping names none for it"):
        class_rows(model, ["owl"], mapping)


def test_pictures_are_ranked_by_how_sure_both_are():
    cam = np.zeros((2, 2), np.float32)

    def said(right: bool, confidence: float, truth: float) -> Decision:
        return Decision(right, "x", confidence, truth, cam)

    first = [said(True, 0.6, 0.6), said(True, 0.9, 0.9), said(False, 0.9, 0.1), said(True, 0.9, 0.9)]
    second = [said(False, 0.9, 0.1), said(False, 0.8, 0.1), said(False, 0.9, 0.1), said(True, 0.9, 0.9)]
    assert ranked(first, second) == [1, 0] and ranked(second, first) == []


def test_tiles_of_the_sheet_are_the_arrays():
    rng = np.random.default_rng(2)
    mask = np.zeros((128, 128), bool)
    mask[30:90, 20:70] = True
    views = [
        downstream.View(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8), mask),
        downstream.View(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8), None),
    ]
    cams = rng.random((2, 2, 4, 4)).astype(np.float32)
    rows = [(f"p{i}", "dog", [Decision(j == 0, "cat", 0.5, 0.5, cams[i, j]) for j in range(2)]) for i in range(2)]
    sheet = downstream.sheet_of("title", [classifier(None), classifier(None)], views, rows)
    image = np.asarray(sheet.image())
    for row in range(2):
        for column in range(2):
            left, top, right, bottom = sheet.box(row, 2 + column)
            drawn = figures.overlay(views[row].image, cams[row, column])
            expected = figures.outline(drawn, mask) if row == 0 else drawn
            assert np.array_equal(image[top:bottom, left:right], expected)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """Pictures of three colours with maps, and two ResNet classifiers with names."""
    folder = tmp_path_factory.mktemp("downstream")
    rng = np.random.default_rng(4)
    (folder / "images").mkdir()
    (folder / "saliency").mkdir()
    rows = ["stem,class"]
    for number in range(9):
        image = rng.integers(0, 60, (48, 48, 3), dtype=np.uint8)
        image[10:40, 10:40, number % 3] = 240
        saliency = np.zeros((48, 48), np.uint8)
        saliency[10:40, 10:40] = 255
        Image.fromarray(image).save(folder / "images" / f"p{number}.png")
        Image.fromarray(saliency).save(folder / "saliency" / f"p{number}.png")
        rows.append(f"p{number},{('red', 'green', 'blue')[number % 3]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    files = []
    for seed in range(2):
        torch.manual_seed(seed)
        trunk, width = build_trunk("resnet18")
        state = {**trunk.state_dict(), "fc.weight": torch.randn(3, width), "fc.bias": torch.randn(3)}
        about = {"name": f"model{seed}", "arch": "resnet18", "classes": ["red", "green", "blue"]}
        files.append(folder / f"model{seed}.safetensors")
        save_safetensors(state, files[-1], about)
    return folder, files


def test_command_line_counts_agree_with_the_table(setting, tmp_path, capsys):
    folder, files = setting
    flags = ["--images", folder / "images", "--saliency", folder / "saliency", "--labels", folder / "labels.csv"]
    flags += ["--out", tmp_path / "out", "--size", 64, "--resamples", 100]
    assert cli.main(["downstream", *map(str, files), *map(str, flags)]) == 0
    result = json.loads((tmp_path / "out" / "downstream.json").read_text())
    with (tmp_path / "out" / "downstream.csv").open() as file:
        rows = list(csv.DictReader(file))
    right = np.array([[row["class"] == row[f"model{n}: answer"] for row in rows] for n in range(2)])
    assert result["pictures"] == 9 == result["pictures_with_map"]
    assert [found["mean"] for found in result["accuracy"]] == pytest.approx(right.mean(axis=1))
    counts = [result[n] for n in ("both_right", "only_first_right", "only_second_right", "neither_right")]
    assert counts == [(right[0] & right[1]).sum(), (right[0] > right[1]).sum(), (right[1] > right[0]).sum(),
                      (~right[0] & ~right[1]).sum()]  # fmt: skip
    for number in range(2):
        cosines = [float(row[f"model{number}: cosine"]) for row in rows]
        assert result["grounding"][number]["cosine"]["mean"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert (tmp_path / "out" / "downstream-A-right.png").is_file()
    assert "McNemar" in capsys.readouterr().out


def test_pictures_can_be_limited_to_a_table(setting, tmp_path):
    folder, files = setting
    (tmp_path / "test.csv").write_text("stem,class\np1,green\np5,blue\n")
    flags = ["--images", folder / "images", "--labels", folder / "labels.csv", "--only", tmp_path / "test.csv"]
    flags += ["--out", tmp_path / "out", "--size", 32, "--resamples", 10]
    assert cli.main(["downstream", *map(str, files), *map(str, flags)]) == 0
    result = json.loads((tmp_path / "out" / "downstream.json").read_text())
    assert result["pictures"] == 2 and "grounding" not in result


def test_a_supervised_file_of_torchvision_is_compared_by_a_mapping(setting, tmp_path, capsys):
    folder, files = setting
    torch.manual_seed(5)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "supervised.pth")
    # whatever it says counts as red, nothing as blue but a class that it hardly ever names
    (tmp_path / "mapping.json").write_text(json.dumps({"red": list(range(998)), "green": ["bolete"], "blue": [999]}))
    flags = ["--images", folder / "images", "--labels", folder / "labels.csv", "--mapping", tmp_path / "mapping.json"]
    flags += ["--out", tmp_path / "out", "--size", 32, "--resamples", 10]
    assert cli.main(["downstream", str(tmp_path / "supervised.pth"), str(files[0]), *map(str, flags)]) == 0
    with (tmp_path / "out" / "downstream.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"]
    assert all(row["supervised: answer"] in names for row in rows)
    result = json.loads((tmp_path / "out" / "downstream.json").read_text())
    right = [row["class"] == "red" for row in rows]  # 998 of 1000 classes
    assert result["accuracy"][0]["mean"] == pytest.approx(np.mean(right)) == pytest.approx(1 / 3)
    capsys.readouterr()
    assert cli.main(["downstream", str(tmp_path / "supervised.pth"), str(files[0]), *map(str, flags[:4])]) == 2
    assert "no class is called 'blue'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: ["--images", str(f / "images")], "--labels is missing"),
        (lambda f: ["--images", str(f / "images"), "--labels", str(f / "wrong.csv")], "no class is called 'owl'"),
        (lambda f: ["--images", str(f / "images"), "--labels", str(f / "labels.csv"), "--only", "no.csv"], "--only"),
        (
            lambda f: [
                "--images",
                str(f / "images"),
                "--labels",
                str(f / "labels.csv"),
                "--only",
                str(f / "images/p0.png"),
            ],
            "--only",
        ),
        (lambda f: ["--images", str(f / "images"), "--labels", str(f / "labels.csv"), "--mapping", "no"], "--mapping"),
        (lambda f: ["--images", str(f / "images"), "--labels", str(f / "labels.csv"), "--seed", "-1"], "--seed: got"),
    ],
)
def test_mistakes_are_one_line(change, message, setting, tmp_path, capsys):
    folder, files = setting
    (folder / "wrong.csv").write_text("stem,class\np0,owl\n")
    assert cli.main(["downstream", *map(str, files), "--out", str(tmp_path), *change(folder)]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
