"""The tensors of a checkpoint by torch.distributed.checkpoint (DCP), with no pickle in any file.

DCP decides which rank writes what (replicated tensors are spread over the ranks, each rank writes its own parts of the
others), tells every rank when one fails, and finds the pieces again for any number of ranks. Its own storage does not
do: ``FileSystemReader`` unpickles ``.metadata`` and its load planner unpickles plain values, so that a crafted
checkpoint could run code; the safetensors storage keeps tensors only. So storage is ours: every rank writes one file
in the safetensors format, and where the pieces are is JSON, see ``checkpoint_state``.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from cast_fast.checkpoint_state import NAMES, SUFFIX, Chunk, Entry, Part, Sink

# Writing


def save(
    tensors: Mapping[str, Tensor | Part],
    write: Callable[[str, Callable[[Sink], object]], dict[str, Any]],
    finish: Callable[[dict[str, Entry], dict[str, dict[str, Any]]], None],
    group: Any = None,
) -> None:
    """Writes every tensor once, wherever it is; every rank of the group takes part.

    Args:
        tensors: name → tensor that is the same on every rank that has it, or this rank's part.
        write: makes one file of this rank from its name and its content; returns a JSON-able record of it.
        finish: called on rank 0 when every rank has written: entries by name, and the records by file.
        group: a gloo process group; ``None`` for this process alone, whatever groups there are.

    Raises:
        torch.distributed.checkpoint.CheckpointException: on every rank, where some rank failed.
        RuntimeError: a rank is gone or did not come within the group's time-out.
    """
    _quiet()
    dcp.save(
        dict(tensors),
        storage_writer=_Writer(write, finish),
        planner=_SavePlanner(),
        process_group=group,
        no_dist=group is None,
    )


def _quiet() -> None:
    # Not ``catch_warnings``, which is not for threads: saving may happen in one.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class _SavePlanner(DefaultSavePlanner):
    """Plans tensors and parts of tensors; plain values go another way."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(name, value) for name, value in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        value = self.state_dict[index.fqn]
        return value.tensor if isinstance(value, Part) else value


def _write_item(name: str, value: Tensor | Part) -> WriteItem:
    tensor, kind = value, WriteItemType.TENSOR
    if isinstance(value, Part):
        tensor, offsets, size, kind = value.tensor, value.offsets, value.size, WriteItemType.SHARD
    else:
        offsets, size = (0,) * value.dim(), value.shape
    assert isinstance(tensor, Tensor)
    return WriteItem(
        index=MetadataIndex(name, torch.Size(offsets)),
        type=kind,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=tensor.shape),
            properties=TensorProperties(dtype=tensor.dtype),
            size=torch.Size(size),
        ),
    )


class _Writer(StorageWriter):
    """A file a rank, through ``write``; the end through ``finish``."""

    def __init__(self, write: Callable[..., dict[str, Any]], finish: Callable[..., None]) -> None:
        self._write, self._finish = write, finish

    def reset(self, checkpoint_id: Any = None) -> None:
        del checkpoint_id

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        del is_coordinator, args, kwargs

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=f"rank-{rank}{SUFFIX}") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        if plan.items:
            file = plan.storage_data
            record = self._write(file, lambda sink: _write_tensors(sink, plan.items, planner))
            results = [WriteResult(item.index, _length(item), (file, record)) for item in plan.items]
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, dict[str, Any]] = {}
        places: dict[MetadataIndex, str] = {}
        for result in (result for one in results for result in one):
            places[result.index], record = result.storage_data
            files[places[result.index]] = record
        entries = {}
        for name, known in metadata.state_dict_metadata.items():
            assert isinstance(known, TensorStorageMetadata)
            chunks = tuple(
                Chunk(places[MetadataIndex(name, chunk.offsets)], tuple(chunk.offsets), tuple(chunk.sizes))
                for chunk in known.chunks
            )
            entries[name] = Entry(known.properties.dtype, tuple(known.size), chunks)
        self._finish(entries, files)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        del checkpoint_id
        return False


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _length(item: WriteItem) -> int:
    assert item.tensor_data is not None and item.tensor_data.chunk is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _write_tensors(sink: Sink, items: list[WriteItem], planner: SavePlanner) -> None:
    """One file in the safetensors format; the largest numbers first, so that all of them are aligned."""

    def order(item: WriteItem) -> tuple[int, str]:
        assert item.tensor_data is not None
        return -item.tensor_data.properties.dtype.itemsize, item.index.fqn

    items = sorted(items, key=order)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for item in items:
        assert item.tensor_data is not None
        begin, end = end, end + _length(item)
        header[item.index.fqn] = {
            "dtype": NAMES[item.tensor_data.properties.dtype],
            "shape": list(item.tensor_data.chunk.sizes),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)
    for item in items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor)
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            sink.write(memoryview(flat.view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]


# Reading


def load(folder: Path, entries: Mapping[str, Entry], group: Any = None) -> dict[str, Tensor]:
    """Reads every tensor whole, on the CPU; with a group, every rank takes part.

    Args:
        folder: the checkpoint, its files verified.
        entries: checked by ``parse_entries`` and ``check_files``.
        group: as for ``save``.

    Raises:
        torch.distributed.checkpoint.CheckpointException: on every rank, where some rank failed.
        RuntimeError: a rank is gone or did not come within the group's time-out.
    """
    _quiet()
    tensors: dict[str, Any] = {name: torch.empty(entry.size, dtype=entry.dtype) for name, entry in entries.items()}
    if tensors:
        dcp.load(
            tensors,
            storage_reader=_Reader(folder, entries),
            planner=_LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )
    return tensors


class _LoadPlanner(DefaultLoadPlanner):
    """Knows tensors only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # The inherited method unpickles.
        raise ValueError(f"{read_item.dest_index.fqn}: expected a tensor")


class _Reader(StorageReader):
    """Reads the files of ``_Writer``."""

    def __init__(self, folder: Path, entries: Mapping[str, Entry]) -> None:
        self._folder, self._entries = folder, entries
        self._files = {
            MetadataIndex(name, torch.Size(chunk.offsets)): chunk.file
            for name, entry in entries.items()
            for chunk in entry.chunks
        }

    def reset(self, checkpoint_id: Any = None) -> None:
        del checkpoint_id

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=entry.dtype),
                    torch.Size(entry.size),
                    [
                        ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                        for chunk in entry.chunks
                    ],
                )
                for name, entry in self._entries.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        del metadata, is_coordinator, args, kwargs

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self._files[item.storage_index], []).append(item)
        for file, items in files.items():
            with safe_open(str(self._folder / file), framework="pt") as opened:
                for item in items:
                    block = tuple(slice(b, b + n) for b, n in zip(item.storage_offsets, item.lengths))
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(opened.get_tensor(item.storage_index.fqn)[block])
                    planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        del checkpoint_id
        return False
