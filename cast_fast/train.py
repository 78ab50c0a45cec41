"""Build, loop, save: ``cast-fast pretrain``.

Everything that a user can have got wrong is checked before anything expensive starts: settings, run folder, dataset,
disk space, in this order. A run folder holds::

    config.json      settings, dataset, and versions and device of every start of the run
    metrics.csv      a row a step; see ``cast_fast.metrics``
    timing.csv       rate, loader share and memory over stretches of steps
    tensorboard/     the same as events
    checkpoints/     see ``cast_fast.checkpoint``
    skipped.jsonl    files left out with --skip-invalid; only where there are any
    nonfinite.csv    steps with a non-finite loss or gradient and their samples; only where there are any
    heartbeats/      where each of several ranks stands; see ``cast_fast.distributed``
    .lock            held by the process that trains here

A run that stops, for whatever reason, goes on with ``--resume`` as if it had never stopped: on the CPU with the very
same bits in every tensor and in metrics.csv. SIGINT, SIGTERM and SIGUSR1 end it after the current step with a whole
checkpoint and exit code 75, so that a scheduler knows it for unfinished.

Under torchrun every rank runs this module. Rank 0 does what is to be done once: it checks the run folder, decodes the
dataset ahead of the others, and writes metrics. Checkpoints are written by all ranks, and any number of them with the
same global batch continues from one. A signal to any rank travels with the metrics of the next step, so that all stop
after the same one. A rank whose loader gives up says so in the same way, and until all know it takes part with numbers
that are none, which make every rank leave everything as it is; then all save what they had before.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import logging
import math
import platform
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cast_fast import checkpoint, distributed
from cast_fast.accelerators import build_sgd
from cast_fast.compilation import compile_fault
from cast_fast.config import PretrainConfig, add_config_arguments, config_from_args
from cast_fast.data import layout, sampling, shards
from cast_fast.data.batch import Batch, random_batch
from cast_fast.data.saliency_crop import CropRule
from cast_fast.display import Clock, Display
from cast_fast.doctor import dali_fault
from cast_fast.encoder import cam_grid
from cast_fast.errors import UserError
from cast_fast.files import write_whole
from cast_fast.metrics import DELAY, STEP_SCALARS, Metrics, Reading
from cast_fast.moco import MoCo
from cast_fast.nonfinite import NonFinite, samples_of
from cast_fast.objective import Objective
from cast_fast.optim import cosine_lr
from cast_fast.parallel import RankSettings
from cast_fast.run_folder import (
    batch_norm_groups,
    check_run_folder,
    holds_run,
    locked_run,
    read_run_config,
    require_same_config,
    require_same_dataset,
)
from cast_fast.signals import EXIT_STOPPED, Signals, Stopped
from cast_fast.step import TrainStep, resolve_queue_dtype

if TYPE_CHECKING:
    from cast_fast.data.dali_loader import DaliLoader

logger = logging.getLogger("cast_fast")

HELP = "pretrain an encoder"
HEARTBEATS = "heartbeats"
FULL_SIZE = 224
"""Side of the crops that is too much for a CPU."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of ``pretrain`` ended."""

    run: Path
    step: int
    """Steps done, over all starts of the run."""
    total_steps: int | None
    """Length of the run; ``None`` where a signal came before it was known."""
    stopped_by: str | None = None
    """Name of the signal that stopped the run."""

    @property
    def finished(self) -> bool:
        """Whether every step of the run is done."""
        return self.step == self.total_steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every field of ``PretrainConfig``."""
    add_config_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Runs ``cast-fast pretrain``; returns 0 when the run is finished, ``EXIT_STOPPED`` when a signal stopped it."""
    outcome = pretrain(config_from_args(args))
    if outcome.finished:
        return 0
    if distributed.world_from_environment().size > 1:
        # Everything is saved. torchrun ends the others as soon as one has left; let each leave with its own code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return EXIT_STOPPED


def pretrain(config: PretrainConfig) -> Outcome:
    """Trains, or continues, one run. Seeds the global random states of torch, NumPy and Python.

    With ``config.resume`` the run in ``config.out`` goes on from its newest whole checkpoint; a folder without a run
    starts a new one, so that a job script needs one command line for its first and every later start.

    Raises:
        UserError: a setting, the dataset, the run folder or the disk does not allow the run, or it met too many
            non-finite steps in a row. Nothing saved earlier is lost.
    """
    with Signals() as signals:
        try:
            return _pretrain(config, signals)
        except Stopped as stopped:
            logger.warning("%s before the first step: nothing to save", stopped)
            assert config.out is not None
            saved = checkpoint.steps(config.out)
            return Outcome(config.out, saved[0] if saved else 0, None, str(stopped))


def _pretrain(config: PretrainConfig, signals: Signals) -> Outcome:
    config.require_dataset()
    assert config.out is not None
    world = distributed.world_from_environment()
    config.require_queue(world.size)
    device = resolve_device(config.device, world)
    if device.type == "cpu" and config.size >= FULL_SIZE and world.is_main:
        logger.warning(
            "a CPU is slow at --size %d; to try things out: --arch resnet18 --size 64 --batch 16 --queue-size 256",
            config.size,
        )
    kernels = use_kernels(config.kernels, device)
    grid = cam_grid(config.arch, config.size)
    if config.batch // max(config.batch_norm_groups, 1) * grid[0] * grid[1] < 2:
        raise UserError(
            f"--batch: got {config.batch} at --size {config.size}, expected at least 2 samples in each of the "
            f"BatchNorm groups ({max(config.batch_norm_groups, 1)}): BatchNorm needs two values"
        )
    if (fault := dali_fault()) is not None:
        raise UserError(fault)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet_unless(world.is_main))
        if world.size > 1:
            distributed.end_with_launcher()
        stack.enter_context(distributed.process_group(world, device, config.collective_timeout))
        run, locked, saved, dataset = config.out, False, None, None

        def prepare() -> tuple[int | None, int, str]:
            nonlocal locked, saved, dataset
            check_run_folder(run, config, world.size)
            if locked := run.is_dir():
                stack.enter_context(locked_run(run))
            saved = checkpoint.find_last(run, set_aside=True) if config.resume else None
            if saved is not None:
                require_same_config(saved.config, saved.state["progress"], config, world.size, str(saved.path))
            groups = batch_norm_groups(config, world.size, None if saved is None else saved.state["progress"])
            dataset = _load_dataset(config)
            return None if saved is None else saved.step, groups, dataset.fingerprint()

        step, groups, fingerprint = distributed.on_main(prepare, "preparation by rank 0")

        def follow() -> None:
            nonlocal saved, dataset
            if world.is_main:
                return
            saved = None if step is None else _describe_like_main(run, step)
            dataset = _load_dataset(config)  # rank 0 has decoded every file: this reads its manifest
            if dataset.fingerprint() != fingerprint:
                raise UserError(f"rank {world.rank} sees another dataset than rank 0: expected the same files")

        distributed.together(follow, "preparation by the other ranks")
        assert dataset is not None
        order = sampling.GlobalOrder(len(dataset.samples), config.seed, config.batch, world.rank, world.size)
        total = config.steps or (config.epochs or 0) * order.steps_per_epoch
        if saved is not None:
            require_same_dataset(saved.state["loader"], dataset)
            if saved.step >= total:
                logger.info("%s is finished: all %d steps are done, nothing to do", run, total)
                return Outcome(run, saved.step, total)

        _seed_everything(config.seed)
        if config.batch_norm == "streaming" and device.type != "cuda":
            logger.info("batch-norm streaming: on a CPU its operators are plain torch, unfused: same results, no gain")
        model = MoCo(
            config.arch,
            config.dim,
            config.head,
            config.queue_size,
            config.seed,
            batch_norm=config.batch_norm,
            queue_dtype=resolve_queue_dtype(config.queue_dtype, config.precision, device, kernels),
        ).to(device)
        optimizer, chosen = build_sgd(
            model.query.parameters(), config.lr, config.sgd_momentum, config.weight_decay, apex=config.apex
        )
        if saved is not None:
            saved = checkpoint.read(saved, distributed.checkpoint_group())
        trainer = _Trainer(config, world, device, kernels, groups, dataset, model, optimizer, chosen, total, saved)
        del saved  # a copy of the whole state

        def claim() -> None:
            trainer.require_space()
            if not locked:
                stack.enter_context(locked_run(run))
                if holds_run(run):  # it was begun, and ended, since this one looked
                    raise UserError(f"--out: another process has begun a run in {run}: continue it with --resume")

        distributed.on_main(claim, "run folder")
        try:
            return trainer.train(grid, order.global_batch, signals, stack)
        except RuntimeError:
            if world.size > 1:
                beats = distributed.heartbeats(run / HEARTBEATS)
                logger.error(
                    "rank %d of %d gives up; the ranks by their heartbeats:\n%s", world.rank, world.size, beats
                )
            raise


@contextlib.contextmanager
def _quiet_unless(main: bool) -> Iterator[None]:
    """Ranks other than 0 report warnings only: what they have to say, rank 0 says."""
    level = logger.level
    if not main:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _describe_like_main(run: Path, step: int) -> checkpoint.Checkpoint:
    try:
        return checkpoint.describe(run / checkpoint.FOLDER / f"step-{step}")
    except checkpoint.DamagedCheckpoint as error:
        raise UserError(f"--out: rank 0 resumes {run} from step {step}, but here: {error}; is it shared?") from error


def resolve_device(name: str, world: distributed.World = distributed.World()) -> torch.device:  # noqa: B008 (frozen)
    """The torch device of ``--device``; ``auto`` is CUDA where torch finds it. Each rank of a node has its own GPU.

    Raises:
        UserError: CUDA is asked for and torch finds none, or fewer than there are ranks on the node.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise UserError(
            f"--device: got cuda, but torch {torch.__version__} ({built}) finds no CUDA device; expected cpu"
        )
    if not available or name == "cpu":
        return torch.device("cpu")
    if world.size == 1:
        return torch.device("cuda")
    if world.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"--device: got {torch.cuda.device_count()} CUDA devices on {platform.node()} for local rank "
            f"{world.local_rank}, expected one a process (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", world.local_rank)


def use_kernels(name: str, device: torch.device) -> bool:
    """Whether ``--kernels`` means the fused Triton losses on this device; the choice of ``auto`` is logged.

    Raises:
        UserError: Triton is asked for where it cannot run.
    """
    if name == "torch":
        return False
    if device.type != "cuda":
        if name == "triton":
            raise UserError(f"--kernels: got triton on the device {device}, expected a CUDA device; take auto or torch")
        return False
    fault = None if importlib.util.find_spec("triton") else "the package triton is not installed"
    if name == "triton" and fault:
        raise UserError(f"--kernels: got triton, but {fault}")
    logger.info("losses: %s", f"plain torch, because {fault}" if fault else "fused Triton kernels")
    return fault is None


def _load_dataset(config: PretrainConfig) -> layout.Dataset:
    if config.images is None:
        assert config.data is not None  # checked when the run began
        on_empty = config.on_empty_saliency if config.needs_saliency else "unconstrained"
        dataset = shards.scan_shards(config.data, need_maps=config.needs_saliency)
        return layout.usable(dataset, skip_invalid=config.skip_invalid, on_empty_saliency=on_empty)
    maps = config.saliency if config.needs_saliency else None
    dataset = layout.scan(config.images, maps, progress=sys.stderr.isatty())
    return layout.usable(dataset, skip_invalid=config.skip_invalid, on_empty_saliency=config.on_empty_saliency)


def _seed_everything(seed: int) -> None:
    """Seeds what is not a pure function of the seed already; order, crops and augmentations are."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (code of others may draw from the global state)


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.array(keys, dtype=np.int64)), int(position), int(has_gauss), float(gauss)),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002


class _Trainer:
    """The objects of one run and what is done with them; built once everything about the user's input is checked."""

    def __init__(
        self,
        config: PretrainConfig,
        world: distributed.World,
        device: torch.device,
        kernels: bool,
        groups: int,
        dataset: layout.Dataset,
        model: MoCo,
        optimizer: torch.optim.Optimizer,
        optimizer_record: str,
        total_steps: int,
        saved: checkpoint.Checkpoint | None,
    ) -> None:
        assert config.out is not None
        self.config, self.world, self.device, self.kernels, self.dataset = config, world, device, kernels, dataset
        self.run = config.out
        self.model, self.optimizer, self.total_steps = model, optimizer, total_steps
        self.optimizer_record, self.groups = optimizer_record, groups
        self.first_step = self.step = 0
        self.saved_step: int | None = None
        self.fresh = not holds_run(self.run)
        self.fingerprint = dataset.fingerprint()
        self.order = sampling.GlobalOrder(len(dataset.samples), config.seed, config.batch * world.size)
        """The samples of all ranks together."""
        self.compiled = False
        self.saver = checkpoint.BackgroundSaver()
        self.rank_stopped = False
        """Whether some rank has got a signal, as told by a step's metrics; the same on every rank."""
        self.loader_fault: UserError | None = None
        """Why this rank's loader gave up."""
        self.last_good_step: int | None = None
        """The step before some rank's loader gave up, as told by a step's metrics; nothing has changed since."""
        self.failed_rank = ""
        """Which rank it was, for messages."""
        nonfinite = {"in_a_row": 0, "total": 0}
        if saved is not None:
            self.first_step = self.step = self.saved_step = saved.step
            model.load_state_dict({**model.state_dict(), **saved.state["model"]})
            model.queue.restore(**saved.state["queue"])
            optimizer.load_state_dict(saved.state["optimizer"])
            _set_random_state(saved.state["random"])
            nonfinite = saved.state["progress"]["nonfinite"]
            changed = [f"{name} {old} -> {new}" for name, new in checkpoint.versions().items()
                       if (old := saved.versions.get(name)) != new]  # fmt: skip
            if changed:
                logger.warning("versions changed since the checkpoint: %s: last bits may differ", ", ".join(changed))
        self.nonfinite = NonFinite(config.max_nonfinite, **nonfinite)

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on; on many ranks this rank's share of it."""
        queue = self.model.queue
        column = queue.column()
        rank, ranks = queue.place
        shared = {
            "model": {name: value for name, value in self.model.state_dict().items() if not name.startswith("queue.")},
            "optimizer": self.optimizer.state_dict(),
            "queue": {
                "columns": checkpoint.Part(column, (0, rank, 0), (len(column), ranks, column.shape[2])),
                "pointer": queue.pointer,
            },
        }
        if not self.world.is_main:
            return shared
        return {
            **shared,
            "loader": {"step": self.step, "length": len(self.dataset.samples), "dataset": self.fingerprint},
            "random": _random_state(),
            "progress": {
                "step": self.step,
                "total_steps": self.total_steps,
                "processes": self.world.size,
                "batch_norm_groups": self.groups,
                "nonfinite": {"in_a_row": self.nonfinite.in_a_row, "total": self.nonfinite.total},
            },
        }

    def require_space(self) -> None:
        """Checks that the checkpoints to come fit: those kept, and the one being written before the oldest goes.

        Raises:
            UserError: they do not.
        """
        size = checkpoint.estimated_bytes(self.state())
        planned = math.ceil((self.total_steps - self.step) / self.config.checkpoint_every)
        count = max(1, min(self.config.keep_checkpoints + 1, planned) - len(checkpoint.steps(self.run)))
        what = f"{count} checkpoint{'s' if count > 1 else ''} of {size / 1e6:,.1f} MB"
        checkpoint.require_space(self.run, count * size, what)

    def write_run_folder(self, loader: DaliLoader, train_step: TrainStep) -> None:
        """Writes config.json, with what ``auto`` settings came to, and the list of skipped files.

        Raises:
            UserError: the folder is not writable or the disk is full.
        """
        path = self.run / "config.json"
        content = {
            "config": self.config.to_json(),
            "dataset": {
                "samples": len(self.dataset.samples),
                "skipped": len(self.dataset.faults),
                "fingerprint": self.fingerprint,
            },
            "total_steps": self.total_steps,
            "starts": [],
        }
        if path.exists() and not self.fresh:
            content = read_run_config(path)
        start = {
            "step": self.step,
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "host": platform.node(),
            "processes": self.world.size,
            "batch_norm_groups": self.groups,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "precision": str(train_step.dtype).removeprefix("torch."),
            "compiled": self.compiled,
            "kernels": "triton" if train_step.kernels else "torch",
            "optimizer": self.optimizer_record,
            "native_crops": loader.native,
            "versions": checkpoint.versions(),
        }
        for before in content["starts"][-1:]:
            for name in ("device", "threads", "precision", "compiled", "kernels", "optimizer"):
                if before.get(name) != start[name]:
                    logger.warning(
                        "%s changed from %s to %s: last bits may differ", name, before.get(name), start[name]
                    )
        content["starts"].append(start)
        try:
            write_whole(path, json.dumps(content, indent=2) + "\n", durable=True)
        except OSError as error:
            raise UserError(f"--out: cannot write into {self.run}: {error.strerror or error}") from error
        if self.dataset.faults:
            layout.write_faults(self.run / "skipped.jsonl", self.dataset.faults)

    def build_loader(self, grid: tuple[int, int]) -> DaliLoader:
        """The loader at the step where the run stands."""
        from cast_fast.data.dali_loader import Augmentation, DaliLoader

        config = self.config
        return DaliLoader(
            self.dataset,
            batch=config.batch,
            size=config.size,
            cam_grid=grid,
            augmentation=Augmentation.from_config(config),
            rule=CropRule(config.phi, config.pair_constraint),
            constrained=config.constrained_crops,
            attention=config.attention_loss,
            seed=config.seed,
            device=self.device.type,
            threads=config.loader_threads,
            rank=self.world.rank,
            world=self.world.size,
            start_step=self.step,
        )

    def build_step(self) -> TrainStep:
        """The training step around the model and the optimizer."""
        config = self.config
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # one shape for the whole run: the search for algorithms pays
        self.compiled = config.compile and self.all_can_compile()
        arrived = (self.step - self.nonfinite.total) * config.batch * self.world.size
        self.model.queue.shard(self.world.rank, self.world.size, arrived)
        train_step = TrainStep(
            self.model,
            self.optimizer,
            objective=Objective(config.lam, config.loss_combination, config.temperature, config.attention_loss),
            momentum=config.momentum,
            precision=config.precision,
            compile=self.compiled,
            kernels=self.kernels,
            clip_grad=config.clip_grad,
            ranks=RankSettings(
                self.world,
                config.key_bn,
                config.query_bn,
                config.queue_exchange,
                config.grad_compression,
                config.seed,
                self.groups,
            ),
        )
        train_step.number = self.step
        return train_step

    def all_can_compile(self) -> bool:
        """Whether ``torch.compile`` works on every rank: collectives need not come in one order with and without it."""
        fault = compile_fault(self.device)
        failed = int(distributed.all_reduce(torch.tensor(int(fault is not None), device=self.device), "compile trial"))
        if fault is not None:
            logger.warning("training without torch.compile, which does not work here: %s", fault)
        elif failed:
            logger.warning("training without torch.compile, which does not work on %d of the ranks", failed)
        return not failed

    def train(self, grid: tuple[int, int], global_batch: int, signals: Signals, stack: contextlib.ExitStack) -> Outcome:
        """Steps until the end, a signal, or too many non-finite steps in a row."""
        config = self.config
        if self.step:
            logger.info("going on from step %d of %d in %s", self.step, self.total_steps, self.run)
        else:
            logger.info("%d steps on %d samples into %s", self.total_steps, len(self.dataset.samples), self.run)
        main, many = self.world.is_main, self.world.size > 1
        stack.enter_context(distributed.Heartbeat(self.run / HEARTBEATS, self.world))
        loader = self.build_loader(grid)
        stack.callback(loader.close)
        train_step = self.build_step()
        # On many ranks a signal is known when the metrics are: read a step earlier, all stop within two steps.
        stack.callback(self.saver.wait)
        metrics = Metrics(self.run if main else None, step=self.step, delay=1 if many else DELAY)
        stack.callback(metrics.close)
        self.nonfinite.open(self.run if main else None, self.step, self.dataset)
        stack.callback(self.nonfinite.close)
        distributed.on_main(lambda: self.write_run_folder(loader, train_step), "config.json")
        display = stack.enter_context(Display(self.step, self.total_steps, shown=main))
        clock = Clock(global_batch, self.device)
        signals.defer()
        while self.step < self.total_steps and not self.nonfinite.too_many:
            if self.rank_stopped if many else signals.received is not None:
                break
            distributed.RECORD.step = self.step + 1
            clock.start_waiting()
            try:
                batch = next(loader)
            except UserError as error:
                # The data failed, not the model: what was learned is kept.
                if not many:
                    self.save(metrics, display)
                    raise
                # The others are on their way into the step: this rank goes along, until they know.
                if self.loader_fault is None:
                    logger.error("rank %d: %s", self.world.rank, error)
                    self.loader_fault = error
                    train_step.abstain()
                batch = random_batch(config.batch, config.size, grid, self.device, attention=config.attention_loss)
            clock.stop_waiting()
            lr = cosine_lr(config.lr, global_batch, self.step, self.total_steps)
            host = _host(lr, batch)
            if many:
                result = train_step(batch, lr, self.report(signals, host))
                extra = self.reported(train_step, host)
            else:
                result, extra = train_step(batch, lr), (host, None)
            self.step += 1
            scalars = [getattr(result, name) for name in STEP_SCALARS]
            metrics.record(self.step, scalars, extra[0], batch.index, extra[1])
            self.take(metrics.read(), display)
            if clock.tick(last=self.step == self.total_steps):
                timing = clock.measure()
                metrics.record_timing(self.step, *timing)
                display.timing(timing)
            display.step(self.step)
            if self.step % config.checkpoint_every == 0:
                self.save(metrics, display, background=config.async_save)
        self.save(metrics, display)
        if self.loader_fault is not None:
            raise self.loader_fault
        if self.last_good_step is not None:
            raise UserError(f"the loader of {self.failed_rank} gave up, see its message; step {self.step} is saved")
        if self.nonfinite.too_many:
            raise UserError(self.nonfinite.message(self.run))
        if self.step < self.total_steps:
            cause = signals.received or "a signal to another rank"
            logger.warning("stopped by %s after step %d of %d; --resume goes on", cause, self.step, self.total_steps)
            return Outcome(self.run, self.step, self.total_steps, cause)
        logger.info("finished: %d steps in %s", self.step, self.run)
        return Outcome(self.run, self.step, self.total_steps)

    def take(self, readings: list[Reading], display: Display) -> None:
        """What the host learns about steps, a step or two after them."""
        for reading in readings:
            if self.world.size > 1:
                stopped, failed, ranks, *bad = reading.extra
                self.rank_stopped = self.rank_stopped or stopped > 0 or failed > 0
                if failed and self.last_good_step is None:
                    self.last_good_step = reading.step - 1
                    self.failed_rank = f"rank {ranks:.0f}" if failed == 1 else f"{failed:.0f} ranks"
                if self.last_good_step is not None:
                    continue
                if not reading.finite:
                    reading = dataclasses.replace(reading, index=samples_of(self.order, reading.step, bad))
            self.nonfinite.note(reading)
            display.reading(reading)

    def report(self, signals: Signals, host: tuple[float, int | None, int | None]) -> Tensor:
        """What this rank adds to the sums over ranks: a signal, a failed loader (and whose), its fallback windows."""
        failed = self.loader_fault is not None
        told = (signals.received is not None, failed, failed * self.world.rank)
        numbers = torch.tensor([float(value or 0) for value in (*told, *host[1:])])
        if self.device.type == "cuda":
            numbers = numbers.pin_memory()
        return numbers.to(self.device, non_blocking=True)

    @staticmethod
    def reported(
        train_step: TrainStep, host: tuple[float, int | None, int | None]
    ) -> tuple[tuple[float | Tensor | None, ...], Tensor]:
        """The same summed over ranks: ``HOST_SCALARS``, and what ``take`` wants to know beside."""
        report = train_step.rank_report
        assert report is not None
        known = (host[0], *(None if value is None else total for value, total in zip(host[1:], report.sums[3:])))
        return known, torch.cat([report.sums[:3], report.bad_ranks])

    def save(self, metrics: Metrics, display: Display, *, background: bool = False) -> None:
        """Reads what is still on its way, then writes a checkpoint, unless this step has one; all ranks take part.

        With ``background`` it may still be on its way to the disk when this returns; the next call waits for it.
        """
        self.take(metrics.read(everything=True), display)
        metrics.sync()
        if self.last_good_step is not None:
            self.step = self.last_good_step
        if self.saved_step == self.step:
            self.saver.wait()
            return
        save = self.saver.save
        if not background:
            self.saver.wait()
            save = checkpoint.save
        with distributed.RECORD.collective("checkpoint", 0) if self.world.size > 1 else contextlib.nullcontext():
            save(
                self.run,
                self.step,
                self.state(),
                config=self.config.to_json(),
                fingerprint=self.config.fingerprint(),
                keep=self.config.keep_checkpoints,
                group=distributed.checkpoint_group(),
            )
        self.saved_step = self.step


def _host(lr: float, batch: Batch) -> tuple[float, int | None, int | None]:
    """What the host knows about a step: ``metrics.HOST_SCALARS``."""
    if batch.fallback is None:
        return lr, None, None
    query, key = batch.fallback.sum(dim=0).tolist()
    return lr, query, key
