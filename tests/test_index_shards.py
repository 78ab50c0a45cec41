"""Shards that somebody else has made: what their index holds, what is refused, and that training reads them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cast_fast import cli
from cast_fast.data import index_shards as indexing
from cast_fast.data.index_shards import index_shards
from cast_fast.data.layout import Member, read_bytes
from cast_fast.data.shards import scan_shards, verify
from cast_fast.errors import UserError

HEIGHT, WIDTH = 60, 80


def picture(seed: int = 0, kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def values(peak: int = 255, height: int = 15, width: int = 20) -> np.ndarray:
    array = np.zeros((height, width), np.uint8)
    array[3:9, 4:12] = peak
    return array


def grey(kind: str = "PNG", peak: int = 255, **shape: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values(peak, **shape)).save(buffer, kind)
    return buffer.getvalue()


def array(content: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, content)
    return buffer.getvalue()


def write(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


GOOD = {
    "one/a.jpg": picture(1),
    "one/a.saliency.png": grey(),
    "one/a.cls": b"cat\n",
    "one/a.json": b"{}",
    "./b.JPEG": picture(2),
    "./b.saliency.jpg": grey("JPEG"),
}
MORE = {"c.png": picture(3, "PNG"), "c.cls": b"7", "c.saliency.npy": array(values(peak=90))}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    write(tmp_path / "shards" / "train-0.tar", GOOD)
    write(tmp_path / "shards" / "train-1.tar", MORE)
    return tmp_path / "shards"


def test_members_are_found_where_they_lie(foreign: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in foreign.iterdir()}
    summary = index_shards(foreign, tmp_path / "index", workers=2)
    assert (summary.samples, summary.shards, summary.empty, summary.rejects) == (3, 2, 1, ())
    dataset = scan_shards(tmp_path / "index", need_maps=True)
    assert [(s.stem, s.label, s.width, s.height, s.map_shape, s.empty) for s in dataset.samples] == [
        ("b", None, WIDTH, HEIGHT, (15, 20), False),
        ("c", "7", WIDTH, HEIGHT, (15, 20), True),
        ("one/a", "cat", WIDTH, HEIGHT, (15, 20), False),
    ]
    contents = GOOD | MORE
    for sample, image, saliency in zip(
        dataset.samples,
        ("./b.JPEG", "c.png", "one/a.jpg"),
        ("./b.saliency.jpg", "c.saliency.npy", "one/a.saliency.png"),
        strict=True,
    ):
        assert sample.saliency is not None
        assert read_bytes(sample.image) == contents[image]
        assert read_bytes(sample.saliency) == contents[saliency]
    assert verify(tmp_path / "index") == []
    assert {path.name: path.read_bytes() for path in foreign.iterdir()} == before


def test_what_is_faulty_stays_out_and_is_named(foreign: Path, tmp_path: Path) -> None:
    jpeg = picture(4)
    write(
        foreign / "train-2.tar",
        {
            "c.jpg": jpeg, "c.saliency.png": grey(),  # the key of another shard
            "cut.jpg": jpeg[: len(jpeg) // 2], "cut.saliency.png": grey(),
            "text.jpg": b"<html>", "text.saliency.png": grey(),
            "none.jpg": jpeg,
            "lone.saliency.png": grey(),
            "colour.jpg": jpeg, "colour.saliency.jpg": picture(5, size=(20, 15)),
            "wide.jpg": jpeg, "wide.saliency.png": grey(width=30),
            "deep.jpg": jpeg, "deep.saliency.npy": array(values().astype(np.int32)),
            "pickle.jpg": jpeg, "pickle.saliency.npy": b"\x80\x04N.",
            "twice.jpg": jpeg, "twice.png": picture(6, "PNG"), "twice.saliency.png": grey(),
            "../up.jpg": jpeg, "../up.saliency.png": grey(),
        },
    )  # fmt: skip
    summary = index_shards(foreign, tmp_path / "index", workers=2)
    assert summary.samples == 3
    kinds = {str(fault.path).rpartition("tar/")[2]: fault.kind for fault in summary.rejects}
    assert kinds == {
        "c.jpg": "duplicate-stem",
        "cut.jpg": kinds["cut.jpg"],
        "text.jpg": "not-an-image",
        "none.jpg": "missing-map",
        "lone.saliency.png": "missing-image",
        "colour.saliency.jpg": "map-format",
        "wide.saliency.png": "size-mismatch",
        "deep.saliency.npy": "map-format",
        "pickle.saliency.npy": "undecodable",
        "twice.jpg": "duplicate-stem",
        "../up.jpg": "unreadable",
    }
    assert kinds["cut.jpg"] in ("undecodable", "damaged")
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert manifest["counts"]["rejected"]["map-format"] == 2


def test_a_second_run_indexes_only_what_is_new(foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "index"
    index_shards(foreign, out, workers=1)
    first = (out / "shard-000000.json").stat().st_ino
    os.utime(foreign / "train-1.tar", ns=(1, 1))
    summary = index_shards(foreign, out, workers=1)
    assert (summary.kept, summary.samples) == (1, 3)
    assert (out / "shard-000000.json").stat().st_ino == first

    def forbidden(*_: object) -> None:
        raise AssertionError("nothing is left to decode")

    monkeypatch.setattr("cast_fast.data.children.start_child", forbidden)
    assert index_shards(foreign, out, workers=1).kept == 2


def test_a_shard_that_changes_while_it_is_indexed_is_refused(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its headers and its content, say while it is being copied."""
    out = tmp_path / "index"
    original = indexing.in_children

    def copied_meanwhile(*arguments: Any) -> Any:
        write(foreign / "train-1.tar", {"earlier.txt": bytes(5000)} | MORE)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "in_children", copied_meanwhile)
        with pytest.raises(UserError, match=r"train-1\.tar changed while it was indexed"):
            index_shards(foreign, out, workers=1)
    summary = index_shards(foreign, out, workers=1)
    assert (summary.kept, summary.samples) == (1, 3)
    assert all(sample.image.read().startswith((b"\xff\xd8", b"\x89PNG")) for sample in scan_shards(out).samples)


def test_indices_of_shards_that_are_gone_go(foreign: Path, tmp_path: Path) -> None:
    index_shards(foreign, tmp_path / "index", workers=1)
    (foreign / "train-1.tar").unlink()
    index_shards(foreign, tmp_path / "index", workers=1)
    assert {path.name for path in (tmp_path / "index").glob("shard*")} == {"shard-000000.json"}


def test_names_in_shards_may_be_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a\nb.jpg", "c\udcff.jpg", "c\udcff.jpeg", "d\nd.jpg", "d\nd.png", "e.jpg"]
    write(tmp_path / "shards" / "x.tar", {name: picture() for name in names})
    assert cli.main(["prepare", str(tmp_path / "shards"), str(tmp_path / "index"), "--index-only"]) == 0
    assert "duplicate-stem: 2" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert all(reject["message"].isprintable() for reject in manifest["rejects"])
    assert {sample.stem for sample in scan_shards(tmp_path / "index").samples} == {"a\nb", "e"}


def test_a_class_that_cannot_be_read_is_a_fault(foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Member) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Member, "read", failing)
    summary = index_shards(foreign, tmp_path / "index", workers=1)
    assert {fault.message for fault in summary.rejects} == {"cannot be read: Input/output error"}
    assert summary.rejects


def test_a_shard_that_changed_is_not_trained_on(foreign: Path, tmp_path: Path) -> None:
    index_shards(foreign, tmp_path / "index", workers=1)
    write(foreign / "train-1.tar", MORE | {"d.txt": bytes(20_000)})
    with pytest.raises(UserError, match=r"train-1\.tar is not what was indexed"):
        scan_shards(tmp_path / "index")


@pytest.mark.parametrize("name", ["../train-1.tar", "/etc/hostname", "", "a/b.tar"])
def test_a_shards_name_cannot_lead_out_of_its_folder(name: str, foreign: Path, tmp_path: Path) -> None:
    index_shards(foreign, tmp_path / "index", workers=1)
    path = tmp_path / "index" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][1]["file"] = name
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is damaged"):
        scan_shards(tmp_path / "index")


def test_images_alone(tmp_path: Path) -> None:
    write(tmp_path / "shards" / "x.tar", {"a.jpg": picture(), "b.jpg": picture(1)})
    (tmp_path / "shards" / "._x.tar").write_bytes(b"what another system leaves beside a file")
    index_shards(tmp_path / "shards", tmp_path / "index", workers=1)
    assert [sample.saliency for sample in scan_shards(tmp_path / "index").samples] == [None, None]


def test_users_mistakes_are_one_line(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "bad" / "x.tar", {})
    (tmp_path / "bad" / "y.tar").write_bytes(b"no tar file" * 100)
    index = str(tmp_path / "index")
    for arguments, words in (
        ([str(tmp_path / "none"), index], "missing"),
        ([str(tmp_path / "empty"), index], "holds no .tar file"),
        ([str(tmp_path / "bad"), index], "cannot be read as a tar file"),
        ([str(foreign), str(foreign)], "same folder"),
        ([str(foreign), str(foreign), index], "expected SHARDS INDEX"),
        ([str(foreign), index, "--short-side", "64"], "packs nothing"),
        ([str(foreign), index, "--workers", "0"], "--workers"),
    ):
        assert cli.main(["prepare", *arguments, "--index-only"]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    with pytest.raises(UserError, match="--index-only"):
        scan_shards(foreign)
    assert cli.main(["prepare", str(foreign), index, "--index-only", "--workers", "1"]) == 0
    assert "3 samples in 2 shards" in capsys.readouterr().out
    assert cli.main(["validate", "--data", index]) == 1  # for the empty map


def test_training_reads_them(foreign: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from cast_fast.data.dali_loader import Augmentation, DaliLoader
    from cast_fast.data.saliency_crop import CropRule

    index_shards(foreign, tmp_path / "index", workers=1)
    loader = DaliLoader(
        scan_shards(tmp_path / "index"), batch=3, size=32, cam_grid=(2, 2), augmentation=Augmentation(),
        rule=CropRule(), constrained=True, attention=True, seed=0, threads=1,
    )  # fmt: skip
    batch = next(loader)
    loader.close()
    assert batch.weight is not None and batch.key_mask is not None
    # c is empty
    assert dict(zip(batch.index.tolist(), batch.weight.tolist(), strict=True)) == {0: 1, 1: 0, 2: 1}
    assert [bool(mask.any()) for mask in batch.key_mask] == [weight > 0 for weight in batch.weight.tolist()]
    assert not loader.broken
