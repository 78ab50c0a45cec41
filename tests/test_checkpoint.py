"""Checkpoints: whole or absent after a kill at any point, damage found and named, no code run, nothing lost."""

from __future__ import annotations

import errno
import functools
import io
import json
import logging
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import checkpoint_checks
import pytest
import rank_checks
import torch
from full_disk import full_disk
from safetensors import safe_open

from cast_fast import checkpoint, checkpoint_state
from cast_fast.errors import UserError
from cast_fast.run_folder import locked_run

CONFIG = {"arch": "resnet18", "seed": 3}


def state_of(step: int) -> dict[str, Any]:
    """A state shaped like a real one: tensors of several types, nested plain values."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {
            "weight": torch.randn(3, 4, generator=generator),
            "conv": torch.randn(2, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last),
            "pointer": torch.tensor(step),
        },
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.randn(3, 4, generator=generator)}},
            "groups": [{"lr": 0.5}],
        },
        "progress": {"step": step, "name": "a", "none": None, "pair": (1, 2.5)},
    }


def save(run: Path, step: int, keep: int = 3) -> Path:
    return checkpoint.save(run, step, state_of(step), config=CONFIG, fingerprint="f", keep=keep)


def assert_equal_states(left: Any, right: Any) -> None:
    """Bitwise equality of nested states."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and left.shape == right.shape
        assert torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal_states(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right):
            assert_equal_states(one, other)
    else:
        assert left == right


def names(run: Path) -> set[str]:
    return {entry.name for entry in (run / "checkpoints").iterdir()}


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    loaded = checkpoint.load_last(tmp_path)
    assert loaded is not None
    assert path == loaded.path == tmp_path / "checkpoints" / "step-7"
    assert (loaded.step, loaded.fingerprint, loaded.config) == (7, "f", CONFIG)
    assert_equal_states(loaded.state, state_of(7))
    assert loaded.versions["torch"] == torch.__version__
    assert (tmp_path / "checkpoints" / "last").read_text() == "step-7\n"
    assert names(tmp_path) == {"step-7", "last"}


def test_description_reads_no_tensor(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    found = checkpoint.describe(path)
    assert found.state["progress"] == state_of(7)["progress"] and found.config == CONFIG
    weight = found.state["model"]["weight"]
    assert weight.device.type == "meta" and weight.shape == (3, 4) and weight.dtype == torch.float32
    assert_equal_states(checkpoint.read(found).state, state_of(7))


def test_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.load_last(tmp_path) is None
    assert checkpoint.steps(tmp_path) == []


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (9, 10, 100):  # by number, not by name
        save(tmp_path, step, keep=2)
    assert checkpoint.steps(tmp_path) == [100, 10]
    assert names(tmp_path) == {"step-100", "step-10", "last"}


def test_saving_a_saved_step_again_leaves_it(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert save(tmp_path, 5) == path
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_saving_over_a_damaged_step_sets_it_aside(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / "rank-0.safetensors").write_bytes(b"")
    assert checkpoint.load(save(tmp_path, 5)).step == 5
    assert names(tmp_path) == {"step-5", "step-5.damaged", "last"}


@pytest.mark.parametrize(
    ("step", "keep", "state"),
    [
        (-1, 1, {}),
        (1, 0, {}),
        (1, 1, {"a": {1, 2}}),
        (1, 1, {"a": object()}),
        (1, 1, {"a": torch.zeros(2, dtype=torch.complex64)}),
        (1, 1, {"a": {1: torch.zeros(1), "1": torch.zeros(1)}}),
    ],
)
def test_refuses_nonsense(tmp_path: Path, step: int, keep: int, state: Any) -> None:
    with pytest.raises(ValueError, match=r"expected|two tensors"):
        checkpoint.save(tmp_path, step, state, config={}, fingerprint="f", keep=keep)
    assert not (tmp_path / "checkpoints").exists()


def test_plain_values_come_back_exactly(tmp_path: Path) -> None:
    state = {
        "numbers": [0.1, 1e-320, float("inf"), -0.0, 2**70, True, False, None],
        "keys": {0: "a", None: "b", (1, "x"): "c", "!tensor": "d"},
        "nested": ({"a": [(), {}, []]}, random.Random(3).getstate()),
        "text": "ä\n\u0000",
        "dtypes": [torch.ones(3).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.bool)],
        "empty": torch.zeros(0, 3),
        "nothing": torch.tensor(7),
        "slice": torch.arange(12).view(3, 4)[:, 1:3].t(),
    }
    found = checkpoint.load(checkpoint.save(tmp_path, 1, state, config={}, fingerprint="f", keep=1)).state
    assert_equal_states(found, state)
    assert str(found["numbers"][3]) == "-0.0" and found["slice"].is_contiguous()


def test_numbers_are_aligned(tmp_path: Path) -> None:
    """As the format's own writers have it: readers may map the file into memory and use it in place."""
    state = [torch.ones(3).to(dtype) for dtype in (torch.bool, torch.bfloat16, torch.float64, torch.float32)]
    path = checkpoint.save(tmp_path, 1, {"a": state}, config={}, fingerprint="f", keep=1)
    data = (path / "rank-0.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and len(header) == 5
    for number, tensor in enumerate(state):
        begin, end = header[f"a/{number}"]["data_offsets"]
        assert begin % tensor.element_size() == 0 and end - begin == tensor.nbytes


def test_estimate_bounds_the_size_and_counts_shared_storage_once(tmp_path: Path) -> None:
    shared = torch.zeros(100_000)
    state = {"a": {"whole": shared, "view": shared[:10]}, "b": [torch.zeros(7, dtype=torch.uint8) for _ in range(200)]}
    path = checkpoint.save(tmp_path, 1, state, config=CONFIG, fingerprint="f", keep=1)
    size = sum(file.stat().st_size for file in path.iterdir())
    estimate = checkpoint.estimated_bytes(state)
    assert size <= estimate < 2 * 400_000
    meta = torch.empty(100_000, device="meta")
    assert checkpoint.estimated_bytes([meta, torch.empty(100_000, device="meta")]) > 800_000


# Damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {"flipped": flip, "truncated": truncate, "missing": Path.unlink, "empty": lambda path: path.write_bytes(b"")}


@pytest.mark.parametrize("name", ["rank-0.safetensors", "state.json", "config.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_previous_checkpoint_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    save(tmp_path, 1)
    DAMAGES[damage](save(tmp_path, 2) / name)
    with pytest.raises(checkpoint.DamagedCheckpoint, match=re.escape(f"step-2/{name}")):
        checkpoint.load(tmp_path / "checkpoints" / "step-2")
    with caplog.at_level(logging.WARNING, logger="cast_fast"):
        loaded = checkpoint.load_last(tmp_path)
    assert loaded is not None and loaded.step == 1
    assert_equal_states(loaded.state, state_of(1))
    assert "DAMAGED" in caplog.text and name in caplog.text and "going back to step 1" in caplog.text
    assert names(tmp_path) == {"step-1", "step-2", "last"}


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    whole = (path / "manifest.json").read_bytes()
    generator = random.Random(0)
    for position in generator.sample(range(len(whole) - 1), 200):
        if whole[position : position + 1].isspace():
            continue
        data = bytearray(whole)
        data[position] ^= 1 << generator.randrange(7)
        (path / "manifest.json").write_bytes(data)
        with pytest.raises(checkpoint.DamagedCheckpoint):
            checkpoint.load(path)


def test_damaged_ones_are_set_aside_and_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in (2, 3):
        truncate(tmp_path / "checkpoints" / f"step-{step}" / "rank-0.safetensors")
    loaded = checkpoint.find_last(tmp_path, set_aside=True)
    assert loaded is not None and loaded.step == 1
    assert names(tmp_path) == {"step-1", "step-2.damaged", "step-3.damaged", "last"}
    save(tmp_path, 2, keep=2)
    assert checkpoint.steps(tmp_path) == [2, 1]


def test_pruning_never_counts_later_steps(tmp_path: Path) -> None:
    for step in (1, 5):
        save(tmp_path, step)
    save(tmp_path, 2, keep=1)
    assert checkpoint.steps(tmp_path) == [5, 2]


def test_all_damaged_is_an_error_that_names_each_and_changes_nothing(tmp_path: Path) -> None:
    for step in (1, 2):
        truncate(save(tmp_path, step) / "rank-0.safetensors")
    with pytest.raises(UserError, match=r"no whole checkpoint.*step-2/rank-0\.safetensors.*step-1/rank-0\.safetensors"):
        checkpoint.find_last(tmp_path, set_aside=True)
    assert names(tmp_path) == {"step-1", "step-2", "last"}


def test_renamed_folder_is_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    path.rename(path.with_name("step-4"))
    with pytest.raises(checkpoint.DamagedCheckpoint, match="says step 1"):
        checkpoint.load(path.with_name("step-4"))


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """Makes a manifest that agrees with the files, as somebody who means harm would."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    for name in manifest["files"]:
        size, digest = checkpoint._size(path, name), checkpoint._hash(path, name)
        manifest["files"][name] = {"sha256": digest, "size": size}
    manifest.update(changes)
    manifest["sha256"] = checkpoint._digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("version", [1, checkpoint.FORMAT + 1])
def test_other_formats_are_refused(tmp_path: Path, version: int) -> None:
    path = save(tmp_path, 1)
    rewrite_manifest(path, format=version)
    with pytest.raises(UserError, match=f"written in format {version} .* reads format 2 alone"):
        checkpoint.load_last(tmp_path)


class Harm:
    """Unpickling this would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("name", ["rank-0.safetensors", "state.json", "config.json", "manifest.json"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_crafted_pickle_runs_no_code(tmp_path: Path, writer: str, name: str) -> None:
    """In place of any file, with hashes that agree; and where torch.distributed.checkpoint would look for one."""
    target = tmp_path / "harm"
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / ".metadata").write_bytes(pickle.dumps(Harm(target)))
    if writer == "torch":
        torch.save(Harm(target), path / name)
    else:
        (path / name).write_bytes(pickle.dumps(Harm(target)))
    if name != "manifest.json":
        rewrite_manifest(path)
    with pytest.raises(checkpoint.DamagedCheckpoint, match=re.escape(f"step-2/{name}: ")):
        checkpoint.load(path)
    loaded = checkpoint.load_last(tmp_path)
    assert loaded is not None and loaded.step == 1
    assert not target.exists()
    if writer == "torch":  # the same file does harm without weights_only
        torch.load(io.BytesIO((path / name).read_bytes()), weights_only=False)
        assert target.exists()


def pickled(content: dict[str, Any], target: Path) -> Any:
    content["values"]["progress"]["name"] = pickle.dumps(Harm(target), protocol=0).decode()
    return content


CRAFTED: dict[str, Any] = {
    "no object": lambda content: [content],
    "another key": lambda content: {**content, "code": 1},
    "unknown tag": lambda content: {**content, "values": {"!reduce": ["os.system", "true"]}},
    "two tags": lambda content: {**content, "values": {"!tuple": [], "!pairs": []}},
    "tag and key": lambda content: {**content, "values": {"!tuple": [], "a": 1}},
    "unknown tensor": lambda content: {**content, "values": {"!tensor": "model/other"}},
    "unhashable key": lambda content: {**content, "values": {"!pairs": [[[], 1]]}},
    "unhashable in a key": lambda content: {**content, "values": {"!pairs": [[{"!tuple": [{"!tuple": [[]]}]}, 1]]}},
    "no pair": lambda content: {**content, "values": {"!pairs": [[1]]}},
    "tensors": lambda content: {**content, "tensors": []},
}
CRAFTED_ENTRIES: dict[str, Any] = {
    "dtype": {"dtype": "PICKLE"},
    "negative size": {"size": [-3, -4]},
    "huge size": {"size": [3, 4_000_000_000_000]},
    "float size": {"size": [3.0, 4]},
    "true size": {"size": [True, 12]},
    "no chunks": {"chunks": []},
    "text": {"chunks": "abc"},
    "elsewhere": {"chunks": [{"file": "../../rank-0.safetensors", "offsets": [0, 0], "sizes": [3, 4]}]},
    "json": {"chunks": [{"file": "state.json", "offsets": [0, 0], "sizes": [3, 4]}]},
    "list": {"chunks": [{"file": ["rank-0.safetensors"], "offsets": [0, 0], "sizes": [3, 4]}]},
    "outside": {"chunks": [{"file": "rank-0.safetensors", "offsets": [1, 0], "sizes": [3, 4]}]},
    "dimensions": {"chunks": [{"file": "rank-0.safetensors", "offsets": [0], "sizes": [12]}]},
    "hole": {"chunks": [{"file": "rank-0.safetensors", "offsets": [0, 0], "sizes": [3, 3]}]},
    "overlap": {
        "chunks": [{"file": "rank-0.safetensors", "offsets": [0, y], "sizes": [3, 2]} for y in (0, 1)],
    },
    "other shape": {"size": [4, 3], "chunks": [{"file": "rank-0.safetensors", "offsets": [0, 0], "sizes": [4, 3]}]},
    "other type": {"dtype": "I32"},
    "beyond 64 bits": {"size": [2**70], "chunks": [{"file": "rank-0.safetensors", "offsets": [0], "sizes": [2**70]}]},
    "storage beyond 64 bits": {
        "size": [2**62],
        "chunks": [{"file": "rank-0.safetensors", "offsets": [0], "sizes": [2**62]}],
    },
    "empty beyond 64 bits": {
        "size": [0, 2**63],
        "chunks": [{"file": "rank-0.safetensors", "offsets": [0, 0], "sizes": [0, 2**63]}],
    },
    "strides beyond 64 bits": {
        "size": [0, 2**62, 4],
        "chunks": [{"file": "rank-0.safetensors", "offsets": [0] * 3, "sizes": [0, 2**62, 4]}],
    },
}


@pytest.mark.parametrize("case", [*CRAFTED, *CRAFTED_ENTRIES])
def test_crafted_state_is_refused(tmp_path: Path, case: str) -> None:
    """Hashes agree, yet nothing of it is believed."""
    path = save(tmp_path, 1)
    content = json.loads((path / "state.json").read_text())
    if case in CRAFTED:
        content = CRAFTED[case](content)
    else:
        content["tensors"]["model/weight"].update(CRAFTED_ENTRIES[case])
    (path / "state.json").write_text(json.dumps(content))
    rewrite_manifest(path)
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"step-1/(state\.json|rank-0\.safetensors): "):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("size", "blocks", "good"),
    [
        ([3, 4], [([0, 0], [3, 2]), ([0, 2], [3, 2])], True),
        ([4, 4], [([y, x], [2, 2]) for y in (2, 0) for x in (0, 2)], True),
        ([4, 4], [([0, 0], [2, 2]), ([2, 0], [2, 4]), ([0, 2], [2, 2])], True),
        ([], [([], [])], True),
        ([0, 3], [([0, 0], [0, 3])], True),
        ([3, 4], [([0, 0], [3, 2]), ([0, 1], [3, 2])], False),
        ([4, 4], [([0, 0], [2, 2]), ([0, 2], [2, 2]), ([2, 0], [2, 2]), ([2, 1], [2, 2])], False),
        ([4, 4], [([0, 0], [4, 2]), ([1, 1], [2, 2]), ([0, 3], [4, 1])], False),
        ([3, 4], [([0, 0], [3, 4]), ([0, 0], [3, 4])], False),
        ([3, 4], [([0, 0], [3, 3])], False),
        ([], [([], []), ([], [])], False),
    ],
)
def test_blocks_fill_their_tensor(size: list[int], blocks: list[tuple[list[int], list[int]]], good: bool) -> None:
    chunks = [{"file": "rank-0.safetensors", "offsets": offsets, "sizes": sizes} for offsets, sizes in blocks]
    content = {"a": {"dtype": "F32", "size": size, "chunks": chunks}}
    if good:
        entry = checkpoint_state.parse_entries(content, ["rank-0.safetensors"])["a"]
        assert entry.to_json() == content["a"] and entry.size == tuple(size)
    else:
        with pytest.raises(ValueError, match="a: its blocks do not fill"):
            checkpoint_state.parse_entries(content, ["rank-0.safetensors"])


def test_a_pickle_as_text_stays_text(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    content = pickled(json.loads((path / "state.json").read_text()), tmp_path / "harm")
    (path / "state.json").write_text(json.dumps(content))
    rewrite_manifest(path)
    assert "Path" in checkpoint.load(path).state["progress"]["name"] and not (tmp_path / "harm").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "nul", "\xff"])
def test_text_that_is_no_json(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 1)
    for name in ("state.json", "config.json"):
        before = (path / name).read_bytes()
        (path / name).write_text(text, encoding="latin-1")
        rewrite_manifest(path)
        with pytest.raises(checkpoint.DamagedCheckpoint, match=name):
            checkpoint.load(path)
        (path / name).write_bytes(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": {"../outside.pt": {"sha256": "0", "size": 0}}}, "is not among the files"),
        ({"files": [1]}, "files"),
        ({"files": {"state.json": 3}}, "files"),
        ({"step": "1"}, "no integers"),
        ({"format": None}, "no integers"),
        ({"fingerprint": 3}, "fingerprint"),
        ({"versions": {"torch": {}}}, "versions"),
    ],
)
def test_crafted_manifest_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = save(tmp_path, 1)
    rewrite_manifest(path, **changes)
    with pytest.raises(checkpoint.DamagedCheckpoint, match=f"step-1/manifest.json: .*{message}"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["step-007", "step-\u0663", "step-3 (copy)", "step-"])
def test_folders_of_other_names_are_left_alone(tmp_path: Path, name: str) -> None:
    shutil.copytree(save(tmp_path, 1), tmp_path / "checkpoints" / name)
    found = checkpoint.find_last(tmp_path, set_aside=True)
    assert found is not None and found.step == 1
    assert names(tmp_path) == {"step-1", "last", name}


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "rank-0.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_nothing_endless_is_read(tmp_path: Path, file: str, kind: str) -> None:
    path = save(tmp_path, 1) / file
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(checkpoint.DamagedCheckpoint, match=f"step-1/{file}: not a regular file"):
        checkpoint.describe(path.parent)


def test_manifest_cannot_name_what_no_file_can_be_called(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    rewrite_manifest(path, files={**files, "a\0b": {"sha256": "0", "size": 0}})
    with pytest.raises(checkpoint.DamagedCheckpoint, match="no plain file name"):
        checkpoint.load(path)


def test_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    rewrite_manifest(path, files={**files, "../outside.pt": {"sha256": "0", "size": 0}})
    with pytest.raises(checkpoint.DamagedCheckpoint, match="no plain file name"):
        checkpoint.load(path)


# Kills

KILLER = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from test_checkpoint import save

    # Imports torch once, then forks a process a point of death: SIGKILL at its n-th call of the system.
    COUNTED = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")

    def die_at(n, run):
        calls = 0
        def counted(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call
        for name in COUNTED:
            setattr(os, name, counted(getattr(os, name)))
        save(run, 3, keep=2)
        os._exit(0)

    root = Path(sys.argv[1])
    for n in range(1, 100):
        run = root / str(n)
        save(run, 1)
        save(run, 2)
        child = os.fork()
        if child == 0:
            die_at(n, run)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            print(n)
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    """
)


def test_sigkill_at_every_point_of_a_save(tmp_path: Path) -> None:
    """Whatever the moment, the newest checkpoint is whole, and the next save leaves nothing behind."""
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path)], cwd=Path(__file__).parent, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    points = int(result.stdout)
    assert points > 12  # a file each for model, optimizer, progress, config and manifest, and the renames
    reached = set()
    for n in range(1, points + 1):
        run = tmp_path / str(n)
        loaded = checkpoint.load_last(run)
        assert loaded is not None
        assert_equal_states(loaded.state, state_of(loaded.step))
        for step in checkpoint.steps(run):
            assert checkpoint.load(run / "checkpoints" / f"step-{step}").step == step
        named = (run / "checkpoints" / "last").read_text().strip()
        assert checkpoint.load(run / "checkpoints" / named).step >= 2
        reached.add(loaded.step)
        save(run, 4, keep=2)
        assert {name for name in names(run) if name.startswith(".")} == set()
        assert (run / "checkpoints" / "last").read_text() == "step-4\n"
    assert reached == {2, 3}


WRITER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import torch
    from cast_fast import checkpoint, checkpoint_storage  # imported before the first save is counted

    state = {"model": {str(i): torch.full((100_000,), float(i)) for i in range(100)}}
    print("ready", flush=True)
    for step in range(1, 10_000):
        checkpoint.save(Path(sys.argv[1]), step, state, config={}, fingerprint="f", keep=2)
        print(step, flush=True)
    """
)


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    """The process is killed from outside while it writes 40 MB files, in the middle of a write as likely as not."""
    generator = random.Random(0)
    for trial in range(2):
        run = tmp_path / str(trial)
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(run)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert process.stdout is not None
        for _ in range(2 + generator.randrange(3)):
            line = process.stdout.readline()
        promised = int(line)
        try:
            process.wait(timeout=generator.uniform(0, 0.1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        loaded = checkpoint.load_last(run)
        assert loaded is not None and loaded.step >= promised


# No space


def test_file_size_limit_loses_nothing(tmp_path: Path) -> None:
    """A write that fails half way (EFBIG here, as ENOSPC would) is one clear error; earlier checkpoints stay whole."""
    save(tmp_path, 1)
    state = {"small": torch.zeros(10), "large": torch.zeros(1_000_000)}
    told = rf"step 2 in {re.escape(str(tmp_path))}.*too large.*4\.1 MB needed.*MB free"
    with full_disk(1_000_000), pytest.raises(UserError, match=told):
        checkpoint.save(tmp_path, 2, state, config={}, fingerprint="f", keep=1)
    assert names(tmp_path) == {"step-1", "last"}
    loaded = checkpoint.load_last(tmp_path)
    assert loaded is not None and loaded.step == 1


def mounted(path: Path, options: str) -> bool:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("estimated", [True, False], ids=["up-front", "in-mid-write"])
def test_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimated: bool) -> None:
    run = tmp_path / "run"
    if not mounted(run, "size=3m"):
        pytest.skip("cannot mount a small tmpfs here")
    try:
        save(run, 1)
        if not estimated:
            monkeypatch.setattr(checkpoint, "require_space", lambda *_: None)
        with pytest.raises(UserError, match=r"step 2 in .*MB needed.*MB free"):
            checkpoint.save(
                run, 2, {"a": torch.zeros(10), "b": torch.zeros(1_000_000)}, config={}, fingerprint="f", keep=1
            )
        assert names(run) == {"step-1", "last"}
        loaded = checkpoint.load_last(run)
        assert loaded is not None and loaded.step == 1
        save(run, 2, keep=1)
    finally:
        subprocess.run(["umount", str(run)], check=True)


def test_unwritable_folder_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="cannot save the checkpoint of step 1"):
        save(tmp_path, 1)
    assert (tmp_path / "checkpoints").read_text() == "a file where a folder should be"


# The lock


def test_one_process_a_run_folder(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from cast_fast.run_folder import locked_run
        with locked_run(Path(sys.argv[1])):
            print("locked")
        """
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with locked_run(tmp_path):
        refused = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert refused.returncode == 1 and refused.stdout == ""
    assert f"another process is training in this folder (process {os.getpid()} on" in refused.stderr


def test_background_save_is_that_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that change while the thread writes do not change what it writes; an error comes with the next call."""
    gate = threading.Event()
    original = checkpoint._write

    def slow(*arguments: Any) -> dict[str, Any]:
        gate.wait(60)
        return original(*arguments)

    monkeypatch.setattr(checkpoint, "_write", slow)
    saver = checkpoint.BackgroundSaver()
    tensor = torch.arange(6.0).view(2, 3)
    strided = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    settings: dict[str, Any] = {"config": {}, "fingerprint": "f", "keep": 2}
    saver.save(tmp_path, 3, {"model": {"w": tensor, "c": strided, "n": [1, (tensor,)]}}, **settings)
    tensor.zero_()
    strided.zero_()
    assert checkpoint.steps(tmp_path) == []
    gate.set()
    saver.wait()
    saved = checkpoint.load(tmp_path / "checkpoints" / "step-3").state["model"]
    assert torch.equal(saved["w"], torch.arange(6.0).view(2, 3)) and torch.equal(saved["n"][1][0], saved["w"])
    assert torch.equal(saved["c"], torch.arange(24.0).view(1, 2, 3, 4))

    def full(*_: Any) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(checkpoint, "_write", full)
    saver.save(tmp_path, 4, {"model": {"w": tensor}}, **settings)
    with pytest.raises(UserError, match="cannot save the checkpoint of step 4"):
        saver.wait()
    saver.wait()
    assert checkpoint.steps(tmp_path) == [3]


# Many ranks


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What each of four processes saw, and the run folder they share."""
    run = tmp_path_factory.mktemp("four") / "run"
    run.mkdir()
    function = functools.partial(checkpoint_checks.everything, folder=str(run))
    return run, rank_checks.run_ranks(function, 4, run.parent / "results")


def ends(ranks: tuple[Path, list[dict[str, Any]]], name: str) -> list[str]:
    return [found[name] for found in ranks[1]]


def test_every_rank_writes_its_part(four_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """Each replicated tensor once, spread over the ranks; each part by its owner; plain values of rank 0."""
    run, found = four_ranks
    for name in ("save", "again", "next"):
        assert ends(four_ranks, name) == ["done"] * 4
    path = run / "checkpoints" / "step-2"
    owners: dict[str, list[int]] = {}
    for rank in range(4):
        with safe_open(path / f"rank-{rank}.safetensors", framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it cannot be iterated)
                owners.setdefault(name, []).append(rank)
            assert torch.equal(opened.get_tensor("keys"), checkpoint_checks.whole_state(2)["keys"][:, [rank]])
    assert owners.pop("keys") == [0, 1, 2, 3] and owners.pop("random/state") == [0]
    assert len(owners) == 12 and all(len(ranks) == 1 for ranks in owners.values())
    assert {ranks[0] for ranks in owners.values()} == {0, 1, 2, 3}
    assert_equal_states(checkpoint.load(path).state, checkpoint_checks.whole_state(2))
    for rank in found:
        assert_equal_states(rank["read"], checkpoint_checks.whole_state(3))


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("full", r"user error: rank 2: cannot save the checkpoint of step 2 in .*File too large.*MB free"),
        ("unshared", r"user error: rank 1: cannot save the checkpoint of step 2 .*No such file"),
        ("lost file", r"user error: rank 0: .*rank-3\.safetensors was written .*expected a run folder that all"),
        ("no space", r"user error: no disk space$"),
        ("broken end", r"user error: rank 0: cannot save the checkpoint of step 2 .*Input/output error"),
        ("background failure", r"user error: rank 1: no disk space$"),
        ("unreadable", r"user error: rank 3: cannot read .*step-3: Input/output error"),
    ],
)
def test_a_failing_rank_is_named_and_keeps_nobody(
    four_ranks: tuple[Path, list[dict[str, Any]]], name: str, first: str
) -> None:
    main, *rest = ends(four_ranks, name)
    assert re.match(first, main), main
    assert rest == ["leaves with 2"] * 3


def test_a_mistake_on_one_rank(four_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    main, failing, *rest = ends(four_ranks, "mistake")
    assert main.startswith("RuntimeError: rank 1: ZeroDivisionError") and failing.startswith("ZeroDivisionError")
    assert rest == ["leaves with 1"] * 2


def test_failures_leave_nothing_behind(four_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    run, found = four_ranks
    for name in ("after full", "after failures"):
        assert all(rank[name] == {"step-1", "last"} for rank in found)
    assert all(rank["names"] == {"step-2", "step-3", "last"} for rank in found)
    assert (run / "checkpoints" / "last").read_text() == "step-3\n"


def test_saving_in_the_background_disturbs_no_collective(four_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    run, found = four_ranks
    assert [rank["traffic"] for rank in found] == [50.0] * 4
    assert_equal_states(checkpoint.load(run / "checkpoints" / "step-3").state, checkpoint_checks.whole_state(3))
    assert ends(four_ranks, "told once") == ["done"] * 4


def test_what_is_done_together_fails_together(four_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    assert ends(four_ranks, "together") == [0, 1, 2, 3]
    assert ends(four_ranks, "not together") == ["leaves with 2"] * 2 + ["user error: here alone", "leaves with 2"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("rank", [0, 3])
def test_damage_to_one_ranks_file(
    four_ranks: tuple[Path, list[dict[str, Any]]], tmp_path: Path, damage: str, rank: int
) -> None:
    shutil.copytree(four_ranks[0], tmp_path / "run")
    DAMAGES[damage](tmp_path / "run" / "checkpoints" / "step-3" / f"rank-{rank}.safetensors")
    loaded = checkpoint.load_last(tmp_path / "run")
    assert loaded is not None and loaded.step == 2
    assert_equal_states(loaded.state, checkpoint_checks.whole_state(2))
