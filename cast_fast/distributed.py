"""Facts about the ranks and every collective; all of it is the identity at world size one.

torchrun sets ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``; without them a process is rank 0 of 1, no process group
exists and every function here returns what it was given. With many ranks the engine is ``torch.distributed``: NCCL
between GPUs, gloo between CPUs.

Each collective has a name, under which ``RECORD`` counts calls and bytes and says where the rank stands; a
``Heartbeat`` writes that down, so that after a hang the files name rank, step and collective. Those that the compiled
step needs are custom operators: opaque to the compiler, and counted on every call rather than once when traced. On a
GPU they wait for nothing: they are queued on the stream like a kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import json
import logging
import os
import platform
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cast_fast.errors import UserError

logger = logging.getLogger("cast_fast")

T = TypeVar("T")

EXCHANGES = ("auto", "gather", "reduce")
"""How ranks share a queue of which each holds a part; ``auto`` takes the one that sends fewer bytes."""
HOST_TIMEOUT = datetime.timedelta(days=2)
"""Of the ranks' waiting for rank 0's work on the host, such as the first scan of a large dataset."""


@dataclasses.dataclass(frozen=True)
class World:
    """Where this process stands among the ranks."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes metrics and prints."""
        return self.rank == 0


def world_from_environment() -> World:
    """Reads torchrun's variables.

    Raises:
        UserError: a variable is no integer, or rank and world size contradict each other.
    """
    values = {}
    for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)):
        text = os.environ.get(name, str(default))
        try:
            values[name] = int(text)
        except ValueError:
            raise UserError(f"environment variable {name}: got {text!r}, expected torchrun's integer") from None
    if not 0 <= values["RANK"] < values["WORLD_SIZE"]:
        raise UserError(f"RANK={values['RANK']} and WORLD_SIZE={values['WORLD_SIZE']}: expected 0 <= RANK < WORLD_SIZE")
    return World(values["RANK"], values["LOCAL_RANK"], values["WORLD_SIZE"])


# torch renames these two; the new names are not in every supported version.
_gather_rows = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_sums = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_host_group: Any = None
_checkpoint_group: Any = None


@contextlib.contextmanager
def process_group(world: World, device: torch.device, timeout: float) -> Iterator[None]:
    """Joins the ranks that torchrun started, for the time of the context; nothing at world size one.

    Args:
        world: from ``world_from_environment``.
        device: where the step runs; decides between NCCL and gloo.
        timeout: seconds that a collective may last. Then the rank ends with an error: by an exception with gloo, by
            torch's watchdog (SIGABRT) with NCCL.
    """
    global _host_group, _checkpoint_group
    if world.size == 1:
        yield
        return
    limit = datetime.timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=limit))
    where: dict[str, Any] = {"store": _fresh_store(store, world, timeout), "rank": world.rank, "world_size": world.size}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=limit, device_id=device, **where)
    else:
        dist.init_process_group("gloo", timeout=limit, **where)
    _host_group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    _checkpoint_group = dist.new_group(backend="gloo", timeout=limit)
    RECORD.reset()
    try:
        yield
    finally:
        _host_group = _checkpoint_group = None
        # A rank that leaves because of an error must not wait for others here: the process is about to end anyway.
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def end_with_launcher() -> None:
    """Asks the kernel for SIGTERM when the launcher dies: no worker goes on alone when torchrun itself is killed.

    torchrun hands SIGTERM, SIGINT, SIGHUP and SIGQUIT to its workers; any other signal kills it (SIGUSR1 too, unless
    ``--signals-to-handle`` names it) and would leave them as orphans. Linux only; nothing without torchrun.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _fresh_store(store: dist.Store, world: World, timeout: float) -> dist.Store:
    """The part of the store that belongs to these very processes.

    After a restart torchrun hands out the store of the dead processes, with their addresses in it (torch 2.14), and its
    count of restarts may differ between nodes. So the ranks agree on a name nobody has used: each leaves a mark of its
    own, rank 0 publishes the marks that it sees beside the name, and a rank believes a name that comes with its mark.

    Raises:
        RuntimeError: some rank did not come within ``timeout`` seconds.
    """
    until = time.monotonic() + timeout
    mark = uuid.uuid4().hex
    published = "{}"
    if world.rank:
        store.set(f"mark/{world.rank}", mark)
    while time.monotonic() < until:
        if world.rank == 0:
            marks = {r: _peek(store, f"mark/{r}") for r in range(1, world.size)}
            latest = json.dumps({"name": mark, "marks": list(marks.values())})
            if latest != published:
                store.set("session", latest)
                published = latest
            if all(_peek(store, f"seen/{mark}/{r}") for r in range(1, world.size)):
                return dist.PrefixStore(mark, store)
        else:
            session = json.loads(_peek(store, "session") or "{}")
            if session and session["marks"][world.rank - 1 : world.rank] == [mark]:
                store.set(f"seen/{session['name']}/{world.rank}", "yes")
                return dist.PrefixStore(session["name"], store)
        time.sleep(0.02)
    raise RuntimeError(
        f"rank {world.rank}: not all {world.size} ranks came within {timeout:g} s (--collective-timeout)"
    )


def _peek(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def world_size() -> int:
    """Number of ranks of the process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank in the process group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def checkpoint_group() -> Any:
    """The process group for saving and reading checkpoints, ``None`` at world size one.

    Nothing else uses it, so that a thread may save while training goes on; its collectives time out as the step's do.
    """
    return _checkpoint_group


def on_main(work: Callable[[], T], name: str, group: Any = None) -> T:
    """Does something on rank 0 alone, while the others wait, and returns its result on every rank.

    Args:
        work: returns something JSON-able; runs on rank 0.
        name: for the record.
        group: a gloo group of all ranks with a time-out of its own; by default the ranks wait for rank 0 as long as it
            takes. With a group, which may be a thread's, nothing is recorded.

    Raises:
        SystemExit: on the other ranks, where rank 0 failed: it reports the error for all, they leave with its code.
    """
    if world_size() == 1:
        return work()
    if rank() != 0:
        message = json.loads(_broadcast_text("", name, group))
        if message["code"] is not None:
            raise SystemExit(message["code"])
        return message["result"]
    try:
        result = work()
    except BaseException as error:
        _broadcast_text(json.dumps({"code": _exit_code(error)}), name, group)
        raise
    _broadcast_text(json.dumps({"code": None, "result": result}), name, group)
    return result


def together(work: Callable[[], T], name: str) -> T:
    """Does something on every rank and returns each rank's own result, or fails on all where it fails on one.

    Args:
        work: runs on every rank; no collectives in it.
        name: for the record.

    Raises:
        SystemExit: on ranks that did not fail, where another did. Each failing rank raises its own error, and rank 0
            says which rank it was.
    """
    if world_size() == 1:
        return work()
    error, result, message = None, None, None
    try:
        result = work()
    except BaseException as caught:
        error, message = caught, {"code": _exit_code(caught), "text": f"{type(caught).__name__}: {caught}"}
    messages: list[Any] = [None] * world_size()
    with RECORD.collective(name, 0):
        dist.all_gather_object(messages, message, group=_host_group)
    if error is not None:
        raise error
    failed = [(number, found) for number, found in enumerate(messages) if found is not None]
    if failed:
        number, found = failed[0]
        if rank() == 0:
            logger.error("%s: rank %d failed: %s", name, number, found["text"])
        raise SystemExit(found["code"])
    return result  # pyright: ignore[reportReturnType]


def _exit_code(error: BaseException) -> Any:
    return 2 if isinstance(error, UserError) else getattr(error, "code", 1)


def _broadcast_text(text: str, name: str, group: Any = None) -> str:
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    length = torch.tensor([len(data)])
    recorded = RECORD.collective(name, len(data) * (world_size() - 1) if rank() == 0 else 0)
    with recorded if group is None else contextlib.nullcontext():
        group = group or _host_group
        dist.broadcast(length, 0, group=group)
        if rank() != 0:
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0, group=group)
    return bytes(data.tolist()).decode()


def barrier(name: str) -> None:
    """Waits on the host until every rank is here; rank 0 may take its time."""
    if world_size() > 1:
        with RECORD.collective(name, 0):
            dist.barrier(group=_host_group)


class Record:
    """Traffic of this rank by name of the collective, and where the rank stands."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.step = 0
        """The step that is being computed; set by the training loop."""
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        """Bytes that this rank had for other ranks: the payload of a bandwidth-optimal algorithm."""
        self.last = "none"
        self.inside = False
        """Whether the last collective has begun and not ended. On a GPU it ends when it is queued."""
        self.since = time.time()

    def begin(self, name: str, sent: int) -> None:
        """A collective starts, with so many bytes for others."""
        self.calls[name] += 1
        self.sent[name] += sent
        self.last, self.inside, self.since = name, True, time.time()

    def end(self) -> None:
        """It is done."""
        self.inside, self.since = False, time.time()

    @contextlib.contextmanager
    def collective(self, name: str, sent: int) -> Iterator[None]:
        """``begin`` and, if nothing is raised, ``end``."""
        self.begin(name, sent)
        yield
        self.end()

    def state(self) -> dict[str, Any]:
        """Where the rank stands, JSON-able."""
        return {"step": self.step, "collective": self.last, "inside": self.inside, "since": self.since}


RECORD = Record()
"""This process's record."""


class Heartbeat:
    """Writes ``rank-N.json`` again and again: rank, host, process, step, collective, and since when.

    A thread of its own does it, so that the last file stands when the rank hangs in a collective, and goes stale when
    the whole process is gone or stopped.

    Args:
        folder: on a file system that all ranks share.
        world: this rank.
        every: seconds between two writes.
    """

    def __init__(self, folder: Path, world: World, every: float = 2.0) -> None:
        self._folder, self._world, self._every = Path(folder), world, every
        self._path = self._folder / f"rank-{world.rank}.json"
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if self._world.size > 1:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.write()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._leave.set()
            self._thread.join()
            self.write()

    def _beat(self) -> None:
        while not self._leave.wait(self._every):
            self.write()

    def write(self) -> None:
        """Replaces the file."""
        content = {"rank": self._world.rank, "host": platform.node(), "process": os.getpid(), **RECORD.state()}
        content["written"] = time.time()
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(content) + "\n")
            os.replace(temporary, self._path)
        except OSError as error:
            logger.warning("heartbeat: cannot write %s: %s", self._path, error.strerror or error)


def heartbeats(folder: Path) -> str:
    """One line a rank from the files of ``Heartbeat``: who stands where."""
    now = time.time()
    found = []
    for path in Path(folder).glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text()))
    lines = []
    for beat in sorted(found, key=lambda beat: beat["rank"]):
        where = "in" if beat["inside"] else "after"
        lines.append(
            f"rank {beat['rank']} (process {beat['process']} on {beat['host']}): step {beat['step']}, {where} "
            f"'{beat['collective']}' for {now - beat['since']:.0f} s, last heartbeat {now - beat['written']:.0f} s ago"
        )
    return "\n".join(lines)


# Collectives of the step. Sent bytes: what this rank has for others, each byte once per hop of the optimal algorithm.


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@torch.library.custom_op("cast_fast::all_gather", mutates_args=())
def _all_gather(rows: Tensor, name: str) -> Tensor:
    result = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    with RECORD.collective(name, _bytes(rows) * (world_size() - 1)):
        _gather_rows(result, rows.contiguous())
    return result


@_all_gather.register_fake
def _all_gather_fake(rows: Tensor, name: str) -> Tensor:
    del name
    return rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))


@torch.library.custom_op("cast_fast::reduce_scatter", mutates_args=())
def _reduce_scatter(rows: Tensor, name: str) -> Tensor:
    result = rows.new_empty((rows.shape[0] // world_size(), *rows.shape[1:]))
    with RECORD.collective(name, _bytes(result) * (world_size() - 1)):
        _scatter_sums(result, rows.contiguous())
    return result


@_reduce_scatter.register_fake
def _reduce_scatter_fake(rows: Tensor, name: str) -> Tensor:
    del name
    return rows.new_empty((rows.shape[0] // world_size(), *rows.shape[1:]))


@torch.library.custom_op("cast_fast::all_reduce", mutates_args=())
def _all_reduce(tensor: Tensor, name: str, maximum: bool) -> Tensor:
    result = tensor.clone(memory_format=torch.contiguous_format)
    with RECORD.collective(name, 2 * _bytes(result) * (world_size() - 1) // world_size()):
        dist.all_reduce(result, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
    return result


@_all_reduce.register_fake
def _all_reduce_fake(tensor: Tensor, name: str, maximum: bool) -> Tensor:
    del name, maximum
    return tensor.new_empty(tensor.shape)


def _keep_name(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.name = inputs[1]


# The loss is a sum over ranks, so what one rank's rows contribute to all ranks' losses comes back as a sum.
_all_gather.register_autograd(
    lambda ctx, grad: (_reduce_scatter(grad, f"{ctx.name}, gradient"), None), setup_context=_keep_name
)
_reduce_scatter.register_autograd(
    lambda ctx, grad: (_all_gather(grad, f"{ctx.name}, gradient"), None), setup_context=_keep_name
)


def all_gather(rows: Tensor, name: str) -> Tensor:
    """Rows of all ranks, in rank order: (n, …) → (W·n, …). Differentiable; every rank gives equally many rows."""
    return rows if world_size() == 1 else _all_gather(rows, name)


def reduce_scatter(rows: Tensor, name: str) -> Tensor:
    """Sum over ranks, of which this rank gets its part: (W·n, …) → (n, …). Differentiable."""
    return rows if world_size() == 1 else _reduce_scatter(rows, name)


def all_reduce(tensor: Tensor, name: str) -> Tensor:
    """Sum over ranks, the same bits on each. Not differentiable."""
    return tensor if world_size() == 1 else _all_reduce(tensor.detach(), name, False)


def all_reduce_max(tensor: Tensor, name: str) -> Tensor:
    """Elementwise maximum over ranks. Not differentiable."""
    return tensor if world_size() == 1 else _all_reduce(tensor.detach(), name, True)


def all_to_all(rows: Tensor, send: Sequence[int], receive: Sequence[int], name: str, first: int = 0) -> Tensor:
    """Sends the first ``send[0]`` rows to rank ``first``, the next to the rank after it, …; splits may be uneven.

    All ranks call it, also where runs of ranks exchange rows among themselves. A process group for each run would be a
    second NCCL communicator, and those must not be used while another one has an operation on its way
    (``torch.distributed.new_group``), such as the gathering of the queue.

    Args:
        rows: (sum(send), …) contiguous.
        send: rows for each rank of this rank's run.
        receive: rows from each rank of this rank's run.
        name: for the record.
        first: the run's first rank.

    Returns:
        (sum(receive), …), in the order of the senders.
    """
    if world_size() == 1:
        return rows
    result = rows.new_empty((sum(receive), *rows.shape[1:]))
    before, after = [0] * first, [0] * (world_size() - first - len(send))
    others = len(rows) - send[rank() - first]
    with RECORD.collective(name, others * rows[0].numel() * rows.element_size()):
        dist.all_to_all_single(result, rows, [*before, *receive, *after], [*before, *send, *after])
    return result


class Gathering:
    """An all-gather on its way; the result is complete after ``wait``, which on a GPU blocks the stream only.

    Args:
        result: (W·n, …), to be filled.
        rows: (n, …) of this rank; to be left alone until ``wait``.
        name: for the record.
    """

    def __init__(self, result: Tensor, rows: Tensor, name: str) -> None:
        self._result, self._name = result, name
        RECORD.begin(name, _bytes(rows) * (world_size() - 1))
        self._work = _gather_rows(result, rows.contiguous(), async_op=True)

    def wait(self) -> Tensor:
        """The rows of all ranks."""
        RECORD.last, RECORD.inside = self._name, True
        assert self._work is not None
        self._work.wait()
        RECORD.end()
        return self._result


def gradient_hook(compression: torch.dtype | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Communication hook of DistributedDataParallel: the mean over ranks, sent in ``compression`` where given."""
    buffer = bucket.buffer()
    payload = (buffer if compression is None else buffer.to(compression)).div_(world_size())
    RECORD.begin("gradients", 2 * _bytes(payload) * (world_size() - 1) // world_size())
    work = dist.all_reduce(payload, async_op=True)
    assert work is not None

    def mean(future: torch.futures.Future[Any]) -> Tensor:
        reduced = future.value()[0]
        if bucket.is_last():
            RECORD.end()
        return reduced if compression is None else buffer.copy_(reduced)

    return work.get_future().then(mean)


def exchange_bytes(batch: int, queue_size: int, dim: int, world: int, element: int = 4) -> dict[str, int]:
    """Bytes that one rank sends in a step to compare its queries with a queue of which each rank holds a part.

    ``gather`` sends the rank's part of the queue to the others; ``reduce`` sends query and key of each sample, and
    returns a sum, a count and a weighted sum of keys a sample, all in float32.

    Args:
        batch: N, samples a rank.
        queue_size: K, over all ranks.
        dim: D.
        world: W, number of ranks.
        element: bytes of a number in the queue.
    """
    return {
        "gather": (world - 1) * -(-queue_size // world) * dim * element,
        "reduce": (world - 1) * batch * (2 * dim + dim + 2) * 4,
    }


def choose_exchange(wanted: str, batch: int, queue_size: int, dim: int, world: int, element: int = 4) -> str:
    """``wanted``, or for ``auto`` the exchange that sends fewer bytes (``gather`` where equal, as it is overlapped).

    Args:
        wanted: one of ``EXCHANGES``.
        batch, queue_size, dim, world, element: as for ``exchange_bytes``.

    Raises:
        ValueError: unknown exchange.
    """
    if wanted not in EXCHANGES:
        raise ValueError(f"exchange: got {wanted!r}, expected one of {', '.join(EXCHANGES)}")
    if wanted != "auto":
        return wanted
    return min((sent, name) for name, sent in exchange_bytes(batch, queue_size, dim, world, element).items())[1]


def subgroup_size(world: int, most: int = 32) -> int:
    """Largest divisor of ``world`` up to ``most``: ranks that shuffle among themselves, so that messages stay large."""
    return max(size for size in range(1, min(world, most) + 1) if world % size == 0)
