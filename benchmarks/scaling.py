"""What a step sends between ranks: counted on real processes, compared with a model, and that carried to 1,024 GPUs.

    python benchmarks/scaling.py [--out DIR] [--ranks 1 2 3 4] [--overlap] [--step-ms MS] [--nvlink GB/s]
                                 [--link Gbit/s]

Measured (CPU, gloo, no GPU is needed): 1 to 4 processes take training steps of ResNet-18; ``distributed.RECORD``
counts the bytes that each collective was handed for other ranks, and where the system allows a network namespace
(``unshare``) the kernel's loopback counter says what really went over the wire. ``modelled_bytes`` must agree with the
count: exactly, but for the shuffle, whose splits are random. ``--overlap`` measures something else, how much of the
queue's all-gather hides behind the key encoder: by how much a step is longer than one which has the rows beforehand,
against the time of the same collective with nothing beside it. On a CPU both compete for cores, which a GPU's links do
not.

Modelled (nothing of it ran): the same formulas at ResNet-50 and 224 pixels, divided by the bandwidths given, nothing
overlapped, for nodes of eight A100. Once for this project, once for the usual way: all-gather of float32 key images
(plain and masked) for shuffled BatchNorm, and on every rank the whole queue, for which keys are all-gathered.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import harness
import torch
import torch.multiprocessing as multiprocessing

from cast_fast import distributed
from cast_fast.cli import EXIT_USER_ERROR, OneLineParser
from cast_fast.data.batch import random_batch
from cast_fast.distributed import RECORD, World
from cast_fast.encoder import cam_grid
from cast_fast.errors import UserError
from cast_fast.moco import MoCo
from cast_fast.objective import Objective
from cast_fast.optim import build_optimizer
from cast_fast.parallel import RankSettings
from cast_fast.step import TrainStep

T = TypeVar("T")

STEPS = 4
OVERLAP_STEPS = 20
OVERLAP_QUEUE = 65_536
METRICS = 7
"""Means and counts in the step's last all-reduce; one number a rank comes on top."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the traffic of a step depends on."""

    batch: int
    """N, pairs a rank."""
    side: int
    """Of the crops, in pixels."""
    queue: int
    """K, over all ranks."""
    dim: int
    """D."""
    parameters: int
    """Of the query encoder."""
    statistics: int
    """Float BatchNorm buffers of both encoders."""


MEASURED = Sizes(batch=8, side=32, queue=4096, dim=128, parameters=11_242_176, statistics=19_200)
"""ResNet-18 with a linear head."""
FULL = Sizes(batch=256, side=224, queue=65_536, dim=128, parameters=23_770_304, statistics=106_240)
"""ResNet-50 with a linear head, in the published settings."""


def modelled_bytes(sizes: Sizes, world: int, exchange: str, members: int | None = None) -> dict[str, float]:
    """Bytes that one rank sends in a step, by collective, every number but the crops in four bytes.

    Args:
        sizes: see there.
        world: W.
        exchange: ``gather`` or ``reduce``.
        members: ranks that shuffle among themselves.
    """
    if world == 1:
        return {}
    members = members or distributed.subgroup_size(world)
    moved = sizes.batch * (members - 1) / members
    ring = 2 * (world - 1) / world * 4
    sent = distributed.exchange_bytes(sizes.batch, sizes.queue, sizes.dim, world)[exchange]
    return {
        "key shuffle": moved * 4 * sizes.side**2,
        "key return": moved * 2 * sizes.dim * 4,
        "queue exchange": sent,
        "attention weights": ring,
        "gradients": ring * sizes.parameters,
        "metrics": ring * (METRICS + world),
        "running statistics": ring * sizes.statistics,
    }


def usual_bytes(sizes: Sizes, world: int) -> dict[str, float]:
    """The same for all-gathered shuffling of float32 images and a queue on every rank."""
    if world == 1:
        return {}
    image = 3 * 4 * sizes.side**2
    return {
        "key shuffle": (world - 1) * sizes.batch * 2 * image,
        "key return": (world - 1) * sizes.batch * 2 * sizes.dim * 4,
        "queue exchange": (world - 1) * sizes.batch * sizes.dim * 4,
        "gradients": 2 * (world - 1) / world * 4 * sizes.parameters,
    }


# Measured


def _loopback() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def _measure(rank: int, world: World, port: int, exchange: str, out: str) -> None:
    world = dataclasses.replace(world, rank=rank, local_rank=rank)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    with distributed.process_group(world, torch.device("cpu"), 300):
        model = MoCo("resnet18", MEASURED.dim, "linear", MEASURED.queue)
        parameters = sum(parameter.numel() for parameter in model.query.parameters())
        statistics = (
            sum(value.numel() for value in model.buffers() if value.is_floating_point()) - model.queue.keys.numel()
        )
        assert (parameters, statistics) == (MEASURED.parameters, MEASURED.statistics), (parameters, statistics)
        step = TrainStep(
            model, build_optimizer(model.query.parameters(), 0.1), objective=Objective(), compile=False,
            precision="fp32", ranks=RankSettings(world, "shuffle", "local", exchange),
        )  # fmt: skip
        grid = cam_grid("resnet18", MEASURED.side)
        batch = random_batch(MEASURED.batch, MEASURED.side, grid, "cpu", seed=rank)
        step(batch, 0.1)  # DistributedDataParallel's first step settles its buckets
        distributed.barrier("start")
        RECORD.reset()
        before = _loopback()
        for _ in range(STEPS):
            step(batch, 0.1)
        distributed.barrier("end")
        wire = _loopback() - before
        sent = {name: count / STEPS for name, count in RECORD.sent.items() if name != "end"}
        Path(out, f"rank-{rank}.json").write_text(json.dumps({"sent": sent, "wire": wire / STEPS}))


def _measure_overlap(rank: int, world: World, port: int, exchange: str, out: str) -> None:
    """Milliseconds: the gathering alone, a step with it and without it, and what the step waits for the rows."""
    world = dataclasses.replace(world, rank=rank, local_rank=rank)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    with distributed.process_group(world, torch.device("cpu"), 300):
        model = MoCo("resnet18", MEASURED.dim, "linear", OVERLAP_QUEUE)
        step = TrainStep(
            model, build_optimizer(model.query.parameters(), 0.1), objective=Objective(), compile=False,
            precision="fp32", ranks=RankSettings(world, "shuffle", "local", exchange),
        )  # fmt: skip
        batch = random_batch(MEASURED.batch, MEASURED.side, cam_grid("resnet18", MEASURED.side), "cpu", seed=rank)
        queue = model.queue
        begin_gather, finish_gather = queue.begin_gather, queue.finish_gather
        times: dict[str, list[float]] = {"alone": [], "without": [], "step": [], "wait": []}

        def timed(name: str, work: Callable[[], T]) -> T:
            begin = time.perf_counter()
            result = work()
            times[name].append((time.perf_counter() - begin) * 1e3)
            return result

        step(batch, 0.1)
        for _ in range(OVERLAP_STEPS):
            distributed.barrier("alone")
            rows = timed("alone", lambda: finish_gather(begin_gather()))
            # The rows are there before the clock starts.
            queue.begin_gather, queue.finish_gather = (lambda: ...), (lambda _, rows=rows: rows)
            distributed.barrier("without")
            timed("without", lambda: step(batch, 0.1))
            queue.begin_gather = begin_gather
            queue.finish_gather = lambda gathering: timed("wait", lambda: finish_gather(gathering))
            distributed.barrier("step")
            timed("step", lambda: step(batch, 0.1))
        found = {name: statistics.median(values) for name, values in times.items()}
        Path(out, f"overlap-{rank}.json").write_text(json.dumps(found))


def measure_overlap(ranks: int, out: Path) -> dict[str, float]:
    """Medians of ``_measure_overlap``, mean over ranks."""
    folder = out / f"overlap-{ranks}"
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, __file__, "--worker", str(ranks), "overlap", str(folder)], check=True)
    found = [json.loads((folder / f"overlap-{rank}.json").read_text()) for rank in range(ranks)]
    return {name: sum(one[name] for one in found) / ranks for name in found[0]}


def report_overlap(results: harness.Results, counts: list[int], out: Path) -> None:
    """Measures, records and prints how much of the queue's gathering is hidden."""
    rows = []
    for ranks in counts:
        found = measure_overlap(ranks, out)
        shape = {"ranks": ranks, "batch": MEASURED.batch, "size": MEASURED.side, "queue": OVERLAP_QUEUE}
        for name, value in found.items():
            record = results.record("overlap", name, harness.Failure(""), dtype="fp32", shape=shape, unit="ms")
            results.add(dataclasses.replace(record, value=value, repeats=OVERLAP_STEPS))
        hidden = 1 - (found["step"] - found["without"]) / found["alone"]
        names = ("alone", "without", "step", "wait")
        rows.append([str(ranks), *(f"{found[name]:.1f}" for name in names), f"{hidden:.0%}"])
    harness.print_table(
        f"gathering {OVERLAP_QUEUE:,} keys of {MEASURED.dim} numbers, ResNet-18 at {MEASURED.side} pixels, gloo",
        ["ranks", "alone, ms", "step without, ms", "step with, ms", "wait for rows, ms", "hidden"],
        rows,
        [
            "medians over steps, means over ranks; hidden: 1 - (with - without) / alone",
            "waiting for the rows alone says too little: the shuffle's collectives wait behind the gathering too",
        ],
    )


def measure(ranks: int, exchange: str, out: Path) -> dict[str, Any]:
    """Bytes a rank and step by collective (mean of the ranks), and over the wire in all if that could be seen."""
    folder = out / f"{exchange}-{ranks}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--worker", str(ranks), exchange, str(folder)]
    isolated = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$0" "$@"']
    private = shutil.which("unshare") is not None and shutil.which("ip") is not None
    private = private and subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode == 0
    subprocess.run([*isolated, *command] if private else command, check=True)
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    names = {name for one in found for name in one["sent"]}
    sent = {name: sum(one["sent"].get(name, 0) for one in found) / ranks for name in names}
    joined = ("queue", "queries", "partial sums")
    sent["queue exchange"] = sum(sent.pop(name, 0) for name in joined)
    return {"sent": sent, "wire": found[0]["wire"] if private else None}


def disagreements(counted: dict[str, float], model: dict[str, float]) -> list[str]:
    """Collectives whose count is not the model's: to the byte, but for integer division and random splits."""
    lines = []
    for name in sorted({*model, *counted}):
        found, expected = counted.get(name, 0.0), model.get(name, 0.0)
        # The splits of eight samples a rank and four steps: the mean of the ranks is within a third.
        tolerance = 0.34 * expected if name.startswith("key") else 1.0 + 1e-6 * expected
        if abs(found - expected) > tolerance:
            lines.append(f"{name}: counted {found:,.0f}, model {expected:,.0f}")
    return lines


def _worker(ranks: int, exchange: str, folder: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work = _measure_overlap if exchange == "overlap" else _measure
    exchange = "gather" if exchange == "overlap" else exchange
    multiprocessing.spawn(work, (World(0, 0, ranks), port, exchange, folder), nprocs=ranks)  # pyright: ignore


# Modelled


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The machine of the model: nodes of eight GPUs, a network link each."""

    step: float
    """Seconds of a step without communication."""
    nvlink: float
    """Bytes a second that a GPU sends to others of its node."""
    link: float
    """Bytes a second of a GPU's network link."""
    latency: float = 20e-6
    """Of one collective, a doubling of the ranks."""
    node: int = 8


def seconds(sent: dict[str, float], world: int, cluster: Cluster, members: int) -> float:
    """Time of a step's collectives, one after the other.

    A ring over nodes enters and leaves each node on all links at once, an eighth of the bytes on each. In an all-to-all
    every GPU sends what goes to other nodes over its own link.
    """
    total = 0.0
    for name, count in sent.items():
        time = count / cluster.nvlink
        if world > cluster.node:
            if name in ("key shuffle", "key return") and members:
                outside = max(0, members - cluster.node) / max(1, members - 1)
                time = max(time * (1 - outside), count * outside / cluster.link)
            else:
                time = max(time, count / cluster.node / cluster.link)
        total += time + cluster.latency * max(1, world - 1).bit_length()
    return total


def efficiency(world: int, cluster: Cluster) -> dict[str, float]:
    """Share of the step that is not communication, for both designs; K grows where the global batch exceeds it."""
    sizes = dataclasses.replace(FULL, queue=max(FULL.queue, FULL.batch * world))
    members = distributed.subgroup_size(world)
    exchange = distributed.choose_exchange("auto", sizes.batch, sizes.queue, sizes.dim, world)
    ours = seconds(modelled_bytes(sizes, world, exchange, members), world, cluster, members)
    usual = seconds(usual_bytes(sizes, world), world, cluster, 0)
    return {name: cluster.step / (cluster.step + time) for name, time in (("ours", ours), ("usual", usual))}


def chart(measured: dict[tuple[int, str], dict[str, Any]], cluster: Cluster, path: Path) -> None:
    """Left: bytes counted against the model. Right: the model alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for exchange, marker in (("gather", "o"), ("reduce", "s")):
        ranks = sorted(rank for rank, name in measured if name == exchange and rank > 1)
        counted = [sum(measured[rank, exchange]["sent"].values()) / 1e6 for rank in ranks]
        left.plot(ranks, counted, marker, label=f"{exchange}: counted")
        model = [sum(modelled_bytes(MEASURED, rank, exchange).values()) / 1e6 for rank in ranks]
        left.plot(ranks, model, "-", lw=1, color="grey", label="model" if exchange == "gather" else None)
    left.set(
        title="Measured: ResNet-18, gloo on a CPU", xlabel="ranks", ylabel="MB a rank sends in a step", ylim=(0, None)
    )
    left.set_xticks(sorted({rank for rank, _ in measured if rank > 1}))
    left.legend()
    worlds = [2**power for power in range(11)]
    for name, label in (("ours", "this project"), ("usual", "all-gather shuffle, queue on every rank")):
        right.plot(worlds, [efficiency(world, cluster)[name] for world in worlds], ".-", label=label)
    right.set_xscale("log", base=2)
    right.set(
        title=f"MODELLED, never run: ResNet-50 on A100 nodes, {cluster.step * 1e3:.0f} ms a step,\n"
        f"{cluster.nvlink / 1e9:.0f} GB/s NVLink, {cluster.link * 8 / 1e9:.0f} Gb/s a GPU, nothing overlapped",
        xlabel="GPUs", ylabel="weak-scaling efficiency", ylim=(0, 1.02),
    )  # fmt: skip
    right.legend(loc="lower left")
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    """Measures, compares, models; returns 1 where count and model disagree."""
    parser = OneLineParser(prog="scaling.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("bench_out/scaling"), help="folder for results and chart")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4], help="numbers of processes to measure")
    parser.add_argument("--overlap", action="store_true", help="measure how much of the queue's exchange is hidden")
    parser.add_argument(
        "--step-ms", type=float, default=165.0, help="a step of 256 pairs without communication (model)"
    )
    parser.add_argument("--nvlink", type=float, default=230.0, help="GB/s from GPU to GPU within a node (model)")
    parser.add_argument("--link", type=float, default=200.0, help="Gbit/s of a GPU's network link (model)")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        _worker(int(args.worker[0]), args.worker[1], args.worker[2])
        return 0
    try:
        if min(args.ranks) < 1 or (args.overlap and max(args.ranks) < 2):
            raise UserError(f"--ranks: got {args.ranks}, expected at least {2 if args.overlap else 1}")
        if not min(args.step_ms, args.nvlink, args.link) > 0:
            raise UserError("--step-ms, --nvlink and --link: expected more than 0")
        results = harness.open_results(args.out, harness.environment(torch.device("cpu")))
    except UserError as error:
        print(f"scaling.py: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    if args.overlap:
        report_overlap(results, [ranks for ranks in args.ranks if ranks > 1], args.out)
        return 0
    measured = {
        (ranks, exchange): measure(ranks, exchange, args.out)
        for ranks in args.ranks
        for exchange in ("gather", "reduce")
    }
    wrong = []
    rows = []
    for (ranks, exchange), found in measured.items():
        model = modelled_bytes(MEASURED, ranks, exchange)
        wrong += [f"{ranks} ranks, {exchange}, {line}" for line in disagreements(found["sent"], model)]
        total, expected = sum(found["sent"].values()), sum(model.values())
        wire = "–" if found["wire"] is None else f"{found['wire'] / ranks:,.0f}"
        rows.append([str(ranks), exchange, f"{total:,.0f}", f"{expected:,.0f}", wire])
        shape = {"ranks": ranks, "batch": MEASURED.batch, "size": MEASURED.side, "queue": MEASURED.queue}
        record = results.record(
            "sent", exchange, harness.Failure(""), dtype="fp32", shape=shape, unit="B/step/rank", bytes=round(total)
        )
        results.add(dataclasses.replace(record, value=total, repeats=STEPS))
    harness.print_table(
        "bytes a rank sends in a step, ResNet-18 at 32 pixels, gloo",
        ["ranks", "exchange", "counted", "model", "on the wire"],
        rows,
        ["on the wire: the kernel's loopback counter in a network namespace, headers included, over all ranks, a rank"],
    )
    cluster = Cluster(args.step_ms / 1e3, args.nvlink * 1e9, args.link * 1e9 / 8)
    rows = []
    for world in (1, 8, 16, 64, 256, 1024):
        modelled = efficiency(world, cluster)
        rows.append([str(world), f"{modelled['ours']:.0%}", f"{modelled['usual']:.0%}"])
    harness.print_table(
        "MODELLED weak scaling, ResNet-50 on A100 nodes (never run)",
        ["GPUs", "this project", "all-gather shuffle, queue on every rank"],
        rows,
    )
    chart(measured, cluster, args.out / "scaling.png")
    for line in wrong:
        print(f"count and model disagree: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
