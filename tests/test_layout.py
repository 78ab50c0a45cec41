"""Datasets on disk: pairing, faults that name their file, the manifest, labels, ``validate``."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from cast_fast import cli
from cast_fast.data import children, decode_check, layout, shards
from cast_fast.data.index_shards import index_shards
from cast_fast.data.layout import EMPTY_MAP, Dataset, Fault, default_manifest, read_labels, scan, usable
from cast_fast.errors import UserError

WIDTH, HEIGHT = 160, 120


def photo(width: int = WIDTH, height: int = HEIGHT, mode: str = "RGB") -> Image.Image:
    """A picture with enough detail that its JPEG has several kilobytes of entropy-coded data."""
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(cv2.GaussianBlur(noise, (0, 0), 1.2)).convert(mode)


def blob(width: int = WIDTH, height: int = HEIGHT, value: int = 255) -> Image.Image:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 4 : width // 2] = value
    return Image.fromarray(mask)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = encoded(photo(), "JPEG", quality=90)
PNG = encoded(blob(), "PNG")


def damaged(data: bytes, share: float, length: int) -> bytes:
    at = int(len(data) * share)
    noise = np.random.default_rng(1).integers(0, 256, length, dtype=np.uint8).tobytes()
    return data[:at] + noise + data[at + length :]


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(), "JPEG", exif=exif)


def palette_png() -> bytes:
    return encoded(blob().convert("P"), "PNG")


def deep_png() -> bytes:
    return encoded(Image.fromarray(np.full((HEIGHT, WIDTH), 65535, np.uint16)), "PNG")


def huge_png() -> bytes:
    """A header that promises far more pixels than anyone should allocate."""
    header = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + PNG[24:29]
    return PNG[:12] + header + zlib.crc32(header).to_bytes(4, "big") + PNG[33:]


# name → (file in images, map; None: absent), and the kind of fault with words of its message
BROKEN: dict[str, tuple[bytes, bytes | None, str, str]] = {
    "text.jpg": (b"<html>404</html>", PNG, "not-an-image", "is no JPEG or PNG file (it starts with '<html>404</h')"),
    "gif.jpg": (encoded(photo(mode="P"), "GIF"), PNG, "not-an-image", "GIF87a"),
    "webp.jpg": (encoded(photo(), "WEBP"), PNG, "not-an-image", "RIFF"),
    "empty.jpg": (b"", PNG, "empty-file", "no bytes"),
    "header.jpg": (JPEG[:100], PNG, "undecodable", ""),
    "half.jpg": (JPEG[: len(JPEG) // 2], PNG, "undecodable", "truncated"),
    "bad_header.png": (PNG[:20] + PNG[24:], PNG, "undecodable", "header"),
    "tail.jpg": (JPEG[:-20], PNG, "undecodable", "truncated"),
    "noise.jpg": (damaged(JPEG, 0.5, 512), PNG, "damaged", "Corrupt JPEG data"),
    "half_png.png": (encoded(photo(), "PNG")[:5000], PNG, "undecodable", "truncated"),
    "bits.png": (damaged(encoded(photo(), "PNG"), 0.5, 4), PNG, "damaged", "checksum"),
    "huge.png": (huge_png(), PNG, "too-large", "50000x50000"),
    "no_map.jpg": (JPEG, None, "missing-map", "no saliency map"),
    "map_text.jpg": (JPEG, b"hello", "not-an-image", "is no PNG file"),
    "map_jpeg.jpg": (JPEG, encoded(blob(), "JPEG"), "not-an-image", "is no PNG file"),
    "map_rgb.jpg": (
        JPEG,
        encoded(blob().convert("RGB"), "PNG"),
        "map-format",
        "8-bit RGB pixels, expected a PNG of 8-bit grey",
    ),
    "map_palette.jpg": (JPEG, palette_png(), "map-format", "palette"),
    "map_deep.jpg": (JPEG, deep_png(), "map-format", "16-bit grey"),
    "map_bits.jpg": (JPEG, encoded(blob().convert("1"), "PNG"), "map-format", "1-bit grey"),
    "map_half.jpg": (JPEG, PNG[:-20], "undecodable", "truncated"),
    "map_turned.jpg": (JPEG, encoded(blob(HEIGHT, WIDTH), "PNG"), "size-mismatch", "map is 120x160, its image 160x120"),
    "map_larger.jpg": (JPEG, encoded(blob(320, 240), "PNG"), "size-mismatch", "320x240"),
    "map_aspect.jpg": (JPEG, encoded(blob(80, 50), "PNG"), "size-mismatch", "80x50"),
    "exif.jpg": (rotated_jpeg(), encoded(blob(HEIGHT, WIDTH), "PNG"), "size-mismatch", "EXIF rotation"),
}
INTACT: dict[str, tuple[bytes, bytes]] = {
    "plain.jpg": (JPEG, PNG),
    "upper.JPEG": (JPEG, PNG),
    "picture.png": (encoded(photo(), "PNG"), PNG),
    "deeper/plain.jpg": (JPEG, PNG),
    "größe 写真 #1.jpg": (JPEG, PNG),
    "line\nbreak, comma.jpg": (JPEG, PNG),
    "two.dots.jpg": (JPEG, PNG),
    "grey.jpg": (encoded(photo(mode="L"), "JPEG"), PNG),
    "cmyk.jpg": (encoded(photo(mode="CMYK"), "JPEG"), PNG),
    "palette.png": (encoded(photo(mode="P"), "PNG"), PNG),
    "clear.png": (encoded(photo(mode="RGBA"), "PNG"), PNG),
    "progressive.jpg": (encoded(photo(), "JPEG", progressive=True), PNG),
    "png_named.jpg": (encoded(photo(), "PNG"), PNG),
    "rotated.jpg": (rotated_jpeg(), PNG),
    "small_map.jpg": (JPEG, encoded(blob(40, 30), "PNG")),
    "rounded_map.jpg": (JPEG, encoded(blob(53, 40), "PNG")),
    "nothing.jpg": (JPEG, encoded(blob(value=0), "PNG")),
    "ones.jpg": (JPEG, encoded(blob(value=1), "PNG")),
    "at_127.jpg": (JPEG, encoded(blob(value=127), "PNG")),
    "at_128.jpg": (JPEG, encoded(blob(value=128), "PNG")),
}
EMPTY = {"nothing", "ones", "at_127"}


def write(root: Path, name: str, image: bytes, saliency: bytes | None) -> None:
    path = root / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)
    if saliency is not None:
        map_path = (root / "saliency" / name).with_suffix(".png")
        map_path.parent.mkdir(parents=True, exist_ok=True)
        map_path.write_bytes(saliency)


def build(root: Path, count: int = 3) -> tuple[Path, Path]:
    for number in range(count):
        write(root, f"p{number}.jpg", JPEG, PNG)
    return root / "images", root / "saliency"


def kinds(dataset: Dataset) -> dict[str, str]:
    return {fault.path.name: fault.kind for fault in dataset.faults}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a decoder fails the test."""

    def start(module: str) -> None:
        pytest.fail("a decoder was started")

    monkeypatch.setattr(children, "start_child", start)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """One scan over every intact and every broken file."""
    root = tmp_path_factory.mktemp("mixed")
    for name, (image, saliency, _, _) in BROKEN.items():
        write(root, name, image, saliency)
    for name, (image, saliency) in INTACT.items():
        write(root, name, image, saliency)
    write(root, "twice.jpg", JPEG, PNG)
    write(root, "twice.png", encoded(photo(), "PNG"), None)
    write(root, "both_maps.jpg", JPEG, PNG)
    (root / "saliency" / "both_maps.PNG").write_bytes(PNG)
    (root / "images" / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    (root / "saliency" / "dangling.png").write_bytes(PNG)
    (root / "images" / "linked.jpg").symlink_to(root / "images" / "plain.jpg")
    (root / "saliency" / "linked.png").symlink_to(root / "saliency" / "plain.png")
    (root / "images" / "circle.jpg").symlink_to(root / "images" / "circle.jpg")
    (root / "saliency" / "circle.png").write_bytes(PNG)
    os.mkfifo(root / "images" / "fifo.jpg")
    (root / "saliency" / "fifo.png").write_bytes(PNG)
    for hidden in (".hidden.jpg", ".thumbs/small.jpg", "readme.txt", "movie.mp4"):
        write(root, hidden, b"not looked at", None)
    (root / "images" / "deeper" / "loop").symlink_to(root / "images", target_is_directory=True)
    for side in ("images", "saliency"):  # the link comes before the folder in the order of names
        (root / side / "again").symlink_to(root / side / "deeper", target_is_directory=True)
    (root / "saliency" / "orphan.png").write_bytes(PNG)
    return scan(root / "images", root / "saliency", workers=2, manifest=root / "manifest.json")


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_file_is_named_with_its_fault(mixed: Dataset, name: str) -> None:
    _, _, kind, words = BROKEN[name]
    of_map = name.startswith("map_") or name == "exif.jpg"
    at_fault = Path(name).with_suffix(".png").name if of_map else name
    found = [fault for fault in mixed.faults if fault.path.stem == Path(name).stem]
    assert [(fault.path.name, fault.kind) for fault in found] == [(at_fault, kind)]
    assert words in found[0].message
    assert "\n" not in str(found[0])
    assert ("saliency" if of_map else "images") == found[0].path.parent.name


def test_special_files_are_faults_and_never_opened(mixed: Dataset) -> None:
    found = {fault.path.name: fault for fault in mixed.faults if fault.path.name not in BROKEN}
    assert found["twice.jpg"].kind == "duplicate-stem" and "twice.png" in found["twice.jpg"].message
    assert found["both_maps.PNG"].kind == "duplicate-stem" and "both_maps.png" in found["both_maps.PNG"].message
    assert found["dangling.jpg"].kind == "unreadable" and "link to nothing" in found["dangling.jpg"].message
    assert found["fifo.jpg"].kind == "unreadable" and "regular file" in found["fifo.jpg"].message
    assert found["circle.jpg"].kind == "unreadable" and "levels of symbolic links" in found["circle.jpg"].message
    assert len(mixed.faults) == len(BROKEN) + 5


def test_intact_files_are_samples_in_the_order_of_their_stems(mixed: Dataset) -> None:
    stems = [os.path.splitext(name)[0] for name in INTACT] + ["linked", "again/plain"]
    assert [sample.stem for sample in mixed.samples] == sorted(stems)
    assert {sample.stem for sample in mixed.samples if sample.empty} == EMPTY
    for sample in mixed.samples:
        assert sample.image.is_file() and sample.saliency is not None and sample.saliency.is_file()
        assert (sample.width, sample.height) == (WIDTH, HEIGHT)
        assert sample.saliency.relative_to(mixed.saliency or "").with_suffix("").as_posix() == sample.stem
    assert {fault.path.stem for fault in mixed.empty_maps()} == EMPTY
    assert all(fault.kind == EMPTY_MAP for fault in mixed.empty_maps())


def test_a_second_scan_decodes_nothing(tmp_path: Path, no_decoder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    images, saliency = build(tmp_path)
    write(tmp_path, "text.jpg", b"text", PNG)
    write(tmp_path, "blank.jpg", JPEG, encoded(blob(value=0), "PNG"))
    with monkeypatch.context() as patch:
        patch.setattr(children, "start_child", real_start)
        first = scan(images, saliency, workers=1)
    assert first.decoded == 10
    assert default_manifest(images, saliency).is_file()
    second = scan(images, saliency, workers=1)
    assert second.decoded == 0
    assert second == first and second.fingerprint() == first.fingerprint()


real_start = children.start_child


def test_only_changed_files_are_decoded_again(tmp_path: Path) -> None:
    images, saliency = build(tmp_path)
    manifest = tmp_path / "manifest.json"
    assert scan(images, saliency, workers=1, manifest=manifest).decoded == 6
    os.utime(images / "p0.jpg", ns=(1, 1))  # the same size, another time
    (saliency / "p1.png").write_bytes(encoded(blob(value=0), "PNG"))
    write(tmp_path, "new.jpg", JPEG, PNG)
    (images / "p2.jpg").unlink()
    changed = scan(images, saliency, workers=1, manifest=manifest)
    assert changed.decoded == 4
    assert [(s.stem, s.empty) for s in changed.samples] == [("new", False), ("p0", False), ("p1", True)]
    assert list(json.loads(manifest.read_text())["image"]) == ["new.jpg", "p0.jpg", "p1.jpg"]  # p2 is forgotten
    assert scan(images, saliency, workers=1, manifest=manifest).decoded == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: "{",
        lambda text: "[]",
        lambda text: "\0" * 100,
        lambda text: text.replace('"format":1', '"format":0'),
        lambda text: text.replace("images", "pictures"),
        lambda text: text.replace(f",{WIDTH},", ",null,", 1),
        lambda text: text.replace("p0.jpg", "p0.jpg", 1)[: len(text) // 2],
    ],
    ids=["empty", "cut", "list", "zeros", "format", "roots", "entry", "half"],
)
def test_a_damaged_manifest_is_rebuilt_with_a_word(spoil, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, saliency = build(tmp_path, count=1)
    manifest = tmp_path / "manifest.json"
    whole = scan(images, saliency, workers=1, manifest=manifest)
    content = manifest.read_text()
    manifest.write_text(spoil(content))
    with caplog.at_level(logging.WARNING, "cast_fast"):
        again = scan(images, saliency, workers=1, manifest=manifest)
    assert again == whole and again.decoded == 2
    assert "is rebuilt" in caplog.text
    assert manifest.read_text() == content


def test_a_manifest_that_cannot_be_written_costs_only_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, saliency = build(tmp_path, count=1)
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "cast_fast"):
        dataset = scan(images, saliency, workers=1, manifest=tmp_path / "file" / "manifest.json")
    assert len(dataset) == 1 and "cannot be written" in caplog.text


def test_an_interrupted_scan_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, saliency = build(tmp_path)
    decode = layout._decode

    def interrupted(jobs: list, workers: int):
        for count, result in enumerate(decode(jobs, workers)):
            if count == 4:
                raise KeyboardInterrupt
            yield result

    with monkeypatch.context() as patch:
        patch.setattr(layout, "_decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scan(images, saliency, workers=1)
    assert scan(images, saliency, workers=1).decoded == 2


def test_a_crashing_decoder_costs_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, saliency = build(tmp_path)
    program = (
        "import os, sys\n"
        "from cast_fast.data import decode_check\n"
        "answer = decode_check._answer\n"
        "def crash(request, notes):\n"
        "    if request[1].endswith('p1.jpg'): os.abort()\n"
        "    return answer(request, notes)\n"
        "decode_check._answer = crash\n"
        "decode_check.main()\n"
    )

    def start(module: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(children, "start_child", start)
    dataset = scan(images, saliency, workers=1)
    assert kinds(dataset) == {"p1.jpg": "decoder-crash"}
    assert [sample.stem for sample in dataset.samples] == ["p0", "p2"]


def test_a_decoder_that_cannot_start_is_no_fault_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, saliency = build(tmp_path, count=1)

    def start(module: str) -> subprocess.Popen[bytes]:
        program = "raise SystemExit(3)"
        return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(children, "start_child", start)
    with pytest.raises(RuntimeError, match="ended with code 3"):
        scan(images, saliency, workers=2)


def test_sector_sized_damage_to_a_jpeg_is_found() -> None:
    """Random bytes over 512 of a photograph's make libjpeg lose its place; single flipped bits often do not."""
    notes = os.memfd_create("notes")
    saved = os.dup(2)
    os.dup2(notes, 2)
    try:
        for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
            with pytest.raises(decode_check.DecodeFault, match=r"Corrupt JPEG data|Premature end"):
                decode_check.check_image(damaged(JPEG, share, 512), notes)
        assert decode_check.check_image(JPEG, notes)["kind"] == ""
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(notes)


def test_images_alone(tmp_path: Path) -> None:
    images, _ = build(tmp_path, count=2)
    dataset = scan(images, None, workers=1)
    assert [(s.stem, s.saliency, s.empty) for s in dataset.samples] == [("p0", None, False), ("p1", None, False)]
    assert dataset.decoded == 2
    assert usable(dataset, skip_invalid=False, on_empty_saliency="error") == dataset


def test_maps_inside_the_folder_of_images(tmp_path: Path) -> None:
    images, saliency = build(tmp_path, count=1)
    saliency = saliency.rename(images / "maps")
    dataset = scan(images, saliency, workers=1)
    assert [sample.stem for sample in dataset.samples] == ["p0"] and not dataset.faults


def test_pictures_of_other_kinds_are_counted(
    tmp_path: Path, no_decoder: None, caplog: pytest.LogCaptureFixture
) -> None:
    images, saliency = build(tmp_path, count=1)
    for name in ("a.webp", "b.WEBP", "c.heic", "labels.csv", "notes"):
        (images / name).write_bytes(b"")
    (saliency / "p0.jpg").write_bytes(b"")
    (saliency / "saliency.json").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "cast_fast"):
        layout.find_pairs(images, saliency)
    assert [record.getMessage() for record in caplog.records] == [
        f"{images}: 3 pictures are not .jpeg, .jpg, .png and not read (.webp: 2, .heic: 1)",
        f"{saliency}: 1 pictures are not .png and not read (.jpg: 1)",
    ]


def test_folders_that_hold_no_dataset(tmp_path: Path, no_decoder: None) -> None:
    images, saliency = build(tmp_path, count=1)
    empty = tmp_path / "empty"
    (empty / "below").mkdir(parents=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.png").write_bytes(PNG)
    for arguments, words in (
        ((tmp_path / "nowhere", saliency), r"--images: .*nowhere is missing"),
        ((images, tmp_path / "nowhere"), r"--saliency: .*nowhere is missing"),
        ((images / "p0.jpg", saliency), "is not a folder"),
        ((empty, saliency), r"--images: .*empty holds no \.jpg, \.jpeg or \.png file"),
        ((empty, None), "holds no"),
        ((images, empty), r"holds no map of any image, expected for example p0\.png"),
        ((images, other), "holds no map of any image"),
        ((images, images), "the same folder"),
    ):
        with pytest.raises(UserError, match=words):
            scan(*arguments, workers=1)
    with pytest.raises(UserError, match="workers: got 0"):
        scan(images, saliency, workers=0)


def test_fingerprint_depends_on_stems_and_sizes_only(tmp_path: Path) -> None:
    first = scan(*build(tmp_path / "a"), workers=1)
    moved = scan(*build(tmp_path / "b"), workers=1)
    fewer = scan(*build(tmp_path / "c", count=2), workers=1)
    write(tmp_path / "b", "p0.jpg", encoded(photo(80, 60), "JPEG"), encoded(blob(80, 60), "PNG"))
    resized = scan(moved.images, moved.saliency, workers=1)
    assert first.fingerprint() == moved.fingerprint()
    assert len({data.fingerprint() for data in (first, fewer, resized)}) == 3


def test_labels(tmp_path: Path) -> None:
    images, saliency = build(tmp_path)
    table = tmp_path / "labels.csv"
    table.write_text("\ufeffstem,class,source\np0,cat,web\np2,dog,web\nelsewhere,cow,web\n", encoding="utf-8")
    dataset = scan(images, saliency, labels=table, workers=1)
    assert [sample.label for sample in dataset.samples] == ["cat", None, "dog"]
    table.write_text("stem,class\np0.jpg,cat\n")
    with pytest.raises(UserError, match=r"names no image: it has 'p0\.jpg', the images have 'p0'"):
        scan(images, saliency, labels=table, workers=1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name,class\na,cat\n", "no column stem"),
        (b"", "no column class, stem"),
        (b"stem,class\na,cat\na,dog\n", "line 3: 'a' has two classes"),
        (b"stem,class\na\n", "line 2: stem or class is empty"),
        (b"stem,class\n\xff\xfe,cat\n", "UTF-8"),
    ],
)
def test_faulty_labels(tmp_path: Path, content: bytes, words: str) -> None:
    table = tmp_path / "labels.csv"
    table.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_labels(table)


def test_missing_labels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*labels\.csv"):
        read_labels(tmp_path / "labels.csv")


def test_usable_refuses_or_leaves_out_and_records(mixed: Dataset) -> None:
    with pytest.raises(UserError) as refused:
        usable(mixed, skip_invalid=False, on_empty_saliency="unconstrained")
    message = str(refused.value)
    assert message.startswith(f"{len(mixed.faults)} faulty files (") and "--skip-invalid" in message
    assert str(mixed.faults[0]) in message and f"and {len(mixed.faults) - 3} more" in message

    with pytest.raises(UserError, match=r"3 empty saliency maps .*--on-empty-saliency"):
        usable(mixed, skip_invalid=True, on_empty_saliency="error")

    kept = usable(mixed, skip_invalid=True, on_empty_saliency="unconstrained")
    assert kept.samples == mixed.samples and kept.faults == mixed.faults
    skipped = usable(mixed, skip_invalid=True, on_empty_saliency="skip")
    assert [s for s in mixed.samples if not s.empty] == list(skipped.samples)
    assert skipped.faults == mixed.faults + mixed.empty_maps()

    with pytest.raises(ValueError, match="got on_empty_saliency 'ignore'"):
        usable(mixed, skip_invalid=True, on_empty_saliency="ignore")
    with pytest.raises(UserError, match="no usable image is left"):
        usable(Dataset((), mixed.faults, mixed.images, mixed.saliency), skip_invalid=True, on_empty_saliency="skip")


def test_validate_prints_a_summary_and_writes_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, saliency = build(tmp_path, count=2)
    out = tmp_path / "faults.jsonl"
    arguments = ["validate", "--images", str(images), "--saliency", str(saliency), "--out", str(out), "--workers", "1"]
    assert cli.main(arguments) == 0
    assert "2 intact pairs" in capsys.readouterr().out
    assert out.read_text() == ""

    write(tmp_path, "line\nbreak.jpg", b"text", PNG)
    write(tmp_path, "blank.jpg", JPEG, encoded(blob(value=0), "PNG"))
    assert cli.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "not-an-image: 1" in printed and "empty-map: 1" in printed and "line\\nbreak.jpg" in printed
    listed = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(Path(row["path"]).name, row["kind"]) for row in listed] == [
        ("line\nbreak.jpg", "not-an-image"),
        ("blank.png", "empty-map"),
    ]


def test_validate_reports_a_users_mistake_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, saliency = build(tmp_path, count=1)
    assert cli.main(["validate", "--images", str(tmp_path / "nowhere"), "--saliency", str(saliency)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cast-fast: error: --images") and error.count("\n") == 1
    listing = str(tmp_path / "absent" / "list")
    assert cli.main(["validate", "--images", str(images), "--out", listing, "--workers", "1"]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_folders_that_may_not_be_read(tmp_path: Path, no_decoder: None) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs to be root, to become somebody else")
    images, saliency = build(tmp_path)
    tmp_path.chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"--images: .*images cannot be read: Permission denied"):
            scan(images, saliency)
        with pytest.raises(UserError, match=r"--data: .*images cannot be read: Permission denied"):
            shards.scan_shards(images)
        with pytest.raises(UserError, match=r"SHARDS: .*images cannot be read: Permission denied"):
            index_shards(images, tmp_path / "index")
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("kind", ["image", "map", "map-npy"])
def test_a_file_that_is_larger_than_any_picture_is_not_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)
    monkeypatch.setattr(decode_check, "_MAX_BYTES", 1000)
    for place in ((), (512, 2**39)):
        reply = decode_check._answer((kind, str(tmp_path / "huge"), *place), 0)
        assert (reply["kind"], reply["message"]) == ("too-large", "has more than 1000 bytes")


def test_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, saliency = build(tmp_path, count=1)
    try:
        (images / os.fsdecode(b"caf\xe9.jpg")).write_bytes(JPEG)
        (saliency / os.fsdecode(b"caf\xe9.png")).write_bytes(PNG)
        (images / os.fsdecode(b"th\xe9.jpg")).write_bytes(b"text")
        (saliency / os.fsdecode(b"th\xe9.png")).write_bytes(PNG)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    out = tmp_path / "list"
    arguments = ["validate", "--images", str(images), "--saliency", str(saliency), "--out", str(out), "--workers", "1"]
    assert cli.main(arguments) == 1
    assert "2 intact pairs" in capsys.readouterr().out
    (row,) = map(json.loads, out.read_text().splitlines())
    assert os.fsencode(Path(row["path"]).name) == b"th\xe9.jpg"
    assert scan(images, saliency, workers=1).decoded == 0


def test_a_fault_is_one_printable_line() -> None:
    assert str(Fault(Path("a\nb.jpg"), "damaged", "is damaged")) == "'a\\nb.jpg': is damaged"
