"""Reading packed datasets: the index, damage, one order with the folder layout, the loader, DALI's own reader."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cast_fast import train
from cast_fast.config import PretrainConfig
from cast_fast.data import layout, shards
from cast_fast.data.batch import Batch
from cast_fast.data.layout import Dataset, Member
from cast_fast.data.pack_sample import PackRule
from cast_fast.data.prepare import prepare
from cast_fast.data.saliency_crop import CropRule
from cast_fast.data.shards import ShardReader, scan_shards
from cast_fast.data.synthetic import write_dataset
from cast_fast.errors import UserError
from cast_kernels import dali_plugin

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
from nvidia.dali import fn as dali_fn
from nvidia.dali import pipeline_def, types

from cast_fast.data.dali_loader import Augmentation, DaliLoader

fn: Any = dali_fn
COUNT = 22


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_dataset(root, COUNT, seed=5, size=(96, 72), workers=1)
    for kind, side in (("jpeg", 48), ("npy", 48), ("png", 0)):
        rule = PackRule(map_side=side, map_format=kind)
        labels = root / "labels.csv"
        prepare(root / "images", root / "saliency", root / kind, rule=rule, labels=labels, shard_samples=8, workers=1)
    return root


@pytest.fixture(scope="module")
def folder(scenes: Path) -> Dataset:
    return layout.scan(
        scenes / "images", scenes / "saliency", labels=scenes / "labels.csv", manifest=scenes / "m.json", workers=1
    )


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def loader(dataset: Dataset, **options: Any) -> DaliLoader:
    settings: dict[str, Any] = {
        "batch": 4,
        "size": 32,
        "cam_grid": (2, 2),
        "augmentation": Augmentation(),
        "rule": CropRule(),
        "constrained": True,
        "attention": True,
        "seed": 3,
        "threads": 1,
        "native": False,
    }
    return DaliLoader(dataset, **(settings | options))


def batches(dataset: Dataset, count: int, **options: Any) -> list[Batch]:
    source = loader(dataset, **options)
    try:
        return [next(source) for _ in range(count)]
    finally:
        source.close()


def same(first: Batch, second: Batch) -> bool:
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


# The index


@pytest.mark.parametrize("kind", ["jpeg", "npy", "png"])
def test_both_layouts_hold_the_same_samples_in_the_same_order(kind: str, scenes: Path, folder: Dataset) -> None:
    packed = scan_shards(scenes / kind)
    assert packed.faults == () and len(packed) == COUNT
    for own, other in zip(packed.samples, folder.samples, strict=True):
        assert (own.stem, own.width, own.height, own.empty, own.label) == (
            other.stem,
            other.width,
            other.height,
            other.empty,
            other.label,
        )
        assert layout.read_bytes(own.image) == layout.read_bytes(other.image)
        assert own.map_shape == ((36, 48) if kind != "png" else (72, 96))
    assert len({sample.image.shard for sample in packed.samples if isinstance(sample.image, Member)}) == 3


def test_labels_may_come_from_elsewhere(scenes: Path, tmp_path: Path) -> None:
    stem = scan_shards(scenes / "jpeg").samples[0].stem
    labels = tmp_path / "labels.csv"
    labels.write_text(f"stem,class\n{stem},teapot\n")
    found = [sample.label for sample in scan_shards(scenes / "jpeg", labels=labels).samples]
    assert found == ["teapot"] + [None] * (COUNT - 1)
    labels.write_text("stem,class\nnobody,teapot\n")
    with pytest.raises(UserError, match=r"labels\.csv names no image"):
        scan_shards(scenes / "jpeg", labels=labels)


def test_the_fingerprint_tells_packings_apart(scenes: Path, folder: Dataset) -> None:
    """Smaller maps move crops a little: a run must not go on with other ones."""
    found = {kind: scan_shards(scenes / kind).fingerprint() for kind in ("jpeg", "npy", "png")}
    assert len({*found.values(), folder.fingerprint()}) == 4
    assert scan_shards(scenes / "jpeg").fingerprint() == found["jpeg"]


NO_SETTINGS = '{"version": 1, "complete": true, "settings": []}'


def spoilt_index(folder: Path, change: Any) -> None:
    """Changes the first row of the first index, and the manifest's hash of it, as nobody but an attacker would."""
    path = folder / "shard-000000.json"
    index = json.loads(path.read_text())
    change(index["samples"][0])
    path.write_text(json.dumps(index))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row.__setitem__(0, "../../etc/passwd"), "below the root"),
        (lambda row: row[1].__setitem__(1, 10**9), "out of range"),
        (lambda row: row[1].__setitem__(1, -1), "out of range"),
        (lambda row: row[2].__setitem__(2, -5), "out of range"),
        (lambda row: row[1].__setitem__(0, "exe"), "out of range"),
        (lambda row: row[1].__setitem__(3, 0), "has no size"),
        (lambda row: row[1].__setitem__(1, 512.0), "not of whole numbers"),
        (lambda row: row.__setitem__(3, "no"), "empty and class"),
        (lambda row: row.__setitem__(4, 7), "empty and class"),
        (lambda row: row.pop(), "not enough values"),
        (lambda row: row[2].append(1), "argument"),
    ],
    ids=["stem", "offset", "negative", "size", "suffix", "width", "fraction", "flag", "class", "short", "long"],
)
def test_an_index_that_points_elsewhere_is_refused(change: Any, words: str, scenes: Path, tmp_path: Path) -> None:
    folder = copied(scenes / "jpeg", tmp_path / "shards")
    spoilt_index(folder, change)
    with pytest.raises(UserError, match=rf"shard-000000\.json is damaged: .*{words}"):
        scan_shards(folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json: shards made elsewhere need an index"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text('{"version": 1, "complete": false}'), "is unfinished"),
        (lambda f: (f / "manifest.json").write_text('{"version": 9, "complete": true}'), "got version 9, expected 1"),
        (lambda f: (f / "manifest.json").write_text('{"version": 1, "complete": true}'), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text(NO_SETTINGS), "manifest.json is damaged: its settings are no"),
        (lambda f: (f / "shard-000001.tar").unlink(), "cannot read .*shard-000001.tar"),
        (lambda f: (f / "shard-000001.json").unlink(), "cannot read .*shard-000001.json"),
        (lambda f: (f / "shard-000001.tar").write_bytes(b"x" * 512), "shard-000001.tar is damaged: it has 512 bytes"),
        (lambda f: (f / "shard-000001.json").write_text("{}"), "content is not what the manifest says"),
    ],
    ids=["none", "cut", "unfinished", "version", "empty", "settings", "shard", "index", "size", "hash"],
)
def test_what_is_missing_or_damaged_is_named(spoil: Any, words: str, scenes: Path, tmp_path: Path) -> None:
    folder = copied(scenes / "jpeg", tmp_path / "shards")
    spoil(folder)
    with pytest.raises(UserError, match=words):
        scan_shards(folder)


def test_a_shards_name_cannot_lead_out_of_the_folder(scenes: Path, tmp_path: Path) -> None:
    folder = copied(scenes / "jpeg", tmp_path / "shards")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["name"] = "../jpeg/shard-000000"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is no name of a shard"):
        scan_shards(folder)


# Reading members


def test_a_reader_gives_members_in_order_and_names_what_is_short(scenes: Path, tmp_path: Path) -> None:
    folder = copied(scenes / "jpeg", tmp_path / "shards")
    members = [sample.image for sample in scan_shards(folder).samples if isinstance(sample.image, Member)]
    reader = ShardReader(threads=3)
    try:
        assert reader.read(members[::-1]) == [member.read() for member in members[::-1]]
        last = max(members, key=lambda member: member.offset)
        last.shard.write_bytes(last.shard.read_bytes()[: last.offset + 5])
        with pytest.raises(OSError, match="shorter than its index says") as caught:
            reader.read([last])
        assert last.name in str(caught.value)
    finally:
        reader.close()


def test_more_shards_than_a_process_may_open(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [sample.image for sample in scan_shards(scenes / "jpeg").samples if isinstance(sample.image, Member)]
    monkeypatch.setattr(shards.resource, "getrlimit", lambda which: (2, 2))
    reader = ShardReader()
    try:
        assert reader.read(members) == [member.read() for member in members]
        assert len(reader._files) == 1
    finally:
        reader.close()


# The loader


def test_both_layouts_give_the_same_batches_where_maps_are_stored_whole(
    scenes: Path, folder: Dataset, device: torch.device
) -> None:
    """Across an epoch's end (5 steps an epoch)."""
    whole = batches(folder, 7, device=device.type)
    packed = batches(scan_shards(scenes / "png"), 7, device=device.type)
    assert all(same(first, second) for first, second in zip(whole, packed, strict=True))


@pytest.mark.parametrize("kind", ["jpeg", "npy"])
def test_small_maps_keep_the_order_and_move_targets_little(kind: str, scenes: Path, folder: Dataset) -> None:
    for first, second in zip(batches(folder, 5), batches(scan_shards(scenes / kind), 5), strict=True):
        assert torch.equal(first.index, second.index)
        assert first.query_saliency is not None and second.query_saliency is not None
        assert (first.query_saliency - second.query_saliency).abs().mean() < 0.05


def test_raw_and_png_maps_of_one_size_give_the_same_batches(scenes: Path, device: torch.device) -> None:
    prepare(
        scenes / "images",
        scenes / "saliency",
        scenes / "png48",
        rule=PackRule(map_side=48, map_format="png"),
        workers=1,
    )
    raw, png = (batches(scan_shards(scenes / name), 3, device=device.type) for name in ("npy", "png48"))
    assert all(same(first, second) for first, second in zip(raw, png, strict=True))


@pytest.mark.parametrize("kind", ["jpeg", "npy", "png"])
def test_the_native_operator_reads_what_python_reads(
    kind: str, scenes: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if (reason := dali_plugin.unavailable_reason()) is not None:
        pytest.skip(reason)
    caplog.set_level(logging.INFO, "cast_fast")
    dataset = scan_shards(scenes / kind)
    natively = batches(dataset, 7, native=True, threads=3)
    monkeypatch.setattr(shards.resource, "getrlimit", lambda which: (4, 4))
    by_python = batches(dataset, 7, native=True)
    assert all(same(first, second) for first, second in zip(natively, by_python, strict=True))
    assert [record.getMessage() for record in caplog.records if "shards" in record.getMessage()] == [
        "shards are read by the native operator",
        "shards are read by Python's threads: 3 shards are more than half of the files that may be open (ulimit -n)",
    ]


def test_python_reads_what_the_native_operator_cannot(scenes: Path, tmp_path: Path) -> None:
    if (reason := dali_plugin.unavailable_reason()) is not None:
        pytest.skip(reason)
    plain = loader(scan_shards(scenes / "npy"), native=True)
    raw, png = scan_shards(scenes / "npy"), scan_shards(scenes / "png")
    mixed = dataclasses.replace(raw, samples=(*raw.samples[:11], *png.samples[11:]))
    odd = scan_shards(copied(scenes / "npy", tmp_path / "li\nes"))
    alone = loader(mixed, native=True, constrained=False, attention=False)  # needs no map
    for source, natively in ((plain, True), (loader(mixed, native=True), False), (loader(odd, native=True), False)):
        assert source._recipe.native_reading == natively
        for _ in range(6):
            batch = next(source)
            assert batch.query_saliency is not None and batch.query_saliency.max() > 0
        source.close()
    assert alone._recipe.native_reading and len(next(alone)) == 4
    alone.close()


@pytest.mark.parametrize("kind", ["jpeg", "npy"])
def test_a_packed_run_goes_on_in_mid_epoch(kind: str, scenes: Path, device: torch.device) -> None:
    dataset = scan_shards(scenes / kind)
    whole = batches(dataset, 7, device=device.type)
    source = loader(dataset, threads=3, device=device.type)
    try:
        for _ in range(3):
            next(source)
        state = source.state_dict()
    finally:
        source.close()
    resumed = loader(dataset, device=device.type)
    try:
        resumed.load_state_dict(state)
        assert all(same(next(resumed), expected) for expected in whole[3:])
    finally:
        resumed.close()


def test_ranks_share_the_global_batch_of_a_packed_dataset(scenes: Path) -> None:
    dataset = scan_shards(scenes / "jpeg")
    for step, one in enumerate(batches(dataset, 3, batch=8)):
        parts = [batches(dataset, step + 1, batch=4, rank=rank, world=2)[step] for rank in (0, 1)]
        order = torch.cat([part.index for part in parts])
        assert sorted(order.tolist()) == sorted(one.index.tolist())
        for part in parts:
            for slot, index in enumerate(part.index.tolist()):
                at = one.index.tolist().index(index)
                assert torch.equal(part.query[slot], one.query[at])


def test_unconstrained_crops_need_no_map(scenes: Path, folder: Dataset) -> None:
    options = {"constrained": False, "attention": False}
    whole, packed = batches(folder, 2, **options), batches(scan_shards(scenes / "jpeg"), 2, **options)
    assert all(same(first, second) for first, second in zip(whole, packed, strict=True))
    assert packed[0].query_saliency is None


def test_shards_of_images_alone_serve_moco_alone(scenes: Path, folder: Dataset, tmp_path: Path) -> None:
    prepare(scenes / "images", None, tmp_path / "moco", rule=PackRule(), workers=1)
    dataset = scan_shards(tmp_path / "moco")
    options = {"constrained": False, "attention": False}
    whole, packed = batches(folder, 2, **options), batches(dataset, 2, **options)
    assert all(same(first, second) for first, second in zip(whole, packed, strict=True))
    with pytest.raises(UserError, match="without saliency maps"):
        loader(dataset)


@pytest.fixture
def broken(scenes: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Dataset, int, str]:
    """A packed dataset in which one sample's image or map was overwritten after packing."""
    folder = copied(scenes / "jpeg", tmp_path / "shards")
    dataset = scan_shards(folder)
    number = 7
    member = getattr(dataset.samples[number], request.param)
    assert isinstance(member, Member)
    content = bytearray(member.shard.read_bytes())
    content[member.offset : member.offset + member.size] = b"\0" * member.size
    member.shard.write_bytes(content)
    return dataset, number, member.name


@pytest.mark.parametrize("native", [False, None])
@pytest.mark.parametrize("broken", ["image", "saliency"], indirect=True)
def test_a_member_that_dali_refuses_is_named_and_replaced(
    broken: tuple[Dataset, int, str], native: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, number, name = broken
    with caplog.at_level(logging.WARNING, "cast_fast"):
        found = batches(dataset, 5, max_broken_share=0.1, native=native)
    assert name in caplog.text
    assert all(number not in batch.index.tolist() for batch in found)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        batches(dataset, 5)


@pytest.mark.parametrize("native", [False, None])
@pytest.mark.parametrize(("kind", "part"), [("jpeg", "image"), ("npy", "saliency")])
def test_a_shard_that_becomes_shorter_is_met_in_its_turn(
    kind: str, part: str, native: bool | None, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(scenes / kind, tmp_path / "shards")
    dataset = scan_shards(folder)
    member = max(
        (getattr(sample, part) for sample in dataset.samples), key=lambda member: (member.shard, member.offset)
    )
    number = next(i for i, sample in enumerate(dataset.samples) if getattr(sample, part) == member)
    source = loader(dataset, max_broken_share=0.1, native=native)
    with member.shard.open("r+b") as file:
        file.truncate(member.offset + 3)
    try:
        with caplog.at_level(logging.WARNING, "cast_fast"):
            found = [next(source) for _ in range(10)]
    finally:
        source.close()
    assert f"{member.name}: cannot be read: the shard is shorter" in caplog.text
    assert list(source.broken) == [number]
    assert all(number not in batch.index.tolist() for batch in found)


def test_training_takes_a_packed_dataset_and_its_empty_maps_as_told(scenes: Path, tmp_path: Path) -> None:
    folder = copied(scenes / "jpeg", tmp_path / "shards")
    spoilt_index(folder, lambda row: row.__setitem__(3, True))  # the first sample counts as empty
    config = PretrainConfig(data=folder, out=tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match=r"1 empty saliency map .*\.saliency\.jpg"):
        train._load_dataset(config)
    assert len(train._load_dataset(dataclasses.replace(config, on_empty_saliency="skip"))) == COUNT - 1
    assert len(train._load_dataset(dataclasses.replace(config, method="moco"))) == COUNT


# The convention


def test_dalis_webdataset_reader_reads_shards_and_indices(scenes: Path) -> None:
    """And gets the same bytes as ours, class numbers included."""
    folder = scenes / "jpeg"
    dataset = scan_shards(folder)
    names = sorted(path.stem for path in folder.glob("*.tar"))

    @pipeline_def(batch_size=COUNT, num_threads=1)
    def reading() -> Any:
        image, saliency, label = fn.readers.webdataset(
            paths=[str(folder / f"{name}.tar") for name in names],
            index_paths=[str(folder / f"{name}.idx") for name in names],
            ext=["jpg", "saliency.jpg", "cls"],
            missing_component_behavior="error",
        )
        return image, fn.decoders.image(saliency, output_type=types.GRAY), label

    pipeline = reading(device_id=None)
    pipeline.build()
    outputs: Any = pipeline.run()
    images, maps, labels = outputs
    classes = json.loads((folder / "manifest.json").read_text())["classes"]
    found = {
        bytes(images.at(i)): (np.asarray(maps.at(i)), classes[int(bytes(labels.at(i)).decode())]) for i in range(COUNT)
    }
    assert len(found) == COUNT
    for sample in dataset.samples:
        values, label = found[layout.read_bytes(sample.image)]
        assert values.shape == (36, 48, 1) and label == sample.label
        assert bool((values > layout.SALIENT_ABOVE).any()) is not sample.empty
