"""Maps made by each method: geometry, records, going on after a stop, faults that name their file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from cast_fast import cli
from cast_fast.data import layout, saliency_maps
from cast_fast.data.pack_sample import PackRule
from cast_fast.data.prepare import SOURCE_FILE, prepare
from cast_fast.data.saliency_maps import CocoInstances, NoMap, OnnxModel, choose_method, make_maps, rasterise
from cast_fast.errors import UserError

contrib = pytest.mark.skipif(not hasattr(cv2, "saliency"), reason="the installed OpenCV lacks its contrib modules")

# A writer for the few messages of ONNX that a small model needs (onnx.proto3: field numbers as there).


def varint(value: int) -> bytes:
    content = b""
    while value > 127:
        content += bytes([value & 127 | 128])
        value >>= 7
    return content + bytes([value])


def field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(name: str, values: np.ndarray) -> bytes:
    dims = b"".join(field(1, side) for side in values.shape)
    return dims + field(2, 1) + field(8, name) + field(9, values.astype("<f4").tobytes())


def value_info(name: str, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(field(1, field(1, side)) for side in shape)
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))


def node(kind: str, inputs: list[str], output: str) -> bytes:
    names = b"".join(field(1, name) for name in inputs)
    return names + field(2, output) + field(3, output) + field(4, kind)


def onnx_model(weights: np.ndarray, size: int, kinds: dict[str, str]) -> bytes:
    """A 1x1 convolution (channels, 3, 1, 1), then for each output its operator applied to it."""
    channels = len(weights)
    graph = field(1, node("Conv", ["image", "weights"], "mixed"))
    graph += b"".join(field(1, node(kind, ["mixed"], name)) for name, kind in kinds.items())
    graph += field(2, "graph") + field(5, tensor("weights", weights))
    graph += field(11, value_info("image", (1, 3, size, size)))
    graph += b"".join(field(12, value_info(name, (1, channels, size, size))) for name in kinds)
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13))


RED = np.array([1.0, -0.5, -0.5]).reshape(1, 3, 1, 1)


def scene(height: int = 120, width: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """A red rectangle on a grey ground, and where it is."""
    image = np.full((height, width, 3), 120, np.uint8)
    image += np.random.default_rng(3).integers(0, 10, image.shape, dtype=np.uint8)
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, width // 2 : width * 3 // 4] = True
    image[mask] = (230, 40, 30)
    return image, mask


def write_images(folder: Path, names: list[str], **options: Any) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene()[0]).save(path, **options)


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())


@contrib
@pytest.mark.parametrize("method", ["spectral-residual", "fine-grained"])
def test_what_stands_out_is_found_without_any_file(method: str, tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a.jpg", "deeper/b.png"], quality=95)
    assert cli.main(["saliency", str(tmp_path / "images"), str(tmp_path / "maps"), "--method", method]) == 0
    dataset = layout.scan(tmp_path / "images", tmp_path / "maps", manifest=tmp_path / "manifest.json", workers=1)
    assert [sample.stem for sample in dataset.samples] == ["a", "deeper/b"] and dataset.faults == ()
    values = np.asarray(Image.open(tmp_path / "maps" / "a.png"))
    assert set(np.unique(values)) == {0, 255}
    mask = scene()[1]
    assert (values[mask] > 127).mean() > 2 * (values[~mask] > 127).mean()  # these methods are weak
    record = json.loads((tmp_path / "maps" / "saliency.json").read_text())
    assert (record["method"], record["supervised"]) == (method, False)


@contrib
@pytest.mark.parametrize("detect", [saliency_maps.spectral_residual, saliency_maps.fine_grained])
def test_a_picture_without_contrast_has_an_empty_map(detect) -> None:
    assert not detect(np.full((60, 80, 3), 77, np.uint8)).any()


# ONNX


def test_a_model_marks_what_it_was_made_for(tmp_path: Path) -> None:
    """The output is scaled to its own range and cut at one half; of several outputs the first counts."""
    path = tmp_path / "red.onnx"
    path.write_bytes(onnx_model(RED, 64, {"fused": "Sigmoid", "side": "Neg"}))
    image, mask = scene()
    assert overlap(OnnxModel(path, 64)(image), mask) > 0.9
    # U2-Net's convention for the input: by the largest value, then ImageNet's statistics; red is redder then
    path.write_bytes(onnx_model(-RED, 64, {"fused": "Sigmoid"}))
    assert overlap(OnnxModel(path, 64)(image), ~mask) > 0.9


def test_a_model_sees_the_normalisation_of_imagenet(tmp_path: Path) -> None:
    """A threshold inside the model: the picture's darker half is above 0 only after division by its largest value."""
    image = np.full((64, 64, 3), 50, np.uint8)
    image[:, 32:] = 100
    seen = []
    path = tmp_path / "same.onnx"
    path.write_bytes(onnx_model(np.array([1.0, 0, 0]).reshape(1, 3, 1, 1), 64, {"out": "Relu"}))
    model = OnnxModel(path, 64)
    network, first = model._network()

    class Spy:
        def setInput(self, blob: np.ndarray) -> None:
            seen.append(blob)
            network.setInput(blob)

        def forward(self, name: str) -> np.ndarray:
            return network.forward(name)

    model._local.network = Spy(), first
    model(image)
    assert seen[0].shape == (1, 3, 64, 64)
    np.testing.assert_allclose(seen[0][0, :, 0, 0], (0.5 - saliency_maps._MEAN) / saliency_maps._STD, rtol=1e-5)
    np.testing.assert_allclose(seen[0][0, :, 0, 63], (1 - saliency_maps._MEAN) / saliency_maps._STD, rtol=1e-5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read"),
        (b"", "is no saliency network"),
        (b"no model" * 40, "is no saliency network"),
        (onnx_model(np.ones((2, 3, 1, 1)), 64, {"out": "Relu"}), r"shape \(2, 64, 64\), expected one map"),
    ],
    ids=["missing", "empty", "text", "two-maps"],
)
def test_a_file_that_is_no_saliency_network_is_refused_at_once(
    content: bytes | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"--model: .*{words}"):
        OnnxModel(path, 64)


@pytest.mark.parametrize("flags", [[], ["--unsupervised"]])
def test_the_record_tells_the_model_and_whether_it_was_supervised(flags: list[str], tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a.png", "b.png", "c.png"])
    (tmp_path / "red.onnx").write_bytes(onnx_model(RED, 64, {"out": "Sigmoid"}))
    out = tmp_path / "images" / "maps"  # inside: its PNGs are no images
    arguments = ["saliency", str(tmp_path / "images"), str(out), "--method", "onnx", "--input-size", "64"]
    for _ in range(2):
        assert cli.main([*arguments, "--model", str(tmp_path / "red.onnx"), "--workers", "2", *flags]) == 0
    record = json.loads((out / "saliency.json").read_text())
    assert record["supervised"] is (not flags) and record["model"]["name"] == "red.onnx"
    assert len(record["model"]["sha256"]) == 64
    assert len(list(out.glob("*.png"))) == 3
    prepare(tmp_path / "images", out, tmp_path / "shards", rule=PackRule(), workers=1)
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert manifest["source"]["maps"] == record


# COCO


def compressed(lengths: list[int]) -> str:
    """COCO's string encoding of run lengths."""
    text = ""
    for i, length in enumerate(lengths):
        value = length - lengths[i - 2] if i > 2 else length
        more = True
        while more:
            code = value & 31
            value >>= 5
            more = value != -1 if code & 16 else value != 0
            text += chr((code | 32 if more else code) + 48)
    return text


def run_lengths(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[False], mask.T.ravel(), [not mask[-1, -1]]])
    edges = np.flatnonzero(np.diff(flat.astype(int)))
    return [int(edges[0]), *map(int, np.diff(edges))]


def test_polygons_and_both_kinds_of_run_lengths_agree() -> None:
    mask = np.zeros((50, 70), bool)
    mask[10:30, 20:45] = True
    mask[30:32, 20:22] = True
    lengths = run_lengths(mask)
    polygon = [[20, 10, 45, 10, 45, 30, 22, 30, 22, 32, 20, 32]]
    for segmentation in (
        {"size": [50, 70], "counts": lengths},
        {"size": [50, 70], "counts": compressed(lengths)},
    ):
        np.testing.assert_array_equal(rasterise(segmentation, 50, 70), mask)
    drawn = rasterise(polygon, 50, 70)
    assert (drawn != mask).sum() <= 2 * (20 + 25 + 4)  # the border's pixels at most
    assert (drawn & mask).sum() == mask.sum()


def test_compressed_run_lengths_as_pycocotools_writes_them() -> None:
    """A string from the documentation of COCO's format: a 9 by 9 square of ones in the corner of 10 by 12."""
    mask = np.zeros((10, 12), bool)
    mask[:9, :9] = True
    lengths = run_lengths(mask)
    assert lengths[:4] == [0, 9, 1, 9]
    assert compressed(lengths)[:4] == "0910"
    np.testing.assert_array_equal(rasterise({"size": [10, 12], "counts": compressed(lengths)}, 10, 12), mask)


def coco(tmp_path: Path, annotations: list[dict[str, Any]], images: list[dict[str, Any]]) -> Path:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def square(image: int, x: float, y: float, side: float, **more: Any) -> dict[str, Any]:
    corners = [x, y, x + side, y, x + side, y + side, x, y + side]
    return {"image_id": image, "segmentation": [corners], **more}


def test_large_instances_make_the_map_and_small_ones_and_crowds_do_not(tmp_path: Path) -> None:
    path = coco(
        tmp_path,
        [square(1, 10, 10, 40), square(1, 80, 60, 22), square(1, 120, 5, 10), square(1, 0, 85, 30, iscrowd=1)],
        [{"id": 1, "file_name": "train/a.jpg", "height": 120, "width": 160}],
    )
    found = CocoInstances(path)("a.jpg", 120, 160)
    assert found[30, 30] and found[70, 90] and not found[10, 125] and not found[110, 10]
    assert CocoInstances(path, least_share=0)("a.jpg", 120, 160)[10, 125]
    with pytest.raises(NoMap, match="is 80x60, the annotations say 160x120"):
        CocoInstances(path)("a.jpg", 60, 80)
    with pytest.raises(NoMap, match="do not name it"):
        CocoInstances(path)("b.jpg", 120, 160)


def test_images_without_a_map_are_named_and_the_exit_code_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [{"id": i, "file_name": f"{name}.jpg", "height": 120, "width": 160} for i, name in enumerate("abcd")]
    bad = {"image_id": 2, "segmentation": [[1, 2, 3]]}
    path = coco(tmp_path, [square(0, 20, 20, 40), bad], images)
    write_images(tmp_path / "images", ["a.jpg", "b.jpg", "c.jpg", "other.jpg"])
    (tmp_path / "images" / "d.jpg").write_bytes(b"\xff\xd8\xff broken")
    arguments = ["saliency", str(tmp_path / "images"), str(tmp_path / "maps"), "--method", "coco"]
    assert cli.main([*arguments, "--annotations", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "2 maps written" in printed and "with human labels" in printed and "empty maps: 1" in printed
    assert "without a map, no-map: 3, for example" in printed
    assert sorted(p.name for p in (tmp_path / "maps").glob("[!.]*")) == ["a.png", "b.png", "saliency.json"]
    method = choose_method("coco", annotations=path)
    summary = make_maps(tmp_path / "images", tmp_path / "maps", method, workers=1)
    assert (summary.written, summary.kept) == (0, 2)
    messages = {fault.path.name: fault.message for fault in summary.faults}
    assert "cannot be decoded" in messages["d.jpg"] and "do not name it" in messages["other.jpg"]
    assert "its annotation is faulty: a polygon of 3 numbers" in messages["c.jpg"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"images": []}',
        '{"images": [{"id": 1}], "annotations": []}',
        '{"images": [], "annotations": [{"image_id": 3}]}',
    ],
)
def test_annotations_of_another_format_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text(content)
    with pytest.raises(UserError, match="is not in COCO's instance format"):
        CocoInstances(path)


# Going on, and users' mistakes


@contrib
def test_a_second_run_makes_only_what_is_missing_or_older(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a.png", "b.png", "c.png"])
    method = choose_method("fine-grained")
    assert make_maps(tmp_path / "images", tmp_path / "maps", method, workers=2).written == 3
    (tmp_path / "maps" / "b.png").unlink()
    image = tmp_path / "images" / "c.png"
    image.touch()
    later = (tmp_path / "maps" / "c.png").stat().st_mtime_ns + 10**9
    os.utime(image, ns=(later, later))
    summary = make_maps(tmp_path / "images", tmp_path / "maps", method, workers=1)
    assert (summary.written, summary.kept) == (2, 1)


@contrib
def test_another_method_does_not_mix_into_a_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a.png"])
    make_maps(tmp_path / "images", tmp_path / "maps", choose_method("fine-grained"), workers=1)
    with pytest.raises(UserError, match=r"another method: .*fine-grained.* then, .*spectral-residual.* now"):
        make_maps(tmp_path / "images", tmp_path / "maps", choose_method("spectral-residual"), workers=1)
    write_images(tmp_path / "mine", ["a.png"])
    with pytest.raises(UserError, match=r"is not empty and has no saliency\.json"):
        make_maps(tmp_path / "images", tmp_path / "mine", choose_method("fine-grained"), workers=1)


@contrib
def test_what_a_killed_run_left_half_written_goes_and_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    images, maps = tmp_path / "images", tmp_path / "maps"
    write_images(images, ["sub/a.png"])
    (maps / "sub").mkdir(parents=True)
    left = [folder / ".cast-fast-0123456789abcdef.part" for folder in (maps, maps / "sub")]
    for part in left:
        part.write_bytes(b"half")
    (maps / SOURCE_FILE).write_text(json.dumps(choose_method("fine-grained").record))
    code = "import sys; from cast_fast.files import claimed; from pathlib import Path\n"
    code += "with claimed(Path(sys.argv[1]), 'saliency.json', 'saliency'): print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(maps)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(UserError, match="maps is in use by another cast-fast saliency"):
            make_maps(images, maps, choose_method("fine-grained"), workers=1)
        other.communicate()
    assert make_maps(images, maps, choose_method("fine-grained"), workers=1).written == 1
    assert not any(part.exists() for part in left)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "coco"], "--annotations FILE goes with --method coco"),
        (["--method", "onnx"], "--model FILE goes with --method onnx"),
        (["--method", "fine-grained", "--model", "x"], "--model FILE goes with --method onnx"),
        (["--method", "coco", "--annotations", "/nowhere.json"], "--annotations: cannot read"),
        (["--method", "sharp"], "invalid choice: 'sharp'"),
        pytest.param(["--method", "fine-grained", "--workers", "0"], "--workers: got 0", marks=contrib),
        ([], "--method"),
    ],
)
def test_a_users_mistake_is_one_line(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", ["a.png"])
    try:
        code = cli.main(["saliency", str(tmp_path / "images"), str(tmp_path / "maps"), *flags])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "maps").exists()


def test_maps_do_not_go_among_the_images(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a.png"])
    with pytest.raises(UserError, match="IMAGES and OUT are the same folder"):
        make_maps(
            tmp_path / "images", tmp_path / "images", saliency_maps.Method(lambda file, image: image[..., 0] > 0, {})
        )


def test_an_opencv_without_contrib_modules_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "saliency", raising=False)
    with pytest.raises(UserError, match=r"--method fine-grained: .* pip install opencv-contrib-python-headless"):
        choose_method("fine-grained")


@contrib
def test_16_bit_grey_is_seen_as_the_loader_sees_it(tmp_path: Path) -> None:
    columns, rows = np.meshgrid(np.arange(160), np.arange(120))
    shape = 60 + 180 * ((columns - 50) ** 2 + (rows - 60) ** 2 < 900) + columns % 7
    (tmp_path / "images").mkdir()
    Image.fromarray(shape.astype(np.uint8)).save(tmp_path / "images" / "shallow.png")
    Image.fromarray((257 * shape).astype(np.uint16)).save(tmp_path / "images" / "deep.png")
    summary = make_maps(tmp_path / "images", tmp_path / "maps", choose_method("spectral-residual"), workers=1)
    deep, shallow = (np.asarray(Image.open(tmp_path / "maps" / f"{name}.png")) for name in ("deep", "shallow"))
    assert summary.empty == 0 and np.array_equal(deep, shallow)


@contrib
def test_stored_pixels_count_not_the_viewers(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write_images(tmp_path / "images", ["a.jpg"], exif=exif)
    make_maps(tmp_path / "images", tmp_path / "maps", choose_method("spectral-residual"), workers=1)
    found = cv2.imread(str(tmp_path / "maps" / "a.png"), cv2.IMREAD_UNCHANGED)
    assert found is not None and found.shape == (120, 160)
