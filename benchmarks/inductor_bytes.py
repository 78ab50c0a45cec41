"""Count the bytes that Inductor's CUDA code moves, without a GPU.

    python benchmarks/inductor_bytes.py [--write [FILE]]

The code is generated for an H200 from tensors without storage and is never launched; each scheduled kernel is counted
by the buffers that it reads and writes. Against the floor, every input and output moved once, this says where a kernel
of our own could gain anything. ``--write`` stores the table in ``benchmarks/results/offline/inductor_bytes.json``.

Internals of torch are used as of 2.14; another version may need other names, and the script says so.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

import cast_kernels
from cast_kernels import reference

RESULT = Path(__file__).resolve().parent / "results" / "offline" / "inductor_bytes.json"
LARGE = 1 << 20
"""Kernels that move less are counted, but not listed."""
MB = 1e6

_H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    total_memory=141 << 30,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    L2_cache_size=50 << 20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
)


class _Driver:
    """Tells Triton what it would compile for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Answer Inductor's questions about the device as an H200 would; nothing that runs on a device works inside."""
    from torch._dynamo.device_interface import CudaInterface

    def channels_last(x: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
        # cuDNN's rule: channels-last if either operand is.
        del backend
        either = any(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
        return torch.channels_last if either else torch.contiguous_format

    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "get_device_properties", lambda device=None: _H200),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch._C, "_select_conv_backend", lambda *a, **k: torch._C._ConvBackend.Cudnn),
        (torch._C, "_conv_determine_backend_memory_format", channels_last),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda device=None: _H200)),
        (CudaInterface.Worker, "current_device", staticmethod(lambda: 0)),
        (CudaInterface, "get_device_properties", staticmethod(lambda device=None: _H200)),
        (CudaInterface, "current_device", staticmethod(lambda: 0)),
        (CudaInterface, "is_available", staticmethod(lambda: True)),
        (CudaInterface, "is_triton_capable", staticmethod(lambda device=None: True)),
        (CudaInterface, "raise_if_triton_unavailable", staticmethod(lambda device=None: None)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda device=None: 90)),
        (CudaInterface, "get_raw_stream", staticmethod(lambda device: 0)),
    ]
    with contextlib.ExitStack() as stack:
        for holder, name, answer in answers:
            stack.enter_context(mock.patch.object(holder, name, answer))
        driver: Any = _Driver()
        triton.runtime.driver.set_active(driver)
        yield


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One scheduled kernel."""

    graph: str
    """``forward``, ``backward`` or ``inference``."""
    name: str
    bytes: int
    extern: bool
    """A library call or one of our operators rather than generated code."""


def count(function: Callable[..., Any], arguments: list[Any], backward: bool) -> list[Kernel]:
    """Kernels of ``function`` and, if wanted, of the backward of the sum of its results."""
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode
    from torch._inductor.virtualized import V
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    found: list[Kernel] = []

    def compiler(kind: str) -> Any:
        def generate(traced: torch.fx.GraphModule, cpu_inputs: list[Any]) -> Any:
            # Autograd's engine wants a driver for CUDA tensors, so tracing is on the CPU and code for the GPU.
            module, inputs = _to_gpu(traced, cpu_inputs)
            FakeTensorProp(module, V.fake_mode).propagate(*inputs)
            post_grad_passes(module, kind == "inference")
            view_to_reshape(module)
            graph = GraphLowering(
                module, example_inputs=inputs, is_inference=kind == "inference", is_backward=kind == "backward"
            )
            with DebugContext(), V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
                graph.run(*inputs)
                graph.codegen()
                _, nodes, _ = graph.count_bytes()
                for node, _ in nodes:
                    size = node.get_read_write_buffers_sizes()
                    found.append(Kernel(kind, node.get_name(), size, isinstance(node, ExternKernelSchedulerNode)))
            return make_boxed_func(traced)

        return generate

    def partition(module: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        joint_graph_passes(module)
        return min_cut_rematerialization_partition(module, inputs, **options)

    compiled = aot_function(
        function,
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        inference_compiler=compiler("inference"),
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    if not backward:
        with torch.no_grad():
            compiled(*arguments)
        return found
    results = compiled(*arguments)
    results = results if isinstance(results, (tuple, list)) else [results]
    sum(result.float().sum() for result in results if result.requires_grad).backward()
    return found


def _to_gpu(module: torch.fx.GraphModule, inputs: list[Any]) -> tuple[torch.fx.GraphModule, list[Any]]:
    """A copy of a graph traced on the CPU, and its inputs, on the pretended GPU."""
    cuda = torch.device("cuda", 0)
    copied = copy.deepcopy(module)
    for node in copied.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": cuda}
    moved = [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=cuda) if isinstance(x, Tensor) else x
        for x in inputs
    ]
    copied.recompile()
    return copied, moved


@dataclasses.dataclass(frozen=True)
class Study:
    """One question."""

    name: str
    function: Callable[..., Any]
    arguments: Callable[[], list[Any]]
    backward: bool
    floor: int
    """Every input read once and every output written once, in bytes."""
    parts: tuple[str, ...] = ("forward", "backward", "inference")
    """Graphs that count."""


def _empty(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    made = torch.empty(shape, dtype=dtype)
    if len(shape) == 4:
        made = made.to(memory_format=torch.channels_last)
    return made.requires_grad_() if grad else made


N, C, SIDE, SIZE, KEYS, DIM = 256, 2048, 7, 224, 65_536, 128
MAP = N * C * SIDE * SIDE
PARAMETERS = [(512, 512, 3, 3)] * 8 + [(2048,)] * 40 + [(2048, 512, 1, 1)] * 4


def normalise_and_mask(crops: Tensor, mask: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The key crops as the step makes them, each read by a convolution of its own."""
    images = (crops.to(scale.dtype) * scale + shift).contiguous(memory_format=torch.channels_last)
    masked = torch.where((mask > 0)[:, None], images, 0)
    return tuple(F.conv2d(x.bfloat16(), weight, stride=2, padding=3) for x in (images, masked))


def last_block(gradient: str) -> Callable[..., Tensor]:
    """BatchNorm, residual and ReLU of the last block, pooling, a linear head, alpha, and the loss by ``gradient``."""

    def function(
        convolved: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, key: Tensor, saliency: Tensor
    ) -> Tensor:
        normal = F.batch_norm(convolved, None, None, scale, shift, training=True)
        activations = (normal + residual).relu()
        pooled = activations.mean((2, 3), dtype=torch.float32)
        projection = pooled @ weight.T
        query = F.normalize(projection, dim=1)
        similarity = (query * key).sum(1, keepdim=True)
        alpha = ((key - similarity * query) / projection.norm(dim=1, keepdim=True)) @ weight
        if gradient == "none":
            return similarity.sum()
        if gradient == "ordinary":
            return cast_kernels.gradcam_cosine(activations, alpha, saliency)[0].sum() + similarity.sum()
        return _opaque_loss(activations, alpha, saliency).sum() + similarity.sum()

    return function


@torch.library.custom_op("cast_bytes::activation_gradient", mutates_args=())
def _activation_gradient(slope: Tensor, alpha: Tensor, like: Tensor) -> Tensor:
    """Stands for a kernel that writes the gradient of the activations itself; only its sizes matter."""
    del slope, alpha
    return torch.empty_like(like)


@_activation_gradient.register_fake
def _activation_gradient_fake(slope: Tensor, alpha: Tensor, like: Tensor) -> Tensor:
    del slope, alpha
    return torch.empty_like(like)


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activations: Tensor, alpha: Tensor, saliency: Tensor) -> Tensor:
        loss, _, slope, change = torch.ops.cast_kernels.gradcam_cosine(activations, alpha, saliency, True)
        shell = activations.new_empty(()).expand(activations.shape)
        ctx.save_for_backward(slope, alpha, change, shell)
        ctx.strides = activations.stride()
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        slope, alpha, change, shell = ctx.saved_tensors
        like = torch.empty_strided(shell.shape, ctx.strides, dtype=shell.dtype, device=shell.device)
        written = torch.ops.cast_bytes.activation_gradient(slope * upstream[:, None, None], alpha, like)
        return written, change * upstream[:, None], None


def _opaque_loss(activations: Tensor, alpha: Tensor, saliency: Tensor) -> Tensor:
    return _Opaque.apply(activations, alpha, saliency)


def momentum_update(*tensors: Tensor) -> None:
    """key <- m key + (1 - m) query, the first half of the tensors being the keys."""
    half = len(tensors) // 2
    keys = list(tensors[:half])
    torch._foreach_mul_(keys, 0.999)
    torch._foreach_add_(keys, list(tensors[half:]), alpha=0.001)


def sgd(*tensors: Tensor) -> None:
    """SGD with momentum and weight decay; thirds: parameters, gradients, momentum buffers."""
    third = len(tensors) // 3
    parameters, gradients, buffers = (list(tensors[i * third : (i + 1) * third]) for i in range(3))
    decayed = torch._foreach_add(gradients, parameters, alpha=1e-4)
    torch._foreach_mul_(buffers, 0.9)
    torch._foreach_add_(buffers, decayed)
    torch._foreach_add_(parameters, buffers, alpha=-0.1)


def _loss_of(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    return lambda *arguments: function(*arguments)[0]


def studies() -> list[Study]:
    """All questions, at N = 256, ResNet-50, 224 pixels, K = 65,536."""
    bf16 = torch.bfloat16
    pixels = N * SIZE * SIZE
    convolved = N * 64 * (SIZE // 2) ** 2 * 2
    weight = 64 * 3 * 49 * 2
    floats = 4 * sum(torch.Size(shape).numel() for shape in PARAMETERS)

    def block() -> list[Any]:
        maps = [_empty(N, C, SIDE, SIDE, dtype=bf16, grad=True) for _ in range(2)]
        small = [_empty(C, grad=True), _empty(C, grad=True), _empty(DIM, C, grad=True)]
        return [*maps, *small, F.normalize(_empty(N, DIM), dim=1), _empty(N, SIDE, SIDE)]

    def gradcam() -> list[Any]:
        return [_empty(N, C, SIDE, SIDE, dtype=bf16), _empty(N, C, grad=True), _empty(N, SIDE, SIDE)]

    def queue(dtype: torch.dtype) -> Callable[[], list[Any]]:
        return lambda: [_empty(N, DIM, grad=True), _empty(N, DIM), _empty(KEYS, DIM, dtype=dtype), 0.07]

    def parameters(copies: int) -> Callable[[], list[Any]]:
        return lambda: [_empty(*shape) for _ in range(copies) for shape in PARAMETERS]

    # Backward of BatchNorm + add + ReLU: two passes over the convolution's output and the mask (here the saved output
    # of the ReLU), and two gradients written.
    block_floor = MAP * 2 * (2 + 2 + 2)
    small_maps = 2 * N * C * 4 + 3 * N * SIDE * SIDE * 4 + N * 4
    return [
        Study(
            "normalise and mask the key crops, with the two stem convolutions that read them",
            normalise_and_mask,
            lambda: [
                _empty(N, 3, SIZE, SIZE, dtype=torch.uint8),
                torch.empty(N, SIZE, SIZE, dtype=torch.uint8),
                _empty(1, 3, 1, 1),
                _empty(1, 3, 1, 1),
                _empty(64, 3, 7, 7, dtype=bf16),
            ],
            False,
            # Crops and mask read, two bfloat16 images written; each is then read by a convolution.
            pixels * (3 + 1) + 2 * pixels * 3 * 2 + 2 * (pixels * 3 * 2 + convolved + weight),
        ),
        Study("momentum update, compiled", momentum_update, parameters(2), False, 3 * floats),
        Study("SGD, compiled", sgd, parameters(3), False, 5 * floats),
        Study("last block, backward, no attention loss", last_block("none"), block, True, block_floor, ("backward",)),
        Study(
            "last block, backward, ∂A as ordinary operations",
            last_block("ordinary"),
            block,
            True,
            block_floor,
            ("backward",),
        ),
        Study("last block, backward, ∂A from a kernel", last_block("opaque"), block, True, block_floor, ("backward",)),
        Study(
            "gradcam_cosine reference, compiled",
            _loss_of(reference.gradcam_cosine),
            gradcam,
            True,
            MAP * 2 + small_maps,
        ),
        Study("gradcam_cosine operator", _loss_of(cast_kernels.gradcam_cosine), gradcam, True, MAP * 2 + small_maps),
        Study(
            "info_nce reference, compiled, bf16 queue",
            _loss_of(reference.info_nce),
            queue(bf16),
            True,
            KEYS * DIM * 2 + 3 * N * DIM * 4,
        ),
        Study(
            "info_nce reference, compiled, fp32 queue",
            _loss_of(reference.info_nce),
            queue(torch.float32),
            True,
            KEYS * DIM * 4 + 3 * N * DIM * 4,
        ),
        Study(
            "info_nce operator, bf16 queue",
            _loss_of(cast_kernels.info_nce),
            queue(bf16),
            True,
            KEYS * DIM * 2 + 3 * N * DIM * 4,
        ),
    ]


def measure(study: Study) -> dict[str, Any]:
    """Count one study."""
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    with pretended_gpu(), mode, V.set_fake_mode(mode):
        kernels = [k for k in count(study.function, study.arguments(), study.backward) if k.graph in study.parts]
    total = sum(kernel.bytes for kernel in kernels)
    return {
        "bytes": total,
        "floor": study.floor,
        "lost": round(1 - study.floor / total, 3),
        "kernels": len(kernels),
        "large": [
            f"{kernel.graph} {'extern' if kernel.extern else 'generated'} {kernel.bytes / MB:.1f} MB"
            for kernel in kernels
            if kernel.bytes >= LARGE
        ],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", nargs="?", type=Path, const=RESULT, help="store the table (in FILE)", metavar="FILE")
    parser.add_argument("--only", help="studies whose name contains this")
    args = parser.parse_args(argv)
    table: dict[str, Any] = {}
    for study in studies():
        if args.only and args.only not in study.name:
            continue
        row = table[study.name] = measure(study)
        print(
            f"{study.name}: {row['bytes'] / MB:,.1f} MB, floor {row['floor'] / MB:,.1f} MB, lost {row['lost']:.1%}, "
            f"{row['kernels']} kernels",
            flush=True,
        )
        for line in row["large"]:
            print(f"    {line}")
    if args.write:
        args.write.write_text(json.dumps({"torch": torch.__version__, "studies": table}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
