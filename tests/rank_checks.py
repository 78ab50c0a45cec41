"""What the processes of the multi-rank tests compute; every function also runs on one rank, as the reference.

One process group is made for a number of ranks, all computations run in it, and the results come back as one dictionary
a rank. The start of a process with torch costs seconds, so they are few.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch.distributed as dist
from tiny_encoder import STRIDE, tiny_encoder
from torch import Tensor, nn
from torch.fx import Graph

from cast_fast import distributed
from cast_fast.data.batch import Batch, random_batch
from cast_fast.data.sampling import shuffle_order
from cast_fast.distributed import RECORD, World
from cast_fast.encoder import Encoder, LinearHead
from cast_fast.moco import MoCo
from cast_fast.objective import Objective
from cast_fast.optim import build_optimizer
from cast_fast.parallel import RankSettings
from cast_fast.shuffle import shuffle_plan
from cast_fast.step import TrainStep
from cast_fast.sync_batch_norm import SyncBatchNorm2d, synchronise_batch_norm

GLOBAL_BATCH = 12
GRID = 3
DIM = 8
STEPS = 5
LR = 0.05


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of a few steps; ``name`` identifies it in the results."""

    name: str
    key_bn: str = "sync"
    query_bn: str = "sync"
    exchange: str = "gather"
    queue_size: int = 31
    head: str = "linear"
    temperature: float = 0.2
    kernels: bool = False
    compile: bool = False
    compression: str = "none"
    attention: bool = True
    members: int = 0
    """Ranks that shuffle among themselves; 0 for all."""
    groups: int = 1
    """Groups of a rank's batch."""
    poisoned: tuple[int, ...] = ()
    """Steps in which the sample at position 1 has a NaN weight, so that one rank's loss is NaN."""
    dtype: torch.dtype = torch.float64
    wide: bool = False
    """A trunk that does not fit the first bucket of gradients, 1 MiB."""


CASES = (
    # 31 is no multiple of the ranks, nor of the batch.
    Case("gather"),
    Case("reduce", exchange="reduce"),
    Case("mlp", exchange="reduce", head="mlp"),
    Case("even queue", exchange="gather", queue_size=24),
    Case("smallest queue", exchange="reduce", queue_size=12),
    Case("low temperature", exchange="reduce", temperature=0.02),
    Case("kernels gather", kernels=True),
    Case("kernels reduce", exchange="reduce", kernels=True),
    Case("moco", exchange="reduce", attention=False),
    Case("local", key_bn="local", query_bn="local"),
    Case("shuffle", key_bn="shuffle", query_bn="local", exchange="reduce"),
    Case("shuffle moco", key_bn="shuffle", query_bn="sync", attention=False),
    Case("shuffle in pairs", key_bn="shuffle", query_bn="local", members=2),
    Case("groups", key_bn="shuffle", query_bn="local", exchange="reduce", groups=3),
    Case("groups of keys", key_bn="shuffle", query_bn="sync", groups=3, attention=False),
    Case("groups that stay", key_bn="local", query_bn="local", groups=3),
    Case("groups of queries", key_bn="sync", query_bn="local", groups=3),
    Case("not finite", key_bn="shuffle", query_bn="local", exchange="reduce", poisoned=(1, 3)),
)
OTHER_CASES = (
    Case("bf16", compression="bf16", key_bn="shuffle", query_bn="local", dtype=torch.float32),
    Case("exact", key_bn="shuffle", query_bn="local", dtype=torch.float32),
)


class GroupedBatchNorm(nn.BatchNorm2d):
    """BatchNorm of each rank's samples for itself, in one process; running statistics are the mean of the ranks'."""

    groups: list[Tensor]

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        result = torch.empty_like(input)
        means, variances = [], []
        for group in self.groups:
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            normalised = nn.functional.batch_norm(
                input[group], mean, variance, self.weight, self.bias, True, self.momentum or 0.0, self.eps
            )
            result = result.index_copy(0, group, normalised)
            means.append(mean)
            variances.append(variance)
        with torch.no_grad():
            self.running_mean.copy_(torch.stack(means).mean(0))
            self.running_var.copy_(torch.stack(variances).mean(0))
        return result


def group_batch_norm(encoder: Encoder) -> list[GroupedBatchNorm]:
    found = []
    for module in encoder.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GroupedBatchNorm
            found.append(module)
    return found


def global_batch(number: int, attention: bool = True) -> Batch:
    """The same samples for any number of ranks; one without attention weight, one with an empty key mask."""
    batch = random_batch(GLOBAL_BATCH, GRID * STRIDE, (GRID, GRID), "cpu", seed=number, attention=attention)
    if attention:
        assert batch.weight is not None and batch.key_mask is not None
        batch.weight[number % GLOBAL_BATCH] = 0
        batch.key_mask[(number + 5) % GLOBAL_BATCH] = 0
    return batch


def part(batch: Batch, world: World) -> Batch:
    """The samples of one rank."""
    values: dict[str, Any] = {
        field.name: None if (value := getattr(batch, field.name)) is None else value[world.rank :: world.size]
        for field in dataclasses.fields(batch)
    }
    return Batch(**values)


def groups_of(case: Case, ranks: int, step: int) -> list[Tensor]:
    """Samples whose keys are embedded together: positions in the global batch."""
    positions = torch.arange(GLOBAL_BATCH)
    if case.key_bn == "local":
        return [positions[rank::ranks] for rank in range(ranks)]
    members = case.members or ranks
    found = []
    count = GLOBAL_BATCH // ranks
    target = torch.from_numpy(shuffle_order(count * members, 3, step)) // count
    for first in range(0, ranks, members):
        # Samples of the group's ranks, one rank after the other.
        own = torch.cat([positions[rank::ranks] for rank in range(first, first + members)])
        found += [own[target == place] for place in range(members)]
    return found


def wide_encoder() -> Encoder:
    """``tiny_encoder`` with 160 channels: 1.8 MB in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = nn.Sequential(
            nn.Conv2d(3, 160, 5, stride=4, padding=2, bias=False), nn.BatchNorm2d(160), nn.ReLU(),
            nn.Conv2d(160, 160, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(160), nn.ReLU(),
        )  # fmt: skip
        return Encoder(trunk, LinearHead(160, DIM))


def trajectory(case: Case, world: World, reference_ranks: int = 0) -> dict[str, Any]:
    """A few steps; with ``reference_ranks`` in one process on the whole batch, as so many ranks should compute it."""
    encoder = wide_encoder() if case.wide else tiny_encoder(DIM, case.head)
    model = MoCo.from_encoder(encoder, DIM, case.queue_size).to(case.dtype)
    query_norms: list[GroupedBatchNorm] = []
    key_norms: list[GroupedBatchNorm] = []
    if reference_ranks:
        query_norms = group_batch_norm(model.query) if case.query_bn == "local" else []
        key_norms = group_batch_norm(model.key) if case.key_bn != "sync" else []
    optimizer = build_optimizer(model.query.parameters(), LR)
    ranks = RankSettings(world, case.key_bn, case.query_bn, case.exchange, case.compression, seed=3, groups=case.groups)
    with contextlib.ExitStack() as stack:
        if case.members:
            stack.enter_context(mock.patch.object(distributed, "subgroup_size", return_value=case.members))
        # With NCCL another group must not be used while the queue is being gathered.
        refusal = AssertionError("the step has one process group")
        stack.enter_context(mock.patch.object(dist.distributed_c10d, "new_group", side_effect=refusal))
        step = TrainStep(
            model,
            optimizer,
            objective=Objective(temperature=case.temperature, attention=case.attention),
            momentum=0.9,
            precision="fp32",
            compile=case.compile,
            kernels=case.kernels,
            clip_grad=0.5,
            ranks=ranks,
        )
    metrics, bad, sums, unchanged, gradients = [], [], [], [], {}
    for number in range(STEPS):
        batch = global_batch(number, case.attention)
        if number in case.poisoned:
            assert batch.weight is not None
            batch.weight[1] = float("inf")
            batch.weight[2 * number] = 1  # never the sample that was left out
        for norm in query_norms:
            norm.groups = [torch.arange(GLOBAL_BATCH)[rank::reference_ranks] for rank in range(reference_ranks)]
        for norm in key_norms:
            norm.groups = groups_of(case, reference_ranks, number)
        before = state_of(model, optimizer)
        report = torch.tensor([1.0, world.rank])
        result = step(part(batch, world), LR, report)
        metrics.append(torch.stack([value.to(torch.float64) for value in result]))
        if number in case.poisoned:
            after = state_of(model, optimizer)
            unchanged.append([name for name, value in before.items() if not torch.equal(value, after[name])])
        if number == 0:
            gradients = {
                name: value.grad.clone() for name, value in model.query.named_parameters() if value.grad is not None
            }
        if step.rank_report is not None:
            bad.append(step.rank_report.bad_ranks)
            sums.append(step.rank_report.sums)
    return {
        "metrics": torch.stack(metrics),
        "gradients": gradients,
        "state": state_of(model, optimizer),
        "bad": bad,
        "sums": sums,
        "changed_by_poison": unchanged,
    }


def state_of(model: MoCo, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    state = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("queue.")}
    # (ranks, rows, D) → the columns of the whole queue, side by side.
    columns = distributed.all_gather(model.queue.column().transpose(0, 1).contiguous(), "queue").transpose(0, 1)
    oldest_first = columns.flatten(0, 1)[-len(model.queue) :]
    state["queue.keys"] = oldest_first.roll(int(model.queue.pointer), 0)
    state["queue.pointer"] = model.queue.pointer.clone()
    for number, entry in optimizer.state_dict()["state"].items():
        state[f"momentum.{number}"] = entry["momentum_buffer"].clone()
    return state


def collectives(world: World) -> dict[str, Any]:
    """Each collective with values that tell where they come from."""
    rank, size = world.rank, world.size
    rows = torch.tensor([[rank, 0.0], [rank, 1.0]], dtype=torch.float64, requires_grad=True)
    gathered = distributed.all_gather(rows, "rows")
    factors = torch.arange(1.0, 2 * size + 1, dtype=torch.float64)[:, None] * (rank + 1)
    (gathered * factors).sum().backward()
    mine = torch.full((2 * size, 1), float(rank + 1), dtype=torch.float64, requires_grad=True)
    scattered = distributed.reduce_scatter(mine * torch.arange(2 * size)[:, None], "rows")
    (scattered * (rank + 1)).sum().backward()
    # Rank r sends r + s rows to rank s, each saying (r, s).
    send = [rank + other for other in range(size)]
    payload = torch.tensor([[rank, other] for other in range(size) for _ in range(rank + other)], dtype=torch.uint8)
    moved = distributed.all_to_all(payload.reshape(-1, 2), send, send, "moves")
    return {
        "gathered": gathered.detach(),
        "gathered_gradient": rows.grad,
        "scattered": scattered.detach(),
        "scattered_gradient": mine.grad,
        "sum": distributed.all_reduce(torch.tensor(rank + 1.0), "sum"),
        "maximum": distributed.all_reduce_max(torch.tensor([rank, -rank]), "maximum"),
        "moved": moved,
        "from_main": distributed.on_main(lambda: {"rank": rank, "ä": [1, None]}, "news"),
    }


def batch_norm(world: World) -> dict[str, Any]:
    """Output, gradients and running statistics of one synchronised layer far from zero mean."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(8, 5, 3, 2, generator=generator, dtype=torch.float64) + 100 * torch.arange(5)[:, None, None]
    factors = torch.randn(8, 5, 3, 2, generator=generator, dtype=torch.float64)
    plain = nn.BatchNorm2d(5, dtype=torch.float64)
    nn.init.normal_(plain.weight, generator=generator)
    layer = nn.Sequential(plain)
    synchronise_batch_norm(layer)
    norm = layer[0]
    assert isinstance(norm, SyncBatchNorm2d) and norm.weight is plain.weight
    own = values[world.rank :: world.size].clone().requires_grad_()
    output = layer(own)
    (output * factors[world.rank :: world.size]).sum().backward()
    assert norm.weight.grad is not None and norm.bias.grad is not None
    return {
        "output": output.detach(),
        "input_gradient": own.grad,
        "weight_gradient": distributed.all_reduce(norm.weight.grad, "weights"),
        "bias_gradient": distributed.all_reduce(norm.bias.grad, "weights"),
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
        "evaluated": layer.eval()(own).detach(),
    }


def refusals(world: World) -> dict[str, str]:
    """Messages of what must be refused, on every rank alike and before anything is sent."""
    messages = {}
    model = MoCo.from_encoder(tiny_encoder(DIM), DIM, GLOBAL_BATCH - 1)
    step = TrainStep(
        model, build_optimizer(model.query.parameters(), LR), objective=Objective(), compile=False, precision="fp32",
        ranks=RankSettings(world),
    )  # fmt: skip
    calls = {
        "small queue": lambda: step(part(global_batch(0), world), LR),
        "two queues": lambda: model.queue.shard(world.rank, world.size),
        "wrong world": lambda: TrainStep(
            model, step.optimizer, objective=Objective(), compile=False, precision="fp32",
            ranks=RankSettings(World(0, 0, world.size + 1)),
        ),
    }  # fmt: skip
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def traffic(world: World) -> dict[str, dict[str, int]]:
    """Bytes by collective in one step of each kind."""
    found = {}
    for exchange in ("gather", "reduce"):
        case = Case("traffic", key_bn="shuffle", query_bn="local", exchange=exchange, dtype=torch.float32)
        model = MoCo.from_encoder(tiny_encoder(DIM), DIM, case.queue_size)
        step = TrainStep(
            model, build_optimizer(model.query.parameters(), LR), objective=Objective(), compile=False,
            precision="fp32", ranks=RankSettings(world, "shuffle", "local", exchange, seed=3),
        )  # fmt: skip
        for number in range(2):
            RECORD.reset()
            step(part(global_batch(number), world), LR)
        found[exchange] = {**RECORD.sent}
    # A queue that is worth sending where its numbers have two bytes.
    found["exchange"] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = MoCo.from_encoder(tiny_encoder(DIM), DIM, 44, queue_dtype=dtype)
        step = TrainStep(
            model, build_optimizer(model.query.parameters(), LR), objective=Objective(), compile=False,
            precision="fp32", ranks=RankSettings(world),
        )  # fmt: skip
        assert step._ranks is not None
        found["exchange"][dtype] = step._ranks.exchange(GLOBAL_BATCH // world.size)
    plan = shuffle_plan(3, 1, GLOBAL_BATCH // world.size, world.rank, world.size)
    found["shuffle"] = {"rows": sum(plan.send) - plan.send[world.rank]}
    return found


def failure_on_main(world: World) -> str:
    """Rank 0 fails in its part of the work: it raises, the others leave."""
    del world

    def fail() -> None:
        raise RuntimeError("rank 0 alone")

    try:
        distributed.on_main(fail, "failure")
    except RuntimeError as error:
        return str(error)
    except SystemExit as leave:
        return f"leaves with {leave.code}"
    return "no error"


def everything(world: World) -> dict[str, Any]:
    """All that the tests look at, in one process group."""
    results: dict[str, Any] = {
        "collectives": collectives(world),
        "batch norm": batch_norm(world),
        "refusals": refusals(world),
        "traffic": traffic(world),
    }
    for case in (*CASES, *OTHER_CASES):
        if case.members < world.size:
            results[case.name] = trajectory(case, world)
    results["failure"] = failure_on_main(world)
    return results


def compiled(world: World, backend: str = "aot_eager") -> dict[str, Any]:
    """The compiled step with small buckets, the eager one beside it, how many graphs were compiled, and their order."""
    case = Case("compiled", key_bn="shuffle", query_bn="sync", exchange="reduce", queue_size=24, wide=True, groups=3)
    graphs: list[list[tuple[str, str]]] = []
    lower = torch._dynamo.lookup_backend(backend)

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(consecutive_collectives(graph.graph))
        return lower(graph, inputs)

    original = torch.compile
    torch.compile = functools.partial(original, backend=counting)
    try:
        found = trajectory(dataclasses.replace(case, compile=True), world)
    finally:
        torch.compile = original
    pairs = [pair for graph in graphs for pair in graph]
    return {"compiled": found, "eager": trajectory(case, world), "graphs": len(graphs), "pairs": pairs}


def consecutive_collectives(graph: Graph) -> list[tuple[str, str]]:
    """Each collective of a graph that follows another: its name, and ``"fixed"`` if it needs that one's result."""
    pairs, before = [], None
    for node in graph.nodes:
        if not str(node.target).startswith("cast_fast."):
            continue
        needed, found = [node], set()
        while needed:
            one = needed.pop()
            found.add(one)
            needed += [source for source in one.all_input_nodes if source not in found]
        if before is not None:
            pairs.append((node.args[1], "fixed" if before in found else "free"))
        before = node
    return pairs


def compiled_by_inductor(world: World) -> dict[str, Any]:
    """The same with the compiler that training uses."""
    return compiled(world, "inductor")


def pretrain(world: World, settings: dict[str, Any], fault: str = "none") -> dict[str, Any]:
    """A whole run with a tiny trunk; the samples of each step, and how it ended."""
    import tiny_pretrain

    from cast_fast import train
    from cast_fast.config import PretrainConfig
    from cast_fast.data.dali_loader import DaliLoader
    from cast_fast.errors import UserError

    tiny_pretrain.make_tiny()
    tiny_pretrain.inject(fault)
    samples: dict[int, list[int]] = {}
    original = TrainStep.__call__

    def step(self: TrainStep, batch: Batch, *rest: Any) -> Any:
        samples[RECORD.step] = batch.index.tolist()
        return original(self, batch, *rest)

    TrainStep.__call__ = step
    loader = DaliLoader.__next__
    try:
        outcome = train.pretrain(PretrainConfig(**settings))
    except UserError as error:
        return {"samples": samples, "end": str(error)}
    except SystemExit as leave:
        return {"samples": samples, "end": f"leaves with {leave.code}"}
    finally:
        TrainStep.__call__ = original
        DaliLoader.__next__ = loader
    return {"samples": samples, "end": "finished" if outcome.finished else outcome.stopped_by}


def _rank(function: Callable[[World], Any], group: bool, rank: int, size: int, port: int, out: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    world = distributed.world_from_environment()
    with distributed.process_group(world, torch.device("cpu"), 120) if group else contextlib.nullcontext():
        assert not group or dist.get_backend() == "gloo"
        torch.save(function(world), f"{out}/rank-{rank}.pt")


@contextlib.contextmanager
def _import_path_for_children() -> Iterator[None]:
    """The fork server imports what it is told to, but not with this process's ``sys.path``; failing is silent."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def run_ranks(function: Callable[[World], Any], size: int, out: Path, *, group: bool = True) -> list[Any]:
    """The results of ``function`` on so many real processes, in rank order; with ``group`` in a process group.

    Raises:
        RuntimeError: a process failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_checks", "cast_fast.train", "cast_fast.data.dali_loader"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    start = functools.partial(context.Process, target=_rank)
    processes = [start(args=(function, group, rank, size, port, str(out))) for rank in range(size)]
    with _import_path_for_children():
        for process in processes:
            process.start()
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    if any(codes):
        raise RuntimeError(f"exit codes {codes}; see the output above")
    return [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in range(size)]


if __name__ == "__main__":
    for found in run_ranks(globals()[sys.argv[1]], int(sys.argv[2]), Path(sys.argv[3])):
        print(found)
