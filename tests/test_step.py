"""The step does what the algorithm says, changes nothing when a number is not finite, and resumes bitwise."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from tiny_encoder import STRIDE, tiny_encoder
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torchvision.models.resnet import BasicBlock

from cast_fast.compilation import compile_fault
from cast_fast.data.batch import Batch, random_batch
from cast_fast.moco import MoCo
from cast_fast.objective import Objective
from cast_fast.optim import build_optimizer
from cast_fast.parallel import RankSettings
from cast_fast.step import (
    IMAGE_MEAN,
    IMAGE_STD,
    StepMetrics,
    TrainStep,
    has_bf16_matrix_hardware,
    resolve_precision,
    resolve_queue_dtype,
    step_losses,
)
from cast_kernels import reference

GRID = 3
SIZE = GRID * STRIDE
COUNT = 6
LR = 0.05


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Variants are compared in float32: on a GPU convolutions must not round to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def batch_of(seed: int, device: torch.device | str = "cpu", attention: bool = True) -> Batch:
    return random_batch(COUNT, SIZE, (GRID, GRID), device, seed=seed, attention=attention)


def tiny_step(
    device: torch.device | str = "cpu",
    *,
    head: str = "linear",
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    clip_grad: float = 0.0,
    queue_size: int = 20,
    attention: bool = True,
    **settings: Any,
) -> TrainStep:
    model = MoCo.from_encoder(tiny_encoder(8, head), 8, queue_size).to(device, dtype)
    return TrainStep(
        model,
        build_optimizer(model.query.parameters(), LR),
        objective=Objective(temperature=0.2, attention=attention),
        momentum=0.9,
        compile=compile,
        clip_grad=clip_grad,
        **{"precision": "fp32", **settings},
    )


def snapshot(step: TrainStep) -> dict[str, Tensor]:
    """Every tensor that a checkpoint holds."""
    tensors = {f"model.{name}": value.clone() for name, value in step.model.state_dict().items()}
    for number, entry in step.optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            tensors[f"optimizer.{number}.{name}"] = value.clone()
    assert any(name.endswith("momentum_buffer") for name in tensors)
    assert any(name.endswith("num_batches_tracked") for name in tensors)
    assert "model.queue.pointer" in tensors
    return tensors


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


class Reference:
    """The step written out: plain formulation, torch's plain SGD and clipping, one update after the other."""

    def __init__(self, step: TrainStep, clip_grad: float) -> None:
        self.model = copy.deepcopy(step.model)
        self.optimizer = torch.optim.SGD(
            self.model.query.parameters(), LR, momentum=0.9, weight_decay=1e-4, foreach=False
        )
        self.clip_grad = clip_grad

    def __call__(self, batch: Batch, lr: float) -> tuple[reference.StepLosses, Tensor]:
        model = self.model
        weights = next(model.query.parameters())
        mean, std = (weights.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        query, key = ((crops.to(weights) / 255 - mean) / std for crops in (batch.query, batch.key))
        assert batch.key_mask is not None and batch.query_saliency is not None
        losses = reference.one_pass_step_losses(
            model.query,
            model.key,
            model.queue.keys,
            query,
            key,
            key * batch.key_mask[:, None],
            batch.query_saliency.to(weights),
            temperature=0.2,
            lam=3.0,
        )
        self.optimizer.zero_grad()
        losses.loss.backward()
        norm = nn.utils.clip_grad_norm_(model.query.parameters(), self.clip_grad or 1e9)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            for target, source in zip(model.key.parameters(), model.query.parameters()):
                target.copy_(0.9 * target + 0.1 * source)
            for row in losses.keys:
                model.queue.keys[int(model.queue.pointer)] = row
                model.queue.pointer.copy_((model.queue.pointer + 1) % len(model.queue))
        return losses, norm


@pytest.mark.parametrize("clip_grad", [0.0, 0.1, 1000.0])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_step_is_the_algorithm(device: torch.device, head: str, clip_grad: float) -> None:
    step = tiny_step(device, head=head, dtype=torch.float64, clip_grad=clip_grad)
    expected = Reference(step, clip_grad)
    for seed in range(4):  # 24 keys into a queue of 20: it wraps around
        batch, lr = batch_of(seed, device), LR / (1 + seed)
        metrics = step(batch, lr)
        losses, norm = expected(batch, lr)
        assert metrics.finite
        for value, target in (
            (metrics.loss, losses.loss),
            (metrics.loss_moco, losses.contrastive),
            (metrics.loss_cast, losses.attention),
            (metrics.grad_norm, norm),
        ):
            torch.testing.assert_close(value, target.detach(), rtol=1e-6, atol=1e-9)
        assert clip_grad != 0.1 or norm > clip_grad
    for (name, value), target in zip(step.model.state_dict().items(), expected.model.state_dict().values()):
        # Clipping goes through a float32 scale: six digits there, twelve without.
        tolerance = 1e-6 if clip_grad else 1e-12
        torch.testing.assert_close(value, target, rtol=tolerance, atol=tolerance, msg=name)


def test_metrics_are_device_scalars(device: torch.device) -> None:
    step = tiny_step(device)
    metrics = step(batch_of(0, device), LR)
    assert all(value.shape == () and value.device.type == device.type for value in metrics)
    assert not any(value.requires_grad for value in metrics)
    assert metrics.finite.dtype == torch.bool
    assert metrics.cast_samples == COUNT
    assert 0 <= float(metrics.accuracy) <= 1


def test_moco_alone_needs_no_maps_and_no_masked_keys(device: torch.device) -> None:
    step = tiny_step(device, attention=False)
    metrics = step(batch_of(0, device, attention=False), LR)
    assert metrics.finite and metrics.loss == metrics.loss_moco and metrics.loss_cast == 0
    counters = [value for name, value in step.model.key.named_buffers() if name.endswith("num_batches_tracked")]
    assert all(counter == 1 for counter in counters)


def test_key_passes_have_their_own_statistics() -> None:
    """Keys must not depend on the masked keys: the masks change nothing but the masked keys."""
    batch = batch_of(0)
    assert batch.key_mask is not None
    other = copy.copy(batch)
    other.key_mask = 1 - batch.key_mask
    steps = [tiny_step() for _ in range(2)]
    for step, its in zip(steps, (batch, other)):
        step(its, LR)
    first, second = (step.model.queue.keys for step in steps)
    assert torch.equal(first, second)
    with torch.no_grad():
        fresh = tiny_step().model
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        keys = fresh.key((batch.key / 255 - mean) / std).embedding
    torch.testing.assert_close(first[:COUNT], keys)


def test_empty_key_mask_takes_the_sample_out_and_is_counted() -> None:
    batch = batch_of(0)
    assert batch.key_mask is not None and batch.weight is not None
    batch.key_mask[1] = 0
    batch.key_mask[2] = 0
    batch.weight[2] = 0  # left out already: not counted again
    batch.weight[3] = 0
    out = tiny_step()(batch, LR)
    assert out.empty_key_mask == 1
    assert out.cast_samples == COUNT - 3
    batch.weight[1] = 0
    same = tiny_step()(batch, LR)
    assert same.empty_key_mask == 0
    assert torch.equal(same.loss, out.loss) and torch.equal(same.grad_norm, out.grad_norm)


def test_batch_without_weights_counts_every_sample() -> None:
    batch = batch_of(0)
    expected = tiny_step()(batch, LR)
    batch.weight = None
    assert torch.equal(tiny_step()(batch, LR).loss, expected.loss)


def poison(step: TrainStep, batch: Batch, how: str) -> None:
    """Makes the next step go wrong: in loss and gradient, in one of them, or in the forward pass."""
    if how == "loss alone":
        losses_of = step._losses

        def spoiled(*arguments: Any) -> Any:
            losses, *rest = losses_of(*arguments)
            return losses._replace(loss=losses.loss + torch.inf), *rest

        step._losses = spoiled
    elif how == "loss":
        assert batch.query_saliency is not None
        batch.query_saliency[:, 0, 0] = torch.nan
    elif how == "forward":
        # Every BatchNorm statistic after the first convolution becomes infinite or NaN, of both encoders.
        with torch.no_grad():
            for encoder in (step.model.query, step.model.key):
                next(encoder.parameters())[0] = torch.inf
    else:
        value = {"gradient nan": torch.nan, "gradient inf": torch.inf}[how]
        weight = next(step.model.query.trunk.parameters())
        weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0], device=gradient.device), value))


@pytest.mark.parametrize("how", ["loss", "loss alone", "forward", "gradient nan", "gradient inf"])
def test_a_step_that_is_not_finite_changes_nothing(device: torch.device, how: str) -> None:
    step = tiny_step(device, head="mlp", clip_grad=0.5)
    step(batch_of(0, device), LR)
    batch = batch_of(1, device)
    poison(step, batch, how)
    before = snapshot(step)
    metrics = step(batch, LR)
    assert not metrics.finite
    assert differing(before, snapshot(step)) == []


@pytest.mark.parametrize("how", ["loss", "gradient nan"])
@pytest.mark.parametrize("compile", [False, True])
def test_training_goes_on_as_if_the_bad_step_had_not_been(how: str, compile: bool) -> None:
    disturbed, calm = (tiny_step(head="mlp", clip_grad=0.5, compile=compile) for _ in range(2))
    for step in (disturbed, calm):
        step(batch_of(0), LR)
    batch = batch_of(1)
    poison(disturbed, batch, how)
    assert not disturbed(batch, LR).finite
    assert differing(snapshot(disturbed), snapshot(calm)) == []
    hooks = next(disturbed.model.query.trunk.parameters())._backward_hooks
    if hooks:
        hooks.clear()
    results = [step(batch_of(2), LR) for step in (disturbed, calm)]
    assert results[0].finite
    assert differing(snapshot(disturbed), snapshot(calm)) == []
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_bad_first_step_changes_nothing() -> None:
    step = tiny_step()
    before = snapshot(step)
    batch = batch_of(0)
    poison(step, batch, "loss")
    assert not step(batch, LR).finite
    assert differing(before, snapshot(step)) == []


def assert_same_step(metrics: StepMetrics, expected: StepMetrics) -> None:
    for name, value in metrics._asdict().items():
        target = getattr(expected, name)
        torch.testing.assert_close(value, target, rtol=1e-3, atol=1e-4, msg=name, check_dtype=False)


def trace_only(step: TrainStep) -> TrainStep:
    """Captures the one graph and its backward, but runs them operator by operator: no minute of C++ compilation."""
    step._losses = torch.compile(step_losses, fullgraph=True, dynamic=False, backend="aot_eager")
    return step


def test_compiled_equals_eager(device: torch.device) -> None:
    expected = tiny_step(device, head="mlp", clip_grad=0.5)(batch_of(0, device), LR)
    assert_same_step(tiny_step(device, head="mlp", clip_grad=0.5, compile=True)(batch_of(0, device), LR), expected)


@pytest.mark.parametrize("traced", [False, True])
def test_kernels_equal_plain_torch(device: torch.device, traced: bool) -> None:
    expected = tiny_step(device, head="mlp")(batch_of(0, device), LR)
    step = tiny_step(device, head="mlp", kernels=True)
    assert_same_step((trace_only(step) if traced else step)(batch_of(0, device), LR), expected)


def test_a_head_without_pullback_is_traced() -> None:
    def build() -> TrainStep:
        torch.manual_seed(0)
        head = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.GELU(), nn.Linear(12, 8))
        model = MoCo.from_encoder(tiny_encoder(8, head), 8, 20)
        optimizer = build_optimizer(model.query.parameters(), LR)
        return TrainStep(model, optimizer, objective=Objective(), compile=False, precision="fp32")

    eager, traced = build(), trace_only(build())
    assert_same_step(traced(batch_of(0), LR), eager(batch_of(0), LR))
    for (name, value), target in zip(traced.model.query.named_buffers(), eager.model.query.buffers()):
        torch.testing.assert_close(value, target, msg=name)


def test_bf16_keeps_weights_and_losses_in_float32() -> None:
    exact = tiny_step()(batch_of(0), LR)
    step = tiny_step(precision="bf16")
    metrics = step(batch_of(0), LR)
    assert metrics.finite and metrics.loss.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in step.model.parameters())
    assert metrics.loss != exact.loss  # the trunk did run in another precision
    torch.testing.assert_close(metrics.loss, exact.loss, rtol=0.05, atol=0.05)


def resume(step: TrainStep, fresh: TrainStep) -> None:
    fresh.model.load_state_dict(copy.deepcopy(step.model.state_dict()))
    fresh.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))


@pytest.mark.parametrize("compile", [False, True])
def test_resume_is_bitwise(compile: bool) -> None:
    straight, first, second = (tiny_step(compile=compile, clip_grad=0.5, head="mlp") for _ in range(3))
    expected = [straight(batch_of(seed), LR / (1 + seed)) for seed in range(5)]
    for seed in range(3):
        first(batch_of(seed), LR / (1 + seed))
    resume(first, second)
    for seed in (3, 4):
        metrics = second(batch_of(seed), LR / (1 + seed))
        assert all(torch.equal(a, b) for a, b in zip(metrics, expected[seed]))
    assert differing(snapshot(straight), snapshot(second)) == []


def test_groups_resume_bitwise_and_depend_on_the_step() -> None:
    """The shuffle is a function of seed and step: a resumed run deals out as an undisturbed one, others do not."""

    def build(seed: int = 4) -> TrainStep:
        return tiny_step(ranks=RankSettings(groups=3, seed=seed))

    straight, first, second, other = build(), build(), build(), build(5)
    for number in range(4):
        straight(batch_of(number), LR)
        other(batch_of(number), LR)
        if number < 2:
            first(batch_of(number), LR)
    resume(first, second)
    late, late.number = build(), 1
    resume(first, late)
    second.number = 2
    for number in (2, 3):
        second(batch_of(number), LR)
        late(batch_of(number), LR)
    assert differing(snapshot(straight), snapshot(second)) == []
    for changed in (other, late):
        assert "model.queue.keys" in differing(snapshot(straight), snapshot(changed))


@pytest.mark.parametrize(("backend", "join"), [("inductor", False), ("aot_eager", True)])
def test_groups_compile_as_one_graph(backend: str, join: bool) -> None:
    """Over a trunk with a residual block; the permutation is an argument, so no step compiles anew."""

    def build() -> TrainStep:
        torch.manual_seed(0)
        encoder = tiny_encoder()
        encoder.trunk.add_module("block", BasicBlock(16, 16))
        model = MoCo.from_encoder(encoder, 8, 20).double()
        return TrainStep(
            model, build_optimizer(model.query.parameters(), LR), objective=Objective(temperature=0.2), compile=False,
            precision="fp32", join_keys=join, ranks=RankSettings(groups=3),
        )  # fmt: skip

    steps = build(), build()
    steps[1]._losses = torch.compile(step_losses, fullgraph=True, dynamic=False, backend=backend)
    counters.clear()
    for number in range(3):
        batch = batch_of(number)
        for value, expected in zip(*(step(batch, LR) for step in steps)):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for (name, value), target in zip(steps[1].model.state_dict().items(), steps[0].model.state_dict().values()):
        torch.testing.assert_close(value, target, rtol=1e-9, atol=1e-11, msg=name)


def convolution_outputs(code: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Sizes and strides of every image that a convolution or its backward returns, from Inductor's generated code."""
    four = r"\((\d+), (\d+), (\d+), (\d+)\)"
    found = re.findall(rf"assert_\w+\(\w+, {four}, {four}, .*convolution", code)
    return [(tuple(map(int, row[:4])), tuple(map(int, row[4:]))) for row in found]


def test_compiled_resnet_is_one_graph_in_channels_last_and_resumes() -> None:
    """The one test that compiles a whole ResNet: one graph, equal to eager, NHWC throughout, bitwise resume."""

    def build(compile: bool) -> TrainStep:
        model = MoCo("resnet18", dim=16, head="linear", queue_size=10, seed=0)
        optimizer = build_optimizer(model.query.parameters(), LR)
        return TrainStep(model, optimizer, objective=Objective(), compile=compile, precision="fp32", clip_grad=2.0)

    batches = [random_batch(4, 64, (2, 2), "cpu", seed=seed) for seed in range(3)]
    straight = build(compile=True)
    metrics, codes = run_and_get_code(lambda: straight(batches[0], LR))
    assert len(codes) == 2  # one graph: its forward and its backward
    outputs = convolution_outputs("\n".join(codes))
    assert len(outputs) >= 3 * 20 + 2 * 20 - 1  # 20 convolutions; no gradient of the images
    assert [pair for pair in outputs if pair[0][1] > 1 and pair[1][1] != 1] == []

    eager = build(compile=False)(batches[0], LR)
    for name in ("loss", "loss_moco", "loss_cast", "accuracy"):
        torch.testing.assert_close(getattr(metrics, name), getattr(eager, name), rtol=1e-3, atol=1e-4, msg=name)

    first, second = build(compile=True), build(compile=True)
    first(batches[0], LR)
    resume(first, second)
    for batch in batches[1:]:
        expected, actual = straight(batch, LR), second(batch, LR)
        assert all(torch.equal(a, b) for a, b in zip(expected, actual))
    assert differing(snapshot(straight), snapshot(second)) == []


def test_precision_is_resolved_by_hardware(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert has_bf16_matrix_hardware(cpu)
    with caplog.at_level(logging.INFO, logger="cast_fast"):
        assert resolve_precision("auto", cpu) == torch.bfloat16
    assert "bf16" in caplog.text
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert resolve_precision("auto", cpu) == torch.float32
    assert resolve_precision("bf16", cpu) == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not has_bf16_matrix_hardware(cpu)
    with pytest.raises(ValueError, match="precision: got 'fp16'"):
        resolve_precision("fp16", cpu)


def test_compile_fault_tells_the_reason() -> None:
    assert compile_fault(torch.device("cpu")) is None
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        fault = compile_fault(torch.device("cpu"))
    assert fault is not None and "\n" not in fault
    torch._dynamo.reset()
    assert compile_fault(torch.device("cpu")) is None


def test_callers_mistakes() -> None:
    with pytest.raises(ValueError, match=r"momentum: got 1\.5"):
        TrainStep(
            tiny_step().model,
            build_optimizer(tiny_step().model.query.parameters(), LR),
            objective=Objective(),
            momentum=1.5,
        )
    with pytest.raises(ValueError, match="clip_grad: got -1"):
        tiny_step(clip_grad=-1)
    with pytest.raises(ValueError, match="no query_saliency or no key_mask"):
        tiny_step()(batch_of(0, attention=False), LR)
    with pytest.raises(ValueError, match=r"got 6 samples, expected at most 5 \(queue\)"):
        tiny_step(queue_size=5)(batch_of(0), LR)
    with pytest.raises(ValueError, match=r"got 6 samples, expected a multiple of 4 \(groups\)"):
        tiny_step(ranks=RankSettings(groups=4))(batch_of(0), LR)
    model = tiny_step().model
    model.key.to(memory_format=torch.contiguous_format)
    with pytest.raises(ValueError, match="different memory formats"):
        TrainStep(model, build_optimizer(model.query.parameters(), LR), objective=Objective())
    model = tiny_step().model
    with pytest.raises(ValueError, match="without fused=True"):
        TrainStep(model, torch.optim.SGD(model.query.parameters(), LR), objective=Objective())


@pytest.mark.gpu
@pytest.mark.parametrize(("compile", "groups"), [(False, 1), (True, 1), (True, 3)])
def test_no_synchronisation_with_the_host(cuda: torch.device, compile: bool, groups: int) -> None:
    ranks = RankSettings(groups=groups)
    step = tiny_step(cuda, compile=compile, kernels=compile, precision="bf16", clip_grad=0.5, ranks=ranks)
    batches = [batch_of(seed, cuda) for seed in range(4)]
    metrics: list[StepMetrics] = [step(batches[0], LR), step(batches[1], LR)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics += [step(batch, LR) for batch in batches[2:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(entry.finite) for entry in metrics)


def test_bf16_queue_trains_as_a_float32_one() -> None:
    """Losses differ by no more than rounding the keys may cost: 2^-9 / T, here 0.01."""
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = MoCo.from_encoder(tiny_encoder(8), 8, 20, queue_dtype=dtype)
        objective = Objective(temperature=0.2)
        step = TrainStep(
            model, build_optimizer(model.query.parameters(), LR), objective=objective, compile=False, precision="fp32"
        )
        losses.append(torch.stack([step(batch_of(seed), LR).loss for seed in range(5)]))
        assert model.queue.keys.dtype == dtype
    difference = (losses[0] - losses[1]).abs()
    assert 0 < difference.max() <= 2.0**-9 / 0.2


@pytest.mark.parametrize(
    ("name", "precision", "kernels", "expected"),
    [
        ("auto", "bf16", True, torch.bfloat16),
        ("auto", "bf16", False, torch.float32),
        ("auto", "fp32", True, torch.float32),
        ("bf16", "fp32", False, torch.bfloat16),
        ("fp32", "bf16", True, torch.float32),
    ],
)
def test_queue_dtype(
    name: str, precision: str, kernels: bool, expected: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cast_fast"):
        assert resolve_queue_dtype(name, precision, torch.device("cpu"), kernels) == expected
    assert ("queue of" in caplog.text) == (name == "auto")


def test_unknown_queue_dtype_is_named() -> None:
    with pytest.raises(ValueError, match="queue_dtype: got 'fp16'"):
        resolve_queue_dtype("fp16", "fp32", torch.device("cpu"), False)
