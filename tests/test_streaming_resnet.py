"""Streaming blocks and trunks are torchvision's: outputs, gradients, statistics, names, steps, ranks, one graph."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import rank_checks
import streaming_ranks
import torch
import torch._dynamo
from streaming_ranks import small_resnet, small_step
from test_step import differing, poison, snapshot
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torchvision.models import resnet

from cast_fast import distributed
from cast_fast.data.batch import random_batch
from cast_fast.encoder import build_encoder, build_trunk
from cast_fast.forward import step_losses
from cast_fast.split_batch_norm import split_batch_norm
from cast_fast.streaming_resnet import Branches, StreamingBlock, StreamingTrunk
from cast_fast.sync_batch_norm import synchronise_batch_norm

EXACT = 1e-11
"""Relative to the largest value of a tensor, in float64 and through a whole trunk."""


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every BatchNorm with weights, biases and running statistics of its own; some weights negative."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
                assert tensor is not None
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            assert norm.running_var is not None and norm.num_batches_tracked is not None
            norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.5)
            norm.num_batches_tracked.fill_(3)
    return module


def images_of(count: int, channels: int, *size: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    values = torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return values.contiguous(memory_format=torch.channels_last)


def error(value: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest value; NaN is infinite."""
    value, truth = (tensor.detach().to("cpu", torch.float64) for tensor in (value, truth))
    assert value.shape == truth.shape
    return float(((value - truth).abs().max() / truth.abs().max().clamp_min(1e-30)).nan_to_num(nan=float("inf")))


def assert_same_statistics(found: nn.Module, expected: nn.Module, tolerance: float = EXACT) -> None:
    for (name, value), truth in zip(found.named_buffers(), expected.buffers(), strict=True):
        if value.is_floating_point():
            assert error(value, truth) < tolerance, name
        else:
            assert torch.equal(value.cpu(), truth.cpu()), name


BLOCKS: dict[str, Any] = {
    "basic": lambda: resnet.BasicBlock(6, 6),
    "basic projecting": lambda: resnet.BasicBlock(5, 8, stride=2, downsample=projection(5, 8, 2)),
    "bottleneck": lambda: resnet.Bottleneck(12, 3),
    "bottleneck projecting": lambda: resnet.Bottleneck(5, 3, stride=2, downsample=projection(5, 12, 2)),
    "resnext": lambda: resnet.Bottleneck(16, 4, groups=2, base_width=48),
    "wide": lambda: resnet.Bottleneck(16, 4, base_width=128),
    "dilated": lambda: resnet.Bottleneck(12, 3, dilation=2),
}


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


@pytest.mark.parametrize("splits", [True, False], ids=["two readers", "one reader"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_block_is_torchvisions(kind: str, splits: bool) -> None:
    """Two passes in a row, each reader of the output with a gradient of its own, each branch an input of its own."""
    torch.manual_seed(0)
    block = lively(BLOCKS[kind]()).double().to(memory_format=torch.channels_last).train()
    channels = next(block.parameters()).shape[1]
    streaming = StreamingBlock(copy.deepcopy(block), splits=splits)
    for seed in (1, 2):
        x = images_of(3, channels, 7, 5, seed=seed).requires_grad_()
        y = block(x)
        upstream, upstream_skip = (torch.randn_like(y) for _ in range(2))
        total = upstream + upstream_skip if splits else upstream
        expected = torch.autograd.grad((y * total).sum(), [x, *block.parameters()])

        branches = Branches(x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_())
        output = streaming(branches)
        if splits:
            assert output.main.data_ptr() == output.skip.data_ptr()
            loss = (output.main * upstream).sum() + (output.skip * upstream_skip).sum()
        else:
            loss = (output * upstream).sum()
        main, skip, *found = torch.autograd.grad(loss, [*branches[:2], *streaming.parameters()])
        assert error(output.main if splits else output, y) < EXACT
        assert error(main + skip, expected[0]) < EXACT
        assert main.abs().max() > 0 and skip.abs().max() > 0
        for (name, _), value, truth in zip(streaming.named_parameters(), found, expected[1:], strict=True):
            assert error(value, truth) < EXACT, name
        assert_same_statistics(streaming, block)


def test_each_batch_norm_has_an_eps_of_its_own() -> None:
    block = lively(BLOCKS["basic projecting"]()).double().train()
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm, eps in zip(norms, (0.1, 0.5, 2.0), strict=True):
        norm.eps = eps
    streaming = StreamingBlock(copy.deepcopy(block), splits=False)
    x = images_of(3, 5, 7, 5).requires_grad_()
    results = []
    for module in (block, streaming):
        y = module(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
    assert max(map(error, results[1], results[0])) < EXACT


@pytest.mark.parametrize("groups", [1, 3])
def test_gradients_have_memory_of_their_own(groups: int) -> None:
    """Two BatchNorms of a block have the same gradient of the bias: what scales one in place, scales one."""
    block = lively(BLOCKS["bottleneck projecting"]()).double().train()
    split_batch_norm(block, groups)
    streaming = StreamingBlock(block, splits=False)
    loss = streaming(images_of(3, 5, 7, 5)).square().sum()
    names = [name for name, _ in streaming.named_parameters()]
    gradients = dict(zip(names, torch.autograd.grad(loss, list(streaming.parameters())), strict=True))
    assert torch.equal(gradients["bn3.bias"], gradients["downsample.1.bias"])
    before = {name: gradient.clone() for name, gradient in gradients.items()}
    for gradient in gradients.values():
        gradient.mul_(2)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, 2 * before[name]), name


@pytest.mark.parametrize(
    ("arch", "count", "size"),
    [("resnet18", 3, 41), ("resnet50", 2, 40), pytest.param("resnext50_32x4d", 2, 33, id="resnext50")],
)
def test_trunk_is_torchvisions(arch: str, count: int, size: int) -> None:
    torch.manual_seed(0)
    trunk = lively(build_trunk(arch)[0]).double().to(memory_format=torch.channels_last).train()
    streaming = build_trunk(arch, "streaming")[0].double().to(memory_format=torch.channels_last).train()
    streaming.load_state_dict(trunk.state_dict())
    x = images_of(count, 3, size, size)
    results = []
    for module in (trunk, streaming):
        images = x.clone().requires_grad_()
        y = module(images)
        upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
        results.append((y, torch.autograd.grad((y * upstream).sum(), [images, *module.parameters()])))
    (y, expected), (y_streaming, found) = results
    assert error(y_streaming, y) < EXACT
    assert y_streaming.is_contiguous(memory_format=torch.channels_last)
    names = ["images", *dict(trunk.named_parameters())]
    worst = max((error(value, truth), name) for name, value, truth in zip(names, found, expected, strict=True))
    assert worst[0] < 100 * EXACT, worst
    assert_same_statistics(streaming, trunk)


def test_without_gradient_the_same_comes_out_and_nothing_is_kept() -> None:
    trunk = lively(build_trunk("resnet18", "streaming")[0]).double().train()
    twin = copy.deepcopy(trunk)
    x = images_of(2, 3, 33, 33)
    with torch.no_grad():
        y = trunk(x)
    assert not y.requires_grad
    assert torch.equal(y, twin(x).detach())
    for value, truth in zip(trunk.buffers(), twin.buffers(), strict=True):
        assert torch.equal(value, truth)


def test_eval_mode_is_torchs_own_path() -> None:
    torch.manual_seed(0)
    trunk = lively(build_trunk("resnet18")[0]).eval()
    streaming = build_trunk("resnet18", "streaming")[0].eval()
    streaming.load_state_dict(trunk.state_dict())
    before = {name: value.clone() for name, value in streaming.state_dict().items()}
    x = images_of(2, 3, 48, 48, dtype=torch.float32)
    assert torch.equal(streaming(x), trunk(x))
    assert all(torch.equal(value, before[name]) for name, value in streaming.state_dict().items())


def test_frozen_statistics_are_used() -> None:
    """A BatchNorm put into eval mode alone: its block leaves the streaming path, and the next one finds it again."""
    torch.manual_seed(0)
    trunk = lively(build_trunk("resnet18")[0]).double().train()
    streaming = build_trunk("resnet18", "streaming")[0].double().train()
    streaming.load_state_dict(trunk.state_dict())
    for module in (trunk, streaming):
        module.get_submodule("layer2.0.bn1").eval()
        module.get_submodule("layer4.1.bn2").eval()
    x = images_of(3, 3, 33, 33)
    results = [module(x) for module in (trunk, streaming)]
    assert error(results[1], results[0]) < EXACT
    gradients = [
        torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in zip(results, (trunk, streaming))
    ]
    assert max(map(error, gradients[1], gradients[0])) < 100 * EXACT
    assert_same_statistics(streaming, trunk)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_names_order_and_initial_weights_are_torchvisions(arch: str) -> None:
    encoders = []
    for batch_norm in ("torch", "streaming"):
        torch.manual_seed(3)
        encoders.append(build_encoder(arch, 8, "linear", batch_norm))
    first, second = (encoder.state_dict() for encoder in encoders)
    assert list(first) == list(second)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    names = [[name for name, _ in encoder.named_parameters()] for encoder in encoders]
    assert names[0] == names[1]
    lively(encoders[1], seed=4)
    encoders[0].load_state_dict(encoders[1].state_dict())
    assert all(torch.equal(v, encoders[1].state_dict()[name]) for name, v in encoders[0].state_dict().items())


@pytest.mark.parametrize("kind", ["basic projecting", "bottleneck", "bottleneck projecting"])
def test_bfloat16_errs_no_more_than_eager(device: torch.device, kind: str) -> None:
    """Against float64 from the same weights: root mean square errors of output and gradients, over eight inputs."""
    torch.manual_seed(0)
    block = lively(BLOCKS[kind]()).to(memory_format=torch.channels_last).train()
    truth, streaming = copy.deepcopy(block).double(), StreamingBlock(copy.deepcopy(block), splits=False).to(device)
    block.to(device)
    channels = next(block.parameters()).shape[1]
    errors = torch.zeros(2, 3, dtype=torch.float64)
    for seed in range(8):
        x = images_of(4, channels, 9, 9, dtype=torch.float32, seed=seed).bfloat16()
        y = run_block(truth, x.double(), seed, autocast=False)
        for row, module in enumerate((block, streaming)):
            found = run_block(module, x.to(device), seed, autocast=True)
            assert found[0].dtype == torch.bfloat16
            for column, (value, right) in enumerate(zip(found, y)):
                errors[row, column] += (value.double().cpu() - right).square().mean() / right.square().mean()
    errors = errors.sqrt()
    assert (errors[0] > 0).all()
    assert (errors[1] <= (1.02 if device.type == "cpu" else 1.05) * errors[0]).all(), errors


def test_an_input_that_autocast_has_not_narrowed() -> None:
    """As the shortcut it is wider than the convolution's output; errors against float64 are no larger than torch's."""
    torch.manual_seed(0)
    block = lively(BLOCKS["basic"]()).train()
    streaming, truth = StreamingBlock(copy.deepcopy(block), splits=False), copy.deepcopy(block).double()
    x = images_of(4, 6, 9, 9, dtype=torch.float32)
    exact = run_block(truth, x.double(), 0, autocast=False)
    for found, own, right in zip(*(run_block(m, x, 0, autocast=True) for m in (streaming, block)), exact, strict=True):
        assert found.dtype == own.dtype
        assert (found - right).norm() <= 1.1 * (own - right).norm()


@pytest.mark.parametrize("kind", ["basic", "basic projecting"])
@pytest.mark.parametrize("of", ["input", "weight"])
def test_a_second_derivative_is_an_error(kind: str, of: str) -> None:
    """Not a number that lacks the statistics' part, also where other terms have one."""
    streaming = StreamingBlock(BLOCKS[kind](), splits=False).double().train()
    x = images_of(3, next(streaming.parameters()).shape[1], 7, 5).requires_grad_()
    leaf = x if of == "input" else streaming.get_parameter("bn1.weight")
    loss = (streaming(x) ** 2).sum() + leaf.sin().sum()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.square().sum().backward()


def test_frozen_weights_get_no_gradient() -> None:
    torch.manual_seed(0)
    block = lively(BLOCKS["basic projecting"]()).double().train()
    for name in ("conv1.weight", "bn1.weight", "bn2.bias", "downsample.1.weight", "downsample.1.bias"):
        block.get_parameter(name).requires_grad_(False)
    streaming = StreamingBlock(copy.deepcopy(block), splits=False)
    x = images_of(3, 5, 7, 5)
    for module in (block, streaming):
        module(x).square().sum().backward()
    for (name, found), expected in zip(streaming.named_parameters(), block.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None), name
        assert found.grad is None or error(found.grad, expected.grad) < EXACT, name  # pyright: ignore[reportArgumentType]


def run_block(module: nn.Module, x: Tensor, seed: int, *, autocast: bool) -> list[Tensor]:
    """Output, input gradient, and all parameters' gradients in a row."""
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = module(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(y)
    dx, *rest = torch.autograd.grad(y, [x, *module.parameters()], upstream)
    return [y.detach(), dx, torch.cat([gradient.flatten() for gradient in rest])]


# Parts with statistics of their own


@pytest.mark.parametrize("kind", ["basic", "basic projecting", "bottleneck", "bottleneck projecting"])
def test_parts_of_a_block_are_passes_one_after_the_other(kind: str) -> None:
    """Three runs of two samples, an odd number of values a channel each; parameters' gradients are the sums."""
    torch.manual_seed(0)
    block = lively(BLOCKS[kind]()).double().to(memory_format=torch.channels_last).train()
    channels = next(block.parameters()).shape[1]
    twin = copy.deepcopy(block)
    split_batch_norm(twin, passes=3)
    streaming = StreamingBlock(twin, splits=False)
    # Parts that differ: common statistics would be far off.
    parts = [images_of(1, channels, 7, 5, seed=seed) * (1 + seed) + seed for seed in range(3)]
    x = torch.cat(parts).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = streaming(x)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad((y * upstream).sum(), [x, *streaming.parameters()])
    leaves = [part.clone().requires_grad_() for part in parts]
    outputs = [block(leaf) for leaf in leaves]
    gradients = torch.autograd.grad(outputs, [*leaves, *block.parameters()], upstream.chunk(3))
    assert error(y, torch.cat(outputs)) < EXACT
    expected = [torch.cat(gradients[:3]), *gradients[3:]]
    assert max(map(error, found, expected)) < EXACT
    assert_same_statistics(streaming, block)


@pytest.mark.parametrize(("groups", "passes"), [(2, 1), (2, 2), (1, 4), (1, 1)])
def test_parts_of_a_trunk_are_those_of_torchs_modules(groups: int, passes: int) -> None:
    """Four samples, up to a part for each; running statistics by the mean over the groups of a pass; as one graph."""
    torch.manual_seed(0)
    trunk = lively(small_resnet(resnet.BasicBlock, 1)).double().to(memory_format=torch.channels_last).train()
    apart = copy.deepcopy(trunk)
    split_batch_norm(trunk, groups, passes)
    twin: Any = copy.deepcopy(trunk)
    streaming = StreamingTrunk(twin)
    x = images_of(4, 3, 41, 41)
    _, found = traced(streaming, x)
    y = trunk(x)
    expected = [y, *torch.autograd.grad(y.square().sum(), list(trunk.parameters()))]
    assert max(map(error, found, expected)) < 100 * EXACT
    assert_same_statistics(streaming, trunk)
    assert streaming.bn1.num_batches_tracked == 3 + passes
    outputs = torch.cat([apart(part) for part in x.chunk(groups * passes)])
    assert error(found[0], outputs) < EXACT


def test_samples_that_the_parts_do_not_divide_are_refused() -> None:
    block = resnet.BasicBlock(4, 4).train()
    split_batch_norm(block, 2)
    with pytest.raises(ValueError, match=r"parts: got 2 parts, expected a divisor of 3 \(samples\)"):
        StreamingBlock(block)(torch.randn(3, 4, 5, 5))
    with pytest.raises(ValueError, match="got one value a channel"):
        StreamingBlock(block)(torch.randn(2, 4, 1, 1))


# One graph


def traced(module: nn.Module, x: Tensor) -> tuple[list[torch.fx.GraphModule], list[Tensor]]:
    """Forward and backward graph as the compiler gets them, and the output with all gradients that they compute."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        del inputs
        graphs.append(graph)
        return graph

    compilers: dict[str, Any] = {"fw_compiler": keep, "bw_compiler": keep}
    torch._dynamo.reset()
    compiled = torch.compile(
        module,
        fullgraph=True,
        dynamic=False,
        backend=lambda graph, inputs: aot_module_simplified(graph, inputs, **compilers),
    )
    y = compiled(x)
    gradients = torch.autograd.grad(y.square().sum(), list(module.parameters()))
    torch._dynamo.reset()
    return graphs, [y.detach(), *gradients]


def behind_views(node: torch.fx.Node) -> torch.fx.Node:
    """The node whose memory this is."""
    while node.op == "call_function" and node.target in (torch.ops.aten.view.default, torch.ops.aten.alias.default):
        node = node.all_input_nodes[0]
    return node


def test_one_graph_without_additions_of_gradients() -> None:
    torch.manual_seed(0)
    module = lively(StreamingTrunk(small_resnet(resnet.Bottleneck, 2))).double().train()
    x = images_of(2, 3, 33, 33)
    twin = copy.deepcopy(module)
    graphs, found = traced(module, x)
    y = twin(x)
    expected = [y, *torch.autograd.grad(y.square().sum(), list(twin.parameters()))]
    assert max(map(error, found, expected)) < EXACT
    assert_same_statistics(module, twin)
    assert len(graphs) == 2
    forward, backward = ([node for node in graph.graph.nodes if node.op == "call_function"] for graph in graphs)
    # The only arithmetic on activations outside of the operators and convolutions is this test's loss, which has none.
    for nodes in (forward, backward):
        large = [node for node in nodes if "aten" in str(node.target) and "convolution" not in str(node.target)]
        large = [node for node in large if isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dim() == 4]
        assert {str(node.target) for node in large} <= {
            "aten.view.default",
            "aten.detach.default",
            "aten.alias.default",
        }
    joins = [node for node in backward if "batch_norm_add_reduce" in str(node.target)]
    assert len(joins) == 8
    assert sum(node.args[1] is not None for node in joins) == 7  # all but the last block have two readers
    # What the forward pass keeps: each activation once, none of the ReLU's inside the stem and before it.
    outputs: Any = graphs[0].graph.output_node().args[0]
    saved = {behind_views(value) for value in outputs if value is not None}
    sizes = [node.meta["val"].shape for node in saved if node.meta["val"].dim() == 4 and len(node.meta["val"]) == 2]
    convolutions = sum("convolution" in str(node.target) for node in forward)
    # x, an output a convolution, two ReLUs inside each block, its output and its mask, the stem's pool and choice.
    assert len(sizes) == 1 + convolutions + 4 * 8 + 2


def test_one_graph_for_batches_and_images_of_any_size() -> None:
    torch.manual_seed(0)
    module = lively(small_resnet(resnet.BasicBlock, 1)).double().train()
    split_batch_norm(module, groups=2)
    streaming = StreamingTrunk(module)  # pyright: ignore[reportArgumentType]
    twin = copy.deepcopy(streaming)
    torch._dynamo.reset()
    compiled = torch.compile(streaming, fullgraph=True, dynamic=True, backend="aot_eager")
    for count, size in ((4, 33), (6, 41)):
        x = images_of(count, 3, size, size)
        results = []
        for network, owner in ((compiled, streaming), (twin, twin)):
            y = network(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(owner.parameters()))])
        assert max(map(error, *results)) < EXACT
    torch._dynamo.reset()
    assert_same_statistics(streaming, twin)


# In the step


def test_step_is_the_one_without() -> None:
    first, second = small_step("torch"), small_step("streaming")
    for seed in range(3):
        batch = random_batch(5, 64, (2, 2), "cpu", seed=seed)
        expected, found = first(batch, 0.05), second(batch, 0.05)
        for name, value in found._asdict().items():
            torch.testing.assert_close(value, getattr(expected, name), rtol=1e-7, atol=1e-9, msg=name)
    expected, found = snapshot(first), snapshot(second)
    assert expected.keys() == found.keys()
    for name, value in found.items():
        # The gradient's norm goes through float32 where it is clipped.
        assert error(value, expected[name]) < 1e-6, name


@pytest.mark.parametrize("how", ["loss", "forward", "gradient nan"])
def test_a_step_that_is_not_finite_changes_nothing(how: str) -> None:
    step = small_step("streaming", torch.float32)
    step(random_batch(4, 64, (2, 2), "cpu", seed=0), 0.05)
    batch = random_batch(4, 64, (2, 2), "cpu", seed=1)
    poison(step, batch, how)
    before = snapshot(step)
    assert not step(batch, 0.05).finite
    assert differing(before, snapshot(step)) == []


def test_compiled_step_is_one_graph_and_equal() -> None:
    eager, compiled = small_step("streaming"), small_step("streaming")
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled._losses = torch.compile(step_losses, fullgraph=True, dynamic=False, backend=backend)
    for seed in range(2):
        batch = random_batch(4, 64, (2, 2), "cpu", seed=seed)
        eager(batch, 0.05)
        compiled(batch, 0.05)
    torch._dynamo.reset()
    assert len(graphs) == 1
    expected = snapshot(eager)
    for name, value in snapshot(compiled).items():
        assert error(value, expected[name]) < 1e-6, name


def test_two_ranks_with_common_statistics_are_one_process(tmp_path: Path) -> None:
    """Eager and compiled, where DDP cuts the graph between blocks; the one process has torch's modules."""
    expected = streaming_ranks.steps(rank_checks.World(), "torch")
    for results in rank_checks.run_ranks(streaming_ranks.eager_and_compiled, 2, tmp_path):
        for found in results:
            assert found.keys() == expected.keys()
            for name, value in found.items():
                # The gradient's norm goes through float32 where it is clipped.
                assert error(value, expected[name]) < (1e-10 if name.startswith("gradient") else 1e-6), name


# Mistakes


def test_callers_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="batch_norm: got 'fused', expected one of torch, streaming"):
        build_trunk("resnet18", "fused")
    with pytest.raises(ValueError, match="block: got Sequential, expected BasicBlock or Bottleneck"):
        StreamingBlock(nn.Sequential())
    with pytest.raises(ValueError, match=r"BatchNorm: got .* expected nn.BatchNorm2d, affine"):
        StreamingBlock(resnet.BasicBlock(4, 4, norm_layer=lambda width: nn.GroupNorm(2, width)))
    with pytest.raises(ValueError, match="BatchNorm: got"):
        StreamingBlock(resnet.BasicBlock(4, 4, norm_layer=lambda width: nn.BatchNorm2d(width, momentum=None)))
    trunk = small_resnet(resnet.BasicBlock, 1)
    trunk.maxpool = nn.MaxPool2d(2, 2)
    with pytest.raises(ValueError, match=r"maxpool: got .* expected kernel 3, stride 2, padding 1"):
        StreamingTrunk(trunk)
    trunk = small_resnet(resnet.BasicBlock, 1)
    del trunk.layer4
    with pytest.raises(ValueError, match="trunk: got modules conv1"):
        StreamingTrunk(trunk)
    block = StreamingBlock(resnet.BasicBlock(4, 4)).train()
    with pytest.raises(ValueError, match=r"BatchNorm: got one value a channel \(shape \(1, 4, 1, 1\)\)"):
        block(torch.randn(1, 4, 1, 1))
    norm: Any = block.bn1
    norm.momentum = None
    with pytest.raises(ValueError, match=r"BatchNorm: got .* expected one with a momentum"):
        block(torch.randn(2, 4, 3, 3))
    mixed = StreamingBlock(BLOCKS["basic projecting"]()).train()
    synchronise_batch_norm(mixed.get_submodule("downsample"))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"BatchNorm: got .* in a block, expected both of one kind"):
        mixed(torch.randn(2, 5, 7, 7))
    monkeypatch.undo()
    synchronised = StreamingTrunk(small_resnet(resnet.BasicBlock, 1))
    synchronise_batch_norm(synchronised)
    assert synchronised.get_submodule("layer2.0.downsample.1").__class__.__name__ == "SyncBatchNorm2d"


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_on_a_gpu_a_trunk_errs_about_as_torchs_modules_do(cuda: torch.device, compile: bool, half: bool) -> None:
    """A trunk with random weights amplifies rounding, so that two equally good ones err by different amounts."""
    torch.manual_seed(0)
    trunk = build_trunk("resnet50")[0].to(memory_format=torch.channels_last).train()
    streaming = build_trunk("resnet50", "streaming")[0].to(memory_format=torch.channels_last).train()
    streaming.load_state_dict(trunk.state_dict())
    truth = copy.deepcopy(trunk).double()
    x = images_of(16, 3, 97, 97, dtype=torch.float32)
    errors = []
    expected: list[Tensor] = []
    for module, device in ((truth, "cpu"), (trunk, "cuda"), (streaming, "cuda")):
        module.to(device)
        run = torch.compile(module, fullgraph=True, dynamic=False) if compile and module is streaming else module
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            with torch.autocast("cuda", torch.bfloat16, enabled=half and device == "cuda"):
                y = run(x.to(device, next(module.parameters()).dtype))
            ramp = torch.linspace(-1, 1, y.shape[1], device=device, dtype=torch.float64)
            loss = (y.double() * ramp[:, None, None]).mean()
            gradients = torch.autograd.grad(loss, list(module.parameters()))
        found = [y, *gradients, *(b for b in module.buffers() if b.is_floating_point())]
        found = [value.detach().to("cpu", torch.float64) for value in found]
        if not expected:
            expected = found
        errors.append([float((value - right).norm() / right.norm()) for value, right in zip(found, expected)])
    del cuda
    _, ordinary, streamed = (torch.tensor(row, dtype=torch.float64) for row in errors)
    assert streamed.isfinite().all()
    assert streamed[0] <= 1.5 * ordinary[0] + 1e-6
    assert streamed.mean() <= 1.5 * ordinary.mean() + 1e-6
