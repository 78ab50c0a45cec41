"""Packing: what gets in, what is converted, what is refused and why; whole shards or none; going on after a stop."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import killed
import numpy as np
import pytest
from PIL import Image, ImageOps

from cast_fast import cli
from cast_fast.data import children, pack_sample, prepare, shards
from cast_fast.data.pack_sample import PackRule, decode_stored, shrink_map, store_map, upright
from cast_fast.data.prepare import Summary
from cast_fast.errors import UserError
from cast_fast.files import exclusive

WIDTH, HEIGHT = 160, 120


def photo(width: int = WIDTH, height: int = HEIGHT, mode: str = "RGB", seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(cv2.GaussianBlur(noise, (0, 0), 1.5)).convert(mode)


def blob(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A map that no rotation or flip leaves as it is."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 8 : height // 2, width // 8 : width // 3] = 255
    return Image.fromarray(mask)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int, picture: Image.Image | None = None) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture or photo(), "JPEG", exif=exif, quality=95, subsampling=0)


def deep_png(values: np.ndarray) -> bytes:
    """16-bit values that round to these, their low bytes unlike their high ones."""
    near = np.random.default_rng(2).integers(-100, 101, values.shape)
    deep = np.clip(values.astype(np.int64) * 257 + near, 0, 65535)
    done, content = cv2.imencode(".png", deep.astype(np.uint16))
    assert done
    return content.tobytes()


def damaged(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + np.random.default_rng(1).bytes(512) + data[at + 512 :]


JPEG = encoded(photo(), "JPEG", quality=90)
PNG = encoded(blob(), "PNG")


def bomb() -> bytes:
    header = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + PNG[24:29]
    return PNG[:12] + header + zlib.crc32(header).to_bytes(4, "big") + PNG[33:]


def no_size() -> bytes:
    header = b"IHDR" + bytes(8) + PNG[24:29]
    return PNG[:12] + header + zlib.crc32(header).to_bytes(4, "big") + PNG[33:]


def write(root: Path, files: Mapping[str, tuple[bytes, bytes | None]]) -> tuple[Path, Path]:
    images, saliency = root / "images", root / "saliency"
    for name, (image, map_) in files.items():
        path = images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
        if map_ is not None:
            target = (saliency / name).with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(map_)
    saliency.mkdir(exist_ok=True)
    return images, saliency


def pack(root: Path, out: str = "out", **options: Any) -> Summary:
    rule = options.pop("rule", PackRule())
    options.setdefault("workers", 1)
    saliency = options.pop("saliency", root / "saliency")
    return prepare.prepare(root / "images", saliency, root / out, rule=rule, **options)


def members(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                assert member.isfile() and member.name not in found
                content = archive.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
    return found


def stored_map(content: bytes, suffix: str = "jpg") -> np.ndarray:
    return decode_stored(content, suffix) > 127


# What a shard holds


def test_images_keep_their_bytes_and_members_stand_where_the_indices_say(tmp_path: Path) -> None:
    png = encoded(photo(seed=2), "PNG")
    files = {
        "plain.jpg": (JPEG, PNG),
        "deeper/two.dots and space.jpg": (JPEG, PNG),
        "größe %41.jpg": (JPEG, PNG),
        "picture.PNG": (png, PNG),
        "png_named.jpg": (png, PNG),
        "progressive.jpeg": (encoded(photo(), "JPEG", progressive=True), PNG),
        "long_" + "x" * 200 + ".jpg": (JPEG, PNG),
    }
    images, _ = write(tmp_path, files)
    (images / "notes.txt").write_text("not read")
    (images / "movie.gif").write_bytes(b"GIF89a")
    (images / ".hidden.jpg").write_bytes(JPEG)
    labels = tmp_path / "labels.csv"
    labels.write_text("stem,class\nplain,rabbit\npicture,cat\n")
    summary = pack(tmp_path, labels=labels, shard_samples=3)
    assert (summary.samples, summary.shards, summary.rejects, summary.changes) == (7, 3, (), {})

    found = members(tmp_path / "out")
    for name, (image, _) in files.items():
        key = shards.key_of(os.path.splitext(name)[0])
        suffix = "png" if image is png else "jpg"
        assert found[f"{key}.{suffix}"] == image
        assert stored_map(found[f"{key}.saliency.jpg"]).shape == (120, 160)
    assert "deeper/two%2Edots%20and%20space.jpg" in found
    assert {name: found[name] for name in found if name.endswith(".cls")} == {"plain.cls": b"1", "picture.cls": b"0"}
    assert len(found) == 2 * 7 + 2

    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["complete"] and manifest["classes"] == ["cat", "rabbit"]
    assert manifest["counts"]["packed"] == manifest["counts"]["candidates"] == 7
    assert manifest["tools"].keys() == {"cast_fast", "python", "numpy", "opencv", "pillow"}
    assert manifest["source"]["maps"] == {"method": "unknown", "supervised": None}
    for record in manifest["shards"]:
        shard = (tmp_path / "out" / f"{record['name']}.tar").read_bytes()
        assert hashlib.sha256(shard).hexdigest() == record["sha256"] and len(shard) == record["bytes"]
        first, *lines = (tmp_path / "out" / f"{record['name']}.idx").read_text().splitlines()
        assert first == f"v1.2 {record['samples']}" and len(lines) == record["samples"]
        for line in lines:
            words = line.split(" ")
            for suffix, offset, size, name in zip(*[iter(words)] * 4):
                assert name.partition(".")[2] == suffix
                assert shard[int(offset) :][: int(size)] == found[name]


def test_samples_of_a_shard_follow_the_webdataset_convention(tmp_path: Path) -> None:
    """Members of a sample are neighbours and share all of the name before the first dot of the last part."""
    write(tmp_path, {f"folder.d/{i}.a.jpg": (JPEG, PNG) for i in range(3)})
    pack(tmp_path)
    names = list(members(tmp_path / "out"))
    keys = []
    for name in names:
        folder, base = os.path.split(name)
        keys.append(os.path.join(folder, base.split(".", 1)[0]))
    assert keys == [key for key in dict.fromkeys(keys) for _ in range(2)]
    assert [name.split(".", 1)[1] for name in names[:2]] == ["jpg", "saliency.jpg"]


@pytest.mark.parametrize("stem", ["/etc/x", "../x", "a/../x", "a//x", "a/./x", "", "a/", "nul\0"])
def test_names_that_leave_the_root_have_no_key(stem: str) -> None:
    with pytest.raises(ValueError, match="below the root"):
        shards.key_of(stem)


def test_keys_differ_where_stems_do() -> None:
    stems = ["a.b", "a%2Eb", "a b", "a%20b", "a/b", "a%2Fb", "ä", "\udce4", "a\nb"]
    keys = [shards.key_of(stem) for stem in stems]
    assert len(set(keys)) == len(stems)
    assert all(key.isascii() and " " not in key and "." not in key and "\n" not in key for key in keys)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotations_are_those_of_pillow(orientation: int) -> None:
    picture = photo(6, 4)
    exif = picture.getexif()
    exif[0x0112] = orientation
    expected = ImageOps.exif_transpose(picture)
    assert expected is not None
    np.testing.assert_array_equal(upright(np.asarray(picture), orientation), np.asarray(expected))


@pytest.mark.parametrize("orientation", [2, 3, 6, 7])
def test_image_and_map_are_turned_alike(orientation: int, tmp_path: Path) -> None:
    """The picture is its own map here, so that any difference in their geometry shows."""
    picture = blob().convert("RGB")
    write(tmp_path, {"a.jpg": (turned(orientation, picture), PNG)})
    summary = pack(tmp_path)
    assert summary.changes == {"map-rotated": 1, "rotated": 1}
    found = members(tmp_path / "out")
    with Image.open(io.BytesIO(found["a.jpg"])) as image:
        assert image.getexif().get(0x0112, 1) == 1
        bright = np.asarray(image.convert("L")) > 127
    assert bright.shape == ((160, 120) if orientation > 4 else (120, 160))
    assert (bright != stored_map(found["a.saliency.jpg"])).mean() < 0.01
    assert (bright != upright(np.asarray(blob()) > 127, orientation)).mean() < 0.01


def test_a_map_made_of_the_upright_image_stays_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": (turned(6), encoded(blob(HEIGHT, WIDTH), "PNG"))})
    assert pack(tmp_path).changes == {"map-upright": 1, "rotated": 1}
    found = members(tmp_path / "out")
    assert (stored_map(found["a.saliency.jpg"]) != (np.asarray(blob(HEIGHT, WIDTH)) > 127)).mean() < 0.01


def test_cmyk_and_16_bit_are_converted(tmp_path: Path) -> None:
    colours = np.asarray(photo())
    files = {
        "cmyk.jpg": (encoded(photo(mode="CMYK"), "JPEG", quality=95), PNG),
        "deep.png": (deep_png(colours[:, :, ::-1]), deep_png(np.asarray(blob()))),
        "deep_grey.png": (deep_png(np.asarray(photo(mode="L"))), PNG),
        "deep_alpha.png": (deep_png(np.dstack([colours[:, :, ::-1], colours[:, :, :1]])), PNG),
    }
    write(tmp_path, files)
    summary = pack(tmp_path)
    assert summary.rejects == () and summary.changes == {"16-bit": 3, "cmyk": 1, "map-16-bit": 1}
    found = members(tmp_path / "out")
    for name, expected in {"cmyk": colours, "deep": colours, "deep_alpha": colours}.items():
        with Image.open(io.BytesIO(found[f"{name}.jpg"])) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (WIDTH, HEIGHT))
            assert np.abs(np.asarray(image).astype(int) - expected).mean() < 4
    np.testing.assert_array_equal(stored_map(found["deep.saliency.jpg"]), stored_map(found["cmyk.saliency.jpg"]))


def test_short_side_shrinks_larger_images_only(tmp_path: Path) -> None:
    small = encoded(photo(48, 40), "JPEG")
    write(tmp_path, {"large.jpg": (JPEG, PNG), "small.jpg": (small, encoded(blob(48, 40), "PNG"))})
    assert pack(tmp_path, rule=PackRule(short_side=60)).changes == {"resized": 1}
    found = members(tmp_path / "out")
    assert found["small.jpg"] == small
    with Image.open(io.BytesIO(found["large.jpg"])) as image:
        assert image.size == (80, 60)
        reference = photo().resize((80, 60), Image.Resampling.BOX).convert("L")  # noise loses its colours in JPEG
        assert np.abs(np.asarray(image.convert("L")).astype(int) - np.asarray(reference)).mean() < 3


# Maps


@pytest.mark.parametrize("kind", ["jpeg", "npy", "png"])
def test_stored_maps_hold_the_salient_share_of_each_pixel(kind: str) -> None:
    mask = np.zeros((300, 400), bool)
    mask[100:203, 48:252] = True
    stored, larger = store_map(mask, PackRule(map_side=100, map_format=kind))
    assert (stored.height, stored.width, stored.empty, larger) == (75, 100, False, False)
    values = decode_stored(stored.content, stored.suffix)
    exact = mask.reshape(75, 4, 100, 4).mean(axis=(1, 3)) * 255
    assert np.abs(values - exact).max() <= (0.5 if kind != "jpeg" else 24)
    # row 50 is three quarters salient
    np.testing.assert_array_equal(values > 127, exact > 127)


def test_a_small_object_is_stored_larger_rather_than_lost() -> None:
    mask = np.zeros((1200, 1600), bool)
    mask[600:605, 800:805] = True
    assert not (shrink_map(mask, 160) > 127).any()
    for kind in ("jpeg", "npy", "png"):
        stored, larger = store_map(mask, PackRule(map_format=kind))
        assert larger and not stored.empty and stored.width > 160
        assert (decode_stored(stored.content, stored.suffix) > 159).any()
    lone = np.zeros((200, 200), bool)
    lone[101, 51] = True
    stored, larger = store_map(lone, PackRule())
    assert larger and not stored.empty and (decode_stored(stored.content, stored.suffix) > 127).sum() == 1


def test_empty_maps_are_packed_and_counted(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": (JPEG, encoded(Image.new("L", (WIDTH, HEIGHT), 127), "PNG")), "b.jpg": (JPEG, PNG)})
    summary = pack(tmp_path)
    assert (summary.samples, summary.empty) == (2, 1)
    assert [(s.stem, s.empty) for s in shards.scan_shards(tmp_path / "out").samples] == [("a", True), ("b", False)]


# What is refused


def test_faulty_files_stay_out_and_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: dict[str, tuple[bytes, bytes | None, str, str]] = {
        "half.jpg": (JPEG[: len(JPEG) // 2], PNG, "images/half.jpg", "undecodable"),
        "noise.jpg": (damaged(JPEG), PNG, "images/noise.jpg", "damaged"),
        "text.jpg": (b"<html>", PNG, "images/text.jpg", "not-an-image"),
        "gif.png": (encoded(photo(mode="P"), "GIF"), PNG, "images/gif.png", "not-an-image"),
        "empty.jpg": (b"", PNG, "images/empty.jpg", "empty-file"),
        "bomb.png": (bomb(), PNG, "images/bomb.png", "too-large"),
        "flat.png": (no_size(), PNG, "images/flat.png", "undecodable"),
        "alone.jpg": (JPEG, None, "images/alone.jpg", "missing-map"),
        "map_bomb.jpg": (JPEG, bomb(), "saliency/map_bomb.png", "too-large"),
        "map_rgb.jpg": (JPEG, encoded(photo(), "PNG"), "saliency/map_rgb.png", "map-format"),
        "map_half.jpg": (JPEG, PNG[:-20], "saliency/map_half.png", "undecodable"),
        "map_empty.jpg": (JPEG, b"", "saliency/map_empty.png", "empty-file"),
        "map_other.jpg": (JPEG, encoded(blob(80, 50), "PNG"), "saliency/map_other.png", "size-mismatch"),
        "map_turned.jpg": (JPEG, encoded(blob(HEIGHT, WIDTH), "PNG"), "saliency/map_turned.png", "size-mismatch"),
    }
    files = {name: case[:2] for name, case in cases.items()} | {"good.jpg": (JPEG, PNG)}
    images, _ = write(tmp_path, files)
    (images / "link.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "saliency" / "link.png").write_bytes(PNG)
    arguments = ["prepare", *(str(tmp_path / name) for name in ("images", "saliency", "out")), "--workers", "2"]
    assert cli.main(arguments) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    found = {os.path.relpath(row["path"], tmp_path): row["kind"] for row in manifest["rejects"]}
    assert found == {path: kind for _, _, path, kind in cases.values()} | {"images/link.jpg": "unreadable"}
    assert all(row["message"] for row in manifest["rejects"])
    assert manifest["counts"]["candidates"] == 16 and manifest["counts"]["packed"] == 1
    assert manifest["counts"]["rejected"]["size-mismatch"] == 2
    assert set(members(tmp_path / "out")) == {"good.jpg", "good.saliency.jpg"}
    printed = capsys.readouterr().out
    assert "1 samples in 1 shard (" in printed and "rejected, size-mismatch: 2, for example" in printed


def test_nothing_to_pack_is_an_error_and_leaves_no_dataset(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": (b"x", PNG)})
    with pytest.raises(UserError, match=r"no sample could be packed, 1 were rejected: .*a\.jpg"):
        pack(tmp_path)
    with pytest.raises(UserError, match="unfinished"):
        shards.scan_shards(tmp_path / "out")


def test_a_crashing_decoder_costs_one_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {f"p{i}.jpg": (JPEG, PNG) for i in range(3)})
    program = (
        "import os\n"
        "from cast_fast.data import children, pack_sample\n"
        "def answer(request, notes):\n"
        "    if request[0].endswith('p1.jpg'): os.abort()\n"
        "    return pack_sample._answer(request, notes)\n"
        "children.serve(answer)\n"
    )

    def start(module: str) -> subprocess.Popen[bytes]:
        assert module == "cast_fast.data.pack_sample"
        return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(children, "start_child", start)
    summary = pack(tmp_path)
    assert [(fault.path.name, fault.kind) for fault in summary.rejects] == [("p1.jpg", "decoder-crash")]
    assert summary.samples == 2


# Whole shards, the same bytes, going on


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    write(tmp_path, {f"p{i}.jpg": (encoded(photo(seed=i), "JPEG"), PNG) for i in range(12)})
    pack(tmp_path, "one", workers=1, shard_samples=5)
    pack(tmp_path, "three", workers=3, shard_samples=5)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    order = [name for name in members(tmp_path / "one") if name.endswith(".saliency.jpg")]
    assert order != sorted(order)  # mixed, for readers that stream shards


def test_a_stopped_run_goes_on_with_the_shards_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {f"p{i}.jpg": (encoded(photo(seed=i), "JPEG"), PNG) for i in range(9)})
    pack(tmp_path, "whole", shard_samples=3)
    original = prepare._packed

    def stopped(pairs, rule, workers):
        for count, result in enumerate(original(pairs, rule, workers)):
            if count == 4:
                raise KeyboardInterrupt
            yield result

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_packed", stopped)
        with pytest.raises(KeyboardInterrupt):
            pack(tmp_path, shard_samples=3)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        ".cast-fast.lock", "manifest.json", "shard-000000.idx", "shard-000000.json", "shard-000000.tar"
    ]  # fmt: skip
    with pytest.raises(UserError, match="unfinished: run the same"):
        shards.scan_shards(out)
    before = (out / "shard-000000.tar").stat().st_mtime_ns
    summary = pack(tmp_path, shard_samples=3)
    assert (summary.kept, summary.shards, summary.samples) == (1, 3, 9)
    assert (out / "shard-000000.tar").stat().st_mtime_ns == before
    assert contents(out) == contents(tmp_path / "whole")


def test_only_shards_whose_files_changed_are_written_again(tmp_path: Path) -> None:
    images, saliency = write(tmp_path, {f"p{i}.jpg": (encoded(photo(seed=i), "JPEG"), PNG) for i in range(6)})
    pack(tmp_path, shard_samples=2)
    out = tmp_path / "out"
    assert pack(tmp_path, shard_samples=2).kept == 3
    (out / "shard-000001.tar").write_bytes((out / "shard-000001.tar").read_bytes()[:-512])
    assert pack(tmp_path, shard_samples=2).kept == 2
    assert shards.verify(out) == []
    changed = json.loads((out / "shard-000002.json").read_text())["samples"][0][0]
    (images / f"{changed}.jpg").write_bytes(encoded(photo(seed=99), "JPEG"))
    assert pack(tmp_path, shard_samples=2).kept == 2
    assert members(out)[f"{changed}.jpg"] == encoded(photo(seed=99), "JPEG")
    for stem in [row[0] for row in json.loads((out / "shard-000002.json").read_text())["samples"]]:
        (images / f"{stem}.jpg").unlink()
    assert pack(tmp_path, shard_samples=2).shards == 2
    assert not list(out.glob("shard-000002*"))
    assert len(shards.scan_shards(out)) == 4
    assert saliency.is_dir()


def test_a_full_disk_is_told_in_a_line_and_costs_no_complete_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {f"p{i}.jpg": (JPEG, PNG) for i in range(4)})
    add = prepare._TarWriter.add

    def full(self: Any, name: str, content: bytes) -> int:
        if shards_done := len(list((tmp_path / "out").glob("*.tar"))):
            assert shards_done == 1
            raise OSError(28, "No space left on device")
        return add(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(prepare._TarWriter, "add", full)
        with pytest.raises(UserError, match="no space left; the shards that are complete stay"):
            pack(tmp_path, shard_samples=2)
    assert not list((tmp_path / "out").glob("*.part"))
    assert pack(tmp_path, shard_samples=2).kept == 1


def test_a_shard_that_is_being_replaced_has_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the new archive and its index must not leave the old index beside it."""
    images, _ = write(tmp_path, {"a.jpg": (JPEG, PNG)})
    pack(tmp_path)
    os.utime(images / "a.jpg", ns=(1, 1))
    whole = prepare.write_whole

    def stopped(path: Path, content: str, *, durable: bool) -> None:
        if path.suffix == ".idx":
            raise OSError(5, "Input/output error")
        whole(path, content, durable=durable)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_whole", stopped)
        with pytest.raises(UserError, match="Input/output error"):
            pack(tmp_path)
    assert not (tmp_path / "out" / "shard-000000.json").exists()
    assert pack(tmp_path).kept == 0


def test_other_settings_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": (JPEG, PNG)})
    pack(tmp_path)
    with pytest.raises(UserError, match=r'"side": 160.* then, .*"side": 64.* now'):
        pack(tmp_path, rule=PackRule(map_side=64))
    with pytest.raises(UserError, match=r"is not empty and has no manifest\.json"):
        pack(tmp_path, "images")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        pack(tmp_path, "file")
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is damaged: delete the folder"):
        pack(tmp_path)


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    images, saliency = write(tmp_path, {"a.jpg": (JPEG, PNG)})
    out = tmp_path / "out"
    pack(tmp_path)
    before = contents(out)
    command = [sys.executable, "-m", "cast_fast", "prepare", images, saliency, out]
    with exclusive(out / ".cast-fast.lock", "this test"):
        result = subprocess.run(command, capture_output=True, text=True, env=killed.environment())
    assert result.returncode == 2
    assert f"in use by another cast-fast prepare (process {os.getpid()} on " in result.stderr
    assert contents(out) == before and json.loads((out / "manifest.json").read_text())["complete"]


def test_a_killed_run_leaves_nothing_that_the_next_one_does_not_clear(tmp_path: Path) -> None:
    """SIGKILL in place of each rename: of manifests, archives and indices."""
    images, saliency = write(tmp_path, {f"p{i}.jpg": (encoded(photo(seed=i), "JPEG"), PNG) for i in range(4)})
    pack(tmp_path, "whole", shard_samples=2)
    whole = contents(tmp_path / "whole").keys()
    kept = []
    for number in range(1, 20):
        out = tmp_path / f"out{number}"
        command = ["prepare", images, saliency, out, "--shard-samples", "2", "--workers", "1"]
        if not killed.killed_at_rename(number, *command):
            break
        assert [path.suffix for path in out.iterdir()].count(".part") == 1
        kept.append(pack(tmp_path, out.name, shard_samples=2).kept)
        assert contents(out).keys() == whole and shards.verify(out) == []
        for name in whole - {".cast-fast.lock"}:
            assert contents(out)[name] == contents(tmp_path / "whole")[name]
    assert kept == [0, 0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda index: index["samples"][0].pop(),
        lambda index: index["samples"][0][1].__setitem__(1, 10**9),
        lambda index: index["samples"][0][1].__setitem__(1, 512.0),
        lambda index: index["samples"][0].__setitem__(3, "no"),
        lambda index: index["samples"][0].__setitem__(0, "../up"),
        lambda index: index["samples"][0].__setitem__(4, 7),
        lambda index: index.pop("changes"),
        lambda index: index["changes"].__setitem__("cmyk", "many"),
        lambda index: index["rejects"].append({}),
        lambda index: index["rejects"].append({"path": "a", "kind": "b", "message": "c"}),
        lambda index: index["rejects"].append({"part": "cls", "path": "a", "kind": "b", "message": "c"}),
        lambda index: index.__setitem__("version", 0),
    ],
    ids=[
        "short-row",
        "outside",
        "fraction",
        "flag",
        "stem",
        "class",
        "none",
        "count",
        "reject",
        "part",
        "other",
        "version",
    ],
)
def test_a_damaged_index_is_not_taken_into_the_manifest(spoil: Any, tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": (JPEG, PNG)})
    pack(tmp_path)
    path = tmp_path / "out" / "shard-000000.json"
    whole = path.read_bytes()
    index = json.loads(whole)
    spoil(index)
    path.write_text(json.dumps(index))
    assert pack(tmp_path).kept == 0
    assert path.read_bytes() == whole


def test_there_are_no_more_shards_than_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {f"p{i}.jpg": (JPEG, PNG) for i in range(3)})
    monkeypatch.setattr(shards, "MOST", 2)
    assert pack(tmp_path, shard_samples=2).shards == 2
    with pytest.raises(UserError, match="got 3 shards, expected at most 2"):
        pack(tmp_path, "other", shard_samples=1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--map-side", "3"], "--map-side: got 3, expected at least 16"),
        (["--short-side", "-1"], "--short-side: got -1"),
        (["--quality", "0"], "--quality: got 0, expected 1 to 100"),
        (["--workers", "0"], "--workers: got 0"),
        (["--shard-samples", "0"], "--shard-samples: got 0"),
        (["--labels", "{root}/none.csv"], "cannot read"),
        (["--map-format", "tiff"], "invalid choice: 'tiff'"),
    ],
)
def test_a_users_mistake_is_one_line(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {"a.jpg": (JPEG, PNG)})
    flags = [flag.format(root=tmp_path) for flag in flags]
    try:
        code = cli.main(
            ["prepare", str(tmp_path / "images"), str(tmp_path / "saliency"), str(tmp_path / "out"), *flags]
        )
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_where_maps_come_from_is_taken_over(tmp_path: Path) -> None:
    _, saliency = write(tmp_path, {"a.jpg": (JPEG, PNG)})
    source = {"method": "onnx", "supervised": True, "model": {"name": "u2net.onnx"}}
    (saliency / "saliency.json").write_text(json.dumps(source))
    pack(tmp_path)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["maps"] == source
    (saliency / "saliency.json").write_text("[")
    with pytest.raises(UserError, match="expected where the maps come from as JSON"):
        pack(tmp_path, "other")


def test_images_alone_are_packed_for_moco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels.csv").write_text("stem,class\na,cat\n")
    images, _ = write(tmp_path, {"a.jpg": (JPEG, None), "b.jpg": (turned(6), None), "bad.jpg": (JPEG[:900], None)})
    arguments = [str(images), str(tmp_path / "out"), "--labels", str(tmp_path / "labels.csv"), "--workers", "1"]
    assert cli.main(["prepare", *arguments, "--images-only"]) == 0
    assert "2 samples in 1 shard (" in capsys.readouterr().out
    found = members(tmp_path / "out")
    assert sorted(found) == ["a.cls", "a.jpg", "b.jpg"]
    assert found["a.jpg"] == JPEG
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["maps"] is None
    assert manifest["source"]["saliency"] is None
    assert [reject["kind"] for reject in manifest["rejects"]] == ["undecodable"]
    dataset = shards.scan_shards(tmp_path / "out")
    assert [(s.stem, s.saliency, s.empty, s.label) for s in dataset.samples] == [
        ("a", None, False, "cat"), ("b", None, False, None),
    ]  # fmt: skip
    assert (dataset.samples[1].width, dataset.samples[1].height) == (HEIGHT, WIDTH)  # turned upright
    assert dataset.empty_maps() == ()
    with pytest.raises(UserError, match="without saliency maps"):
        shards.scan_shards(tmp_path / "out", need_maps=True)
    assert shards.verify(tmp_path / "out") == []

    assert cli.main(["prepare", *arguments]) == 2
    assert "--images-only" in capsys.readouterr().err
    assert cli.main(["prepare", str(images), str(images), str(tmp_path / "out"), "--images-only"]) == 2
    with pytest.raises(UserError, match="other settings"):
        pack(tmp_path, saliency=None, rule=PackRule(short_side=16))


def test_an_answer_that_ends_early_is_a_crash() -> None:
    stream = io.BytesIO(b"abc")
    header = {"lengths": [2, 5], "suffix": "jpg", "width": 1, "height": 1, "map": ["jpg", 1, 1, False], "changes": []}
    with pytest.raises(EOFError):
        pack_sample._read_answer(json.dumps(header).encode(), stream.read)


def test_validate_compares_the_contents_of_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, {"a.jpg": (JPEG, PNG)})
    pack(tmp_path)
    assert cli.main(["validate", "--data", str(tmp_path / "out")]) == 0
    shard = tmp_path / "out" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[900] ^= 1
    shard.write_bytes(content)
    assert cli.main(["validate", "--data", str(tmp_path / "out")]) == 1
    assert "damaged: 1" in capsys.readouterr().out
    assert cli.main(["validate", "--data", str(tmp_path / "out"), "--images", str(tmp_path)]) == 2
