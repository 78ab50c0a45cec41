"""Every kernel once, forward and backward, at awkward shapes: what ``compute-sanitizer`` is run on.

    compute-sanitizer --tool memcheck|racecheck python benchmarks/sanitizer_cases.py [--device cpu|cuda]

A sanitizer slows a program down many times, so this is a few dozen launches rather than the test-suite. The shapes are
small and do not divide by a tile. Each result is compared with the reference, so a run without a sanitizer means
something too. Exit code: 0 all agree, 1 some do not.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import harness
import torch
from torch import Tensor

import cast_kernels
from cast_kernels import reference

TOLERANCE = 2e-2
"""Relative error in bf16 and fp16 inputs; a kernel that reads or writes astray is off by far more."""

MAPS = ((1, 1, 1, 1), (3, 65, 7, 7), (2, 40, 5, 3), (2, 33, 14, 14), (1, 16, 32, 32))
"""(N, C, H, W) of the Grad-CAM cases."""
QUEUES = ((1, 1, 1), (3, 33, 70), (17, 128, 1000), (130, 64, 129))
"""(N, D, K) of the InfoNCE cases."""
NORMS = ((1, 1, 1, 1), (3, 65, 7, 7), (2, 3, 6, 1), (1, 200, 5, 9))
"""(N, C, H, W) of the BatchNorm cases."""
BATCH_NORM = {
    "batch_norm_statistics": ("xe", "xeN"),
    "batch_norm_apply": ("xvvvv", "xvvvvx", "xvvvvxvvvv"),
    "batch_norm_relu_reduce": ("xxvvvv", "xxVVvv"),
    "batch_norm_relu_input_gradient": ("xxvvvvvvn",),
    "batch_norm_apply_mask": ("xvvvvx", "xvvvvxvvvv", "xVVvvxVVvv"),
    "batch_norm_add_reduce": ("x-mxvv", "xxmxvv", "xxmxvvxvv", "xxmxVVxVV"),
    "batch_norm_input_gradient": ("xxvvvvvn",),
    "batch_norm_input_gradients": ("xxvvvvvxvvvvn", "xxVVvVVxVVvVn"),
    "batch_norm_relu_pool": ("xvvvv",),
    "batch_norm_relu_pool_reduce": ("p-cxvvvv", "ppcxvvvv", "ppcxVVvv"),
    "batch_norm_relu_pool_input_gradient": ("p-cxvvvvvvn", "ppcxvvvvvvn", "ppcxVVvvVVn"),
}
"""Arguments of each operator: x a map, p one behind the pool, c choices, m a mask, v a vector, V one for each sample (a
part each), n how many values a channel, N how many samples, e eps, - None."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Case = tuple[str, Callable[[], float]]


def cases(device: torch.device) -> Iterator[Case]:
    """Name and a function that runs the case and returns its error."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def unit(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1).to(device, dtype)

    for (n, c, h, w), dtype in itertools.product(MAPS, DTYPES):
        activations = random(n, c, h, w, dtype=dtype).relu().contiguous(memory_format=torch.channels_last)
        gradient = random(n, c, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)
        alpha = random(n, c, dtype=torch.float32)
        saliency = random(n, h, w, dtype=torch.float32).abs()
        shape = f"N{n}-C{c}-H{h}-W{w}-{str(dtype).removeprefix('torch.')}"
        for name, second in (("gradcam_cosine", alpha), ("gradcam_cosine_from_gradient", gradient)):
            yield f"{name} {shape}", _compare(name, (activations, second, saliency), ())
    for (n, d, k), dtype, temperature in itertools.product(QUEUES, DTYPES, (0.07, 0.01)):
        query, key, queue = unit(n, d, dtype=dtype), unit(n, d, dtype=dtype), unit(k, d, dtype=dtype)
        shape = f"N{n}-D{d}-K{k}-T{temperature}-{str(dtype).removeprefix('torch.')}"
        yield f"info_nce {shape}", _compare("info_nce", (query, key), (queue, temperature))

    # Each case is compiled, which takes most of the time; float16 is loaded and stored as bfloat16 is.
    for shape, dtype in itertools.product(NORMS, DTYPES[:2]):
        pooled = (*shape[:2], (shape[2] + 1) // 2, (shape[3] + 1) // 2)

        def argument(kind: str, shape=shape, pooled=pooled, dtype=dtype) -> Tensor | float | None:
            if kind in "-neN":
                return {"-": None, "n": shape[0] * shape[2] * shape[3], "e": 1e-5, "N": shape[0]}[kind]
            if kind in "vV":
                return random(*shape[0 if kind == "V" else 1 : 2], dtype=torch.float32)
            if kind == "c":
                # Of the centre alone it is certain that it lies in the image.
                value = torch.full(pooled, 4, dtype=torch.uint8, device=device)
            elif kind == "m":
                octets = (shape[0], (shape[1] + 7) // 8, *shape[2:])
                value = torch.randint(256, octets, generator=generator, dtype=torch.uint8).to(device)
            else:
                value = random(*(shape if kind == "x" else pooled), dtype=dtype)
            return value.contiguous(memory_format=torch.channels_last)

        for name, forms in BATCH_NORM.items():
            for form in forms:
                size = f"{form} N{shape[0]}-C{shape[1]}-H{shape[2]}-W{shape[3]}-{str(dtype).removeprefix('torch.')}"
                yield f"{name} {size}", _compare_values(name, tuple(argument(kind) for kind in form))


def _compare_values(name: str, arguments: tuple[Tensor | float | None, ...]) -> Callable[[], float]:
    """Runs the operator and its reference in float64; the largest relative error of the floating-point results."""

    def run() -> float:
        wide = [t.cpu() if isinstance(t, Tensor) else t for t in arguments]
        wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in wide]
        got, expected = getattr(cast_kernels, name)(*arguments), getattr(reference, name)(*wide)
        pairs = [(got, expected)] if isinstance(got, Tensor) else zip(got, expected)
        errors = [
            float((left.double().cpu() - right).norm() / right.norm().clamp_min(1e-3))
            for left, right in pairs
            if left.is_floating_point()
        ]
        return max(errors)

    return run


def _compare(name: str, differentiable: tuple[Tensor, ...], rest: tuple[object, ...]) -> Callable[[], float]:
    """Runs the operator and its reference (in float64) forward and backward; the largest relative error."""

    def gradients(
        function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], others: list[object]
    ) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        loss = function(*leaves, *others)[0]
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    def run() -> float:
        got = gradients(getattr(cast_kernels, name), list(differentiable), list(rest))
        wide = [tensor.double().cpu() for tensor in differentiable]
        others = [value.double().cpu() if isinstance(value, Tensor) else value for value in rest]
        expected = gradients(getattr(reference, name), wide, others)
        errors = []
        for left, right in zip(got, expected):
            scale = right.norm().clamp_min(1e-3)
            errors.append(float((left.double().cpu() - right).norm() / scale))
        return max(errors)

    return run


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; returns the exit code."""
    parser = argparse.ArgumentParser(prog="sanitizer_cases.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = harness.choose_device(parser.parse_args(argv).device)
    wrong = 0
    for name, run in cases(device):
        error = run()
        verdict = "ok" if error < TOLERANCE else "WRONG"
        wrong += verdict != "ok"
        print(f"{verdict:5} {error:.1e} {name}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
