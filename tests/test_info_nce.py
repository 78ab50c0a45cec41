"""info_nce: the kernels against float64 truth, shards, memory, and the operator under autograd and torch.compile."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    CASE_DTYPES,
    INFO_NCE_PRODUCT,
    INFO_NCE_WEIGHT,
    INTERPRETED,
    KERNEL_DEVICE,
    STORED,
    assert_close,
    dtype_id,
    far_apart,
    kernel_marks,
    poisoned,  # noqa: F401  (a fixture)
    shape_id,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cast_kernels
from cast_kernels import reference

module = importlib.import_module("cast_kernels.info_nce")
launch_module = importlib.import_module("cast_kernels.launch")

pytestmark = kernel_marks("(encountered|All-NaN)")

# (N, K, D)
SHAPES = [
    (0, 40, 16),
    (1, 1, 1),
    (5, 0, 8),
    (3, 1, 5),
    (7, 300, 24),
    (33, 257, 64),
    (70, 130, 128),
    (2, 100, 200),
    (17, 70, 512),
]
LARGE = [(256, 65536, 128), (64, 4096, 128), (1, 65536, 128), (300, 10_007, 96), (512, 70_001, 256), (256, 2**20, 128)]
"""For a compiled kernel only: the interpreter would take minutes."""
TEMPERATURES = [0.07, 0.2, 5.0, 0.03, 0.029, 0.005]
KERNEL_DTYPES = [
    pytest.param(
        dtype,
        id=dtype_id(dtype),
        marks=[]
        if dtype == torch.float32
        else pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter multiplies the bits of 16-bit floats"),
    )
    for dtype in CASE_DTYPES
]


def unit_rows(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys half way to them, and a queue of the given type, rows of unit length."""
    samples, keys, dimension = shape
    query = unit_rows(samples, dimension, seed=seed)
    key = F.normalize(query + unit_rows(samples, dimension, seed=seed + 1), dim=1)
    queue = unit_rows(keys, dimension, seed=seed + 2).to(dtype)
    return query.to(KERNEL_DEVICE), key.to(KERNEL_DEVICE), queue.to(KERNEL_DEVICE)


def rounded(query: Tensor, key: Tensor, queue: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel multiplies, in float64, on the same device."""
    q, k, keys = (x.detach().to(queue.dtype).double() for x in (query, key, queue))
    return q, k, keys


def tolerances(dtype: torch.dtype, device: torch.device = KERNEL_DEVICE) -> tuple[float, float]:
    """Errors of a product and of a weight; float32's on the CPU, where the reference or the interpreter runs."""
    if device.type == "cuda":
        return INFO_NCE_PRODUCT[dtype], INFO_NCE_WEIGHT[dtype]
    return STORED[torch.float32], STORED[torch.float32]


def check(actual: tuple[Tensor, ...], query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> None:
    """Compare loss, query gradient, 1 - p⁺ and beaten with float64."""
    q, k, keys = rounded(query, key, queue)
    partials = reference.info_nce_partials(q, k, keys, temperature)
    truth = reference.info_nce_terms(q, k, partials, temperature, torch.float64)
    product, weight = tolerances(queue.dtype)
    loss, gradient, probability, beaten = actual
    # The loss moves with the logits, a probability by no more than they; the exponential adds float32's own error.
    logit = 2 * product / temperature + 2 * STORED[torch.float32]
    assert_close("loss", loss, truth.loss, 1.0, logit)
    assert_close("probability", probability, truth.negative_probability, 1.0, logit)
    assert_close("query_gradient", gradient, truth.query_gradient, 2 / temperature, logit + weight)
    check_beaten(beaten, q, k, keys, product)


def check_beaten(beaten: Tensor, q: Tensor, k: Tensor, keys: Tensor, product: float) -> None:
    """Keys whose product is within rounding of the positive's may count or not."""
    margin = q @ keys.T - (q * k).sum(1, keepdim=True)
    assert ((margin > 2 * product).sum(1) <= beaten).all()
    assert (beaten <= (margin > -2 * product).sum(1)).all()


def few_processors(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(module, "device_properties", lambda device: (90, count))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_kernel_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, temperature: float) -> None:
    query, key, queue = inputs(shape, dtype)
    check(module._launch(query, key, queue, temperature, True), query, key, queue, temperature)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("shape", LARGE, ids=shape_id)
def test_kernel_matches_float64_at_size(shape: tuple[int, ...], dtype: torch.dtype, temperature: float) -> None:
    query, key, queue = inputs(shape, dtype)
    check(module._launch(query, key, queue, temperature, True), query, key, queue, temperature)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("processors", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_any_number_of_splits(processors: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    few_processors(monkeypatch, processors)
    query, key, queue = inputs((20, 450, 32))
    check(module._launch(query, key, queue, temperature, True), query, key, queue, temperature)


def test_tiles_cover_every_key_once_and_fill_the_gpu() -> None:
    for samples in (0, 1, 64, 256, 1000):
        for keys in (0, 1, 31, 4096, 65536, 1_048_576):
            for capability, processors in ((80, 108), (90, 132), (100, 148), (120, 170)):
                for dtype in CASE_DTYPES:
                    tiles = module.choose_tiles(samples, keys, 128, dtype, capability, processors)
                    assert (tiles.splits - 1) * tiles.keys_per_split < max(keys, 1)
                    assert tiles.splits * tiles.keys_per_split >= keys
                    assert tiles.keys_per_split % tiles.block_k == 0
                    blocks = -(-samples // tiles.block_n)
                    assert tiles.splits == 1 or blocks * tiles.splits <= processors
                    if keys >= 65536 and 0 < blocks <= processors // 4:
                        assert blocks * tiles.splits > processors / 2


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("temperature", [1e-3, 0.02, 0.07, 1e3])
@pytest.mark.parametrize("case", ["equal rows", "opposite rows", "queue holds the query", "hard positive", "one hot"])
def test_extreme_values(case: str, temperature: float) -> None:
    """Logits at both ends, ±1 / T, alone and together."""
    query, key, queue = inputs((6, 80, 16))
    if case == "equal rows":
        query[:], key[:], queue[:] = queue[0], queue[0], queue[0].clone()
    elif case == "opposite rows":
        query[:], key[:], queue[:] = queue[0], queue[0], -queue[0].clone()
    elif case == "queue holds the query":
        queue[10:16] = query
        key = -query
    elif case == "hard positive":
        # No logit is near 1 / T, so a maximum fixed there would lose them all at a low temperature.
        key = -query
    else:
        query, key, queue = (torch.eye(16, device=KERNEL_DEVICE).repeat(5, 1)[: len(x)] for x in (query, key, queue))
    check(module._launch(query, key, queue, temperature, True), query, key, queue, temperature)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_a_broken_query_breaks_its_own_row_and_a_broken_key_all(temperature: float) -> None:
    query, key, queue = inputs((5, 90, 16))
    good = module._launch(query, key, queue, temperature, True)
    query[2, 3] = torch.nan
    broken = module._launch(query, key, queue, temperature, True)
    assert broken[0].isfinite().tolist() == [True, True, False, True, True]
    for before, after in zip(good[:2], broken[:2]):
        assert torch.equal(before[[0, 1, 3, 4]], after[[0, 1, 3, 4]])
    query, key, queue = inputs((5, 90, 16))
    queue[77, 0] = torch.nan
    assert module._launch(query, key, queue, temperature, True)[0].isnan().all()


@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_rows_that_are_not_of_unit_length(temperature: float) -> None:
    """bfloat16 rounding makes rows longer than one; so do careless callers."""
    query, key, queue = inputs((5, 90, 16))
    query, queue = query * 1.5, queue * 1.7
    actual = module._launch(query, key, queue, temperature, True)
    q, k, keys = rounded(query, key, queue)
    loss, _ = reference.info_nce(q, k, keys, temperature)
    assert_close("loss", actual[0], loss, 6 / temperature, tolerances(queue.dtype)[0])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", ["transposed", "columns", "rows", "expanded"])
def test_strides_are_taken_as_they_are(layout: str) -> None:
    query, key, queue = inputs((18, 100, 24))
    if layout == "transposed":
        views = [x.t().contiguous().t() for x in (query, key, queue)]
    elif layout == "columns":
        views = [x.repeat_interleave(2, 1)[:, ::2] for x in (query, key, queue)]
    elif layout == "rows":
        views = [torch.stack([x, x + 1], 1).flatten(0, 1)[::2] for x in (query, key, queue)]
    else:
        query, key, queue = (x[:1].expand(len(x), -1) for x in (query, key, queue))
        views = [query, key, queue]
    assert all(torch.equal(view, x) for view, x in zip(views, (query, key, queue)))
    check(module._launch(*views, 0.07, True), query, key, queue, 0.07)


def test_offsets_beyond_31_bits() -> None:
    query, key, queue = inputs((3, 40, 16))
    stride = 2**31 // 20
    with far_apart(39 * stride + 16, torch.float32, KERNEL_DEVICE) as memory:
        far = memory.as_strided((40, 16), (stride, 1))
        far.copy_(queue)
        check(module._launch(query, key, far, 0.07, True), query, key, queue, 0.07)
    stride = 2**30 + 64
    with far_apart(2 * stride + 16, torch.float32, KERNEL_DEVICE) as memory:
        far = memory.as_strided((3, 16), (stride, 1))
        far.copy_(query)
        check(module._launch(far, far, queue, 0.07, True), query, query, queue, 0.07)


@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_two_runs_give_the_same_bits(temperature: float) -> None:
    query, key, queue = inputs((20, 900, 32) if INTERPRETED else (256, 65536, 128))
    first = module._launch(query, key, queue, temperature, True)
    for _ in range(3):
        for one, two in zip(first, module._launch(query, key, queue, temperature, True)):
            assert torch.equal(one, two)


class _Allocations(TorchDispatchMode):
    """Sizes in bytes of all tensors made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.sizes.append(result.numel() * result.element_size())
        return result


def test_memory_does_not_grow_with_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """O(N·D + tile): a kernel writes nothing but what its launcher allocates, and that does not depend on K."""
    few_processors(monkeypatch, 4)
    monkeypatch.setattr(launch_module.Launch, "run", lambda self: None)
    samples, dimension = 24, 16
    for keys in (512, 1_048_576):
        query, key, queue = inputs((samples, 1, dimension))
        queue = queue.expand(keys, -1)
        with _Allocations() as allocations:
            module._launch(query, key, queue, 0.07, True)
        results = 4 * samples * (dimension + 2) + 8 * samples
        partials = 4 * 4 * samples * (dimension + 3)
        assert sum(allocations.sizes) == results + partials


def test_scratch_is_bounded_by_the_gpu_not_by_the_batch() -> None:
    for samples in (1, 64, 256, 4096, 100_000):
        tiles = module.choose_tiles(samples, 1_048_576, 128, torch.bfloat16, 90, 132)
        assert tiles.splits * samples <= max(132 * tiles.block_n, samples)


@pytest.mark.gpu
def test_peak_memory_on_a_gpu(cuda: torch.device) -> None:
    query, key, queue = (x.to(cuda) for x in inputs((256, 262_144, 128), torch.bfloat16))
    query.requires_grad_()
    cast_kernels.info_nce(query, key, queue, 0.07)[0].sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cast_kernels.info_nce(query, key, queue, 0.07)[0].sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 256 * 262_144 * 2 / 10


# Shards


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_partials_kernel_matches_float64(temperature: float) -> None:
    query, key, queue = inputs((20, 300, 24))
    total, weighted, maximum, beaten = module._launch(query, key, queue, temperature, False)
    q, k, keys = rounded(query, key, queue)
    truth = reference.info_nce_partials(q, k, keys, temperature)
    factor = (truth.maximum - maximum.double()).exp()
    product, weight = tolerances(queue.dtype)
    logit = product / temperature + STORED[torch.float32]
    expected = truth.total * factor
    assert_close("maximum", maximum, truth.maximum, 1.0, logit)
    assert_close("total", total, expected, expected, 2 * logit)
    assert_close("weighted", weighted, truth.weighted * factor[:, None], expected[:, None], 2 * logit + weight)
    check_beaten(beaten, q, k, keys, product)


@pytest.mark.parametrize("cuts", [[150], [0, 7, 299, 1, 1], [300, 0], [100, 100, 100]])
@pytest.mark.parametrize("temperature", [0.2, 0.07, 0.01])
def test_shards_combine_to_the_whole(temperature: float, cuts: list[int], device: torch.device) -> None:
    query, key, queue = (x.to(device) for x in inputs((9, 300, 24)))
    whole = (query.clone().requires_grad_(), key.clone().requires_grad_())
    loss, beaten = cast_kernels.info_nce(*whole, queue, temperature)
    upstream = torch.linspace(-1, 2, 9, device=device)
    loss.backward(upstream)
    sizes = [*cuts, max(300 - sum(cuts), 0)]
    shards = queue.split(sizes) if sum(sizes) == 300 else [queue[:150], queue[150:], queue[:0]]
    partials = [cast_kernels.info_nce_partials(query, key, shard, temperature) for shard in shards]
    parts = (query.clone().requires_grad_(), key.clone().requires_grad_())
    combined, beaten_of_parts = cast_kernels.info_nce_combine(*parts, partials, temperature, queue.dtype)
    combined.backward(upstream)
    assert torch.equal(beaten, beaten_of_parts)
    product, weight = tolerances(torch.float32, device)
    logit = 2 * product / temperature + 2 * STORED[torch.float32]
    assert_close("loss", combined, loss, 2.0, logit)
    for one, two in zip(parts, whole, strict=True):
        assert one.grad is not None and two.grad is not None
        assert_close("gradient", one.grad, two.grad, 4 / temperature, logit + weight)


def test_partials_of_a_fixed_maximum_plainly_add(device: torch.device) -> None:
    """What a reduce-scatter over ranks relies on."""
    query, key, queue = (x.to(device) for x in inputs((9, 300, 24)))
    partials = [cast_kernels.info_nce_partials(query, key, shard, 0.07) for shard in queue.split([100, 170, 30])]
    assert all(torch.equal(part.maximum, partials[0].maximum) for part in partials)
    added = cast_kernels.Partials(
        sum(part.total for part in partials),  # pyright: ignore[reportArgumentType]
        sum(part.weighted for part in partials),  # pyright: ignore[reportArgumentType]
        sum(part.beaten for part in partials),  # pyright: ignore[reportArgumentType]
        partials[0].maximum,
    )
    one = cast_kernels.info_nce_combine(query, key, partials, 0.07, queue.dtype)
    two = cast_kernels.info_nce_combine(query, key, [added], 0.07, queue.dtype)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_no_negatives_at_all(device: torch.device) -> None:
    for temperature in (0.07, 0.01):
        query, key = (x.to(device).requires_grad_() for x in inputs((3, 0, 8))[:2])
        queue = torch.empty(0, 8, device=device)
        loss, beaten = cast_kernels.info_nce(query, key, queue, temperature)
        assert loss.tolist() == [0, 0, 0] and beaten.tolist() == [0, 0, 0]
        partials = cast_kernels.info_nce_partials(query, key, queue, temperature)
        combined, _ = cast_kernels.info_nce_combine(query, key, [partials, partials], temperature, queue.dtype)
        for result in (loss, combined):
            gradients = torch.autograd.grad(result.sum(), (query, key))
            assert result.tolist() == [0, 0, 0]
            assert not any(gradient.any() for gradient in gradients)


# The reference itself


@pytest.mark.parametrize("temperature", [0.07, 0.005])
def test_reference_is_cross_entropy_with_label_zero(temperature: float) -> None:
    query, key, queue = (x.cpu().double() for x in inputs((7, 50, 12)))
    loss, beaten = reference.info_nce(query, key, queue, temperature)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / temperature
    truth = F.cross_entropy(logits, torch.zeros(7, dtype=torch.int64), reduction="none")
    assert_close("loss", loss, truth, 1 / temperature, 1e-14)
    rank = logits.argsort(1, descending=True).argmin(1)
    assert torch.equal(beaten, rank)


@pytest.mark.parametrize("temperature", [0.07, 0.02])
def test_formulas_of_the_reference_are_its_autograd(temperature: float) -> None:
    query, key, queue = (x.cpu().double() for x in inputs((7, 50, 12)))
    query.requires_grad_()
    loss, _ = reference.info_nce(query, key, queue, temperature)
    (gradient,) = torch.autograd.grad(loss.sum(), query)
    partials = reference.info_nce_partials(query, key, queue, temperature)
    terms = reference.info_nce_terms(query.detach(), key, partials, temperature, torch.float64)
    assert_close("loss", terms.loss, loss, 1 / temperature, 1e-14)
    assert_close("gradient", terms.query_gradient, gradient, 1 / temperature**2, 1e-14)


# The operator


@pytest.mark.parametrize("function", ["info_nce", "info_nce_combine"])
@pytest.mark.parametrize("temperature", [0.2, 0.02])
def test_gradcheck(temperature: float, function: str) -> None:
    query, key, queue = (x.cpu().double() for x in inputs((3, 20, 6)))
    arguments = (query.requires_grad_(), key.requires_grad_())

    def loss(q: Tensor, k: Tensor) -> Tensor:
        if function == "info_nce":
            return cast_kernels.info_nce(q, k, queue, temperature)[0]
        parts = [cast_kernels.info_nce_partials(q, k, shard, temperature) for shard in queue.split(7)]
        return cast_kernels.info_nce_combine(q, k, parts, temperature, torch.float64)[0]

    assert torch.autograd.gradcheck(loss, arguments, eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("upstream", ["one", "scaled", "expanded"])
@pytest.mark.parametrize("dtype", CASE_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("temperature", [0.07, 0.02])
def test_gradients_match_float64(temperature: float, dtype: torch.dtype, upstream: str, device: torch.device) -> None:
    query, key, queue = (x.to(device) for x in inputs((12, 200, 48), dtype))
    arguments = (query.clone().requires_grad_(), key.to(dtype).requires_grad_())
    q, k, keys = rounded(query, key, queue)
    truths = (q.requires_grad_(), k.requires_grad_())
    incoming = {
        "one": torch.ones(12, device=device),
        "scaled": torch.linspace(-3e3, 1e4, 12, device=device),
        "expanded": torch.tensor(0.5, device=device).expand(12),
    }[upstream]
    queue.requires_grad_()
    loss, beaten = cast_kernels.info_nce(*arguments, queue, temperature)
    loss.backward(incoming)
    true_loss, _ = reference.info_nce(*truths, keys, temperature)
    true_loss.backward(incoming.double())
    assert not beaten.requires_grad and beaten.dtype == torch.int64
    assert queue.grad is None
    product, weight = tolerances(dtype, device)
    logit = 2 * product / temperature + 2 * STORED[torch.float32]
    assert_close("loss", loss, true_loss, 1.0, logit)
    scale = incoming.double().abs()[:, None] * 2 / temperature
    for name, got, truth in zip(("query", "key"), arguments, truths, strict=True):
        assert got.grad is not None and truth.grad is not None
        assert got.grad.dtype == got.dtype
        assert_close(name, got.grad, truth.grad, scale, logit + weight + STORED[got.dtype])


def test_only_the_wanted_gradients_are_made(device: torch.device) -> None:
    for wanted in range(2):
        query, key, queue = (x.to(device) for x in inputs((4, 50, 16)))
        (query, key)[wanted].requires_grad_()
        cast_kernels.info_nce(query, key, queue, 0.07)[0].sum().backward()
        assert [query.grad is not None, key.grad is not None] == [wanted == 0, wanted == 1]


def test_backward_keeps_nothing_of_the_size_of_the_queue(device: torch.device) -> None:
    query, key, queue = (x.to(device) for x in inputs((4, 2000, 16)))
    query.requires_grad_()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cast_kernels.info_nce(query, key, queue, 0.07)
    assert kept
    assert max(kept) <= query.numel()


def test_second_derivative_is_refused(device: torch.device) -> None:
    query, key, queue = (x.to(device) for x in inputs((4, 50, 16)))
    query.requires_grad_()
    loss, _ = cast_kernels.info_nce(query, key, queue, 0.07)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(loss.sum(), query, create_graph=True)


def test_autocast_does_not_lower_the_precision(device: torch.device) -> None:
    query, key, queue = (x.to(device) for x in inputs((4, 50, 16)))
    plain = cast_kernels.info_nce(query, key, queue, 0.07)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = cast_kernels.info_nce(query, key, queue, 0.07)
        partials = cast_kernels.info_nce_partials(query, key, queue, 0.07)
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(partials.total, cast_kernels.info_nce_partials(query, key, queue, 0.07).total)


def test_opcheck(device: torch.device) -> None:
    query, key, queue = (x.to(device) for x in inputs((5, 40, 16)))
    operators = torch.ops.cast_kernels
    torch.library.opcheck(operators.info_nce_partials.default, (query, key, queue, 0.07))
    wanting = (query.clone().requires_grad_(), key.clone().requires_grad_())
    torch.library.opcheck(operators.info_nce.default, (*wanting, queue, 0.07))
    torch.library.opcheck(
        operators.info_nce.default, (query, key, queue.double() if device.type == "cpu" else queue, 0.01)
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph(dynamic: bool, device: torch.device) -> None:
    def step(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        loss, beaten = cast_kernels.info_nce(query, key, queue, 0.07)
        partials = [cast_kernels.info_nce_partials(query, key, part, 0.07) for part in (queue[:20], queue[20:])]
        combined, _ = cast_kernels.info_nce_combine(query, key, partials, 0.07, queue.dtype)
        return (loss + combined).sum() + beaten.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for samples in (3, 6) if dynamic else (3,):
        query, key, queue = (x.to(device) for x in inputs((samples, 50, 16)))
        eager, traced = ((query.clone().requires_grad_(), key.clone().requires_grad_()) for _ in range(2))
        first, second = step(*eager, queue), compiled(*traced, queue)
        first.backward()
        second.backward()
        assert_close("loss", second, first, 100.0, STORED[torch.float32])
        for one, two in zip(eager, traced):
            assert one.grad is not None and two.grad is not None
            assert_close("gradient", two.grad, one.grad, 400.0, STORED[torch.float32])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(3)}, r"query: got 1 dimensions, expected 2: \(N, D\)"),
        ({"query": torch.zeros(3, 513)}, "query: got D = 513, expected 1 to 512"),
        ({"query": torch.zeros(3, 0)}, "query: got D = 0, expected 1 to 512"),
        ({"key": torch.zeros(4, 8)}, r"key: got shape \(4, 8\), expected \(N, D\) = \(3, 8\)"),
        ({"queue": torch.zeros(9, 7)}, r"queue: got shape \(9, 7\), expected \(K, D\) with D = 8"),
        ({"queue": torch.zeros(9)}, r"queue: got shape \(9,\), expected \(K, D\)"),
        ({"queue": torch.zeros(9, 8, dtype=torch.int8)}, r"queue: got dtype torch\.int8 on cpu"),
        ({"key": torch.zeros(3, 8, device="meta")}, "key: got device meta, expected cpu"),
        ({"temperature": 0.0}, r"temperature: got 0\.0, expected a finite number above 0"),
        ({"temperature": -0.07}, r"temperature: got -0\.07, expected"),
        ({"temperature": float("nan")}, "temperature: got nan, expected"),
        ({"temperature": float("inf")}, "temperature: got inf, expected"),
    ],
)
def test_a_callers_mistake_is_a_value_error(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"query": torch.zeros(3, 8), "key": torch.zeros(3, 8), "queue": torch.zeros(9, 8)}
    arguments = {**good, "temperature": 0.07, **change}
    for function in (cast_kernels.info_nce, cast_kernels.info_nce_partials):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


def test_combine_checks_its_arguments() -> None:
    query, key, queue = inputs((3, 20, 8))
    partials = cast_kernels.info_nce_partials(query, key, queue, 0.07)
    with pytest.raises(ValueError, match="partials: got none"):
        cast_kernels.info_nce_combine(query, key, [], 0.07, queue.dtype)
    with pytest.raises(ValueError, match=r"partials\.weighted: got shape \(3, 8\), expected \(N, D\) = \(2, 8\)"):
        cast_kernels.info_nce_combine(query[:2], key[:2], [partials], 0.07, queue.dtype)
    with pytest.raises(ValueError, match="temperature: got 0, expected"):
        cast_kernels.info_nce_combine(query, key, [partials], 0, queue.dtype)
