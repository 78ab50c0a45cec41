"""The closed form is the plain formulation: same loss, same map, same gradient of every parameter."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_encoder import CHANNELS, STRIDE, tiny_encoder
from torch import Tensor, nn

from cast_fast.encoder import Encoder, LinearHead, MLPHead, build_encoder, cam_grid
from cast_fast.objective import (
    Losses,
    Objective,
    attention_loss,
    contrastive_attention_loss,
    cosine_loss,
    gradcam_map,
    gradcam_weights,
    info_nce,
    weighted_mean,
)
from cast_kernels import reference

DIM = 16
TEMPERATURE = 0.2


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def units(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(rand(*shape, seed=seed), dim=1).to(dtype)


class Inputs:
    """Crops, keys, queue and saliency for one encoder."""

    def __init__(self, encoder: Encoder, size: int, count: int = 3, dim: int = DIM) -> None:
        self.images = rand(count, 3, size, size, seed=1)
        self.saliency = rand(count, *cam_grid(encoder, size), seed=2).sigmoid()
        self.key, self.masked_key, self.queue = (
            units(rows, dim, seed=seed) for rows, seed in ((count, 3), (count, 4), (40, 5))
        )

    def plain(self, encoder: Encoder, lam: float = 3.0, weight: Tensor | None = None) -> reference.StepLosses:
        dtype = next(encoder.parameters()).dtype
        images, key, masked_key, queue, saliency = (
            value.to(dtype) for value in (self.images, self.key, self.masked_key, self.queue, self.saliency)
        )
        return reference.plain_cast_objective(
            encoder.trunk,
            encoder.head,
            images,
            key,
            masked_key,
            queue,
            saliency,
            temperature=TEMPERATURE,
            lam=lam,
            weight=weight,
        )

    def closed(self, encoder: Encoder, lam: float = 3.0, weight: Tensor | None = None, kernels: bool = False) -> Losses:
        dtype = next(encoder.parameters()).dtype
        return contrastive_attention_loss(
            encoder(self.images.to(dtype)),
            encoder.head,
            self.key.to(dtype),
            self.queue.to(dtype),
            Objective(lam=lam, temperature=TEMPERATURE),
            masked_key=self.masked_key.to(dtype),
            saliency=self.saliency.to(dtype),
            attention_weight=weight,
            kernels=kernels,
        )


def assert_same_gradients(encoder: nn.Module, twin: nn.Module, tolerance: float) -> None:
    """Relative to each parameter's gradient; those that vanish (a bias before BatchNorm) relative to the largest."""
    expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
    floor = 1e-6 * max(float(gradient.norm()) for gradient in expected.values() if gradient is not None)
    for name, parameter in encoder.named_parameters():
        gradient = expected[name]
        assert parameter.grad is not None and gradient is not None, name
        error = float((parameter.grad - gradient).norm()) / max(float(gradient.norm()), floor)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def assert_closed_form_is_plain(encoder: Encoder, size: int, weight: Tensor | None = None, dim: int = DIM) -> None:
    twin = copy.deepcopy(encoder)
    inputs = Inputs(encoder, size, dim=dim)
    plain, closed = inputs.plain(twin, weight=weight), inputs.closed(encoder, weight=weight)
    assert closed.cam is not None
    for value, expected in (
        (closed.loss, plain.loss),
        (closed.loss_moco, plain.contrastive),
        (closed.loss_cast, plain.attention),
        (closed.cam, plain.cam),
    ):
        assert float((value - expected).detach().norm()) < 1e-9 * float(expected.detach().norm())
    assert float(plain.cam.detach().amax((1, 2)).min()) > 0  # a map of zeros would prove nothing
    plain.loss.backward()
    closed.loss.backward()
    assert_same_gradients(encoder, twin, 1e-9)
    # Both leave the same BatchNorm statistics: the closed form evaluates nothing twice that it should not.
    for (name, buffer), other in zip(encoder.named_buffers(), twin.buffers()):
        torch.testing.assert_close(buffer, other, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(("arch", "size"), [("resnet18", 96), ("resnet50", 64)])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_closed_form_is_the_plain_formulation(arch: str, size: int, head: str) -> None:
    torch.manual_seed(0)
    assert_closed_form_is_plain(build_encoder(arch, DIM, head).double(), size)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_loss_and_map_in_float32(head: str) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", DIM, head)
    inputs = Inputs(encoder, 64)
    closed, exact = inputs.closed(encoder), inputs.plain(copy.deepcopy(encoder).double())
    assert closed.cam is not None and closed.loss.dtype == torch.float32
    for value, expected in (
        (closed.loss, exact.loss),
        (closed.loss_cast, exact.attention),
        (closed.cam, exact.cam),
    ):
        assert float((value - expected).detach().norm()) < 1e-4 * float(expected.detach().norm())


@pytest.mark.parametrize("head", ["gelu", "batchnorm"])
def test_heads_without_a_pullback(head: str) -> None:
    torch.manual_seed(0)
    middle = nn.GELU() if head == "gelu" else nn.Sequential(nn.BatchNorm1d(12), nn.ReLU())
    own = nn.Sequential(nn.Linear(CHANNELS, 12), middle, nn.Linear(12, DIM))
    assert_closed_form_is_plain(tiny_encoder(head=own).double(), 3 * STRIDE)


def test_batchnorm_head_leaves_samples_without_weight_out() -> None:
    torch.manual_seed(0)
    own = nn.Sequential(nn.Linear(CHANNELS, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, DIM))
    weight = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    encoder = tiny_encoder(head=own).double()
    twin = copy.deepcopy(encoder)
    inputs = Inputs(encoder, 3 * STRIDE)
    plain, closed = inputs.plain(twin, weight=weight), inputs.closed(encoder, weight=weight)
    assert abs(float((closed.loss - plain.loss).detach())) < 1e-12
    plain.loss.backward()
    closed.loss.backward()
    assert_same_gradients(encoder, twin, 1e-9)


def test_dropout_head_with_the_pullback_of_one_evaluation() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(CHANNELS, DIM)).double()
    activations = rand(3, CHANNELS, 2, 2, seed=1).requires_grad_()
    pooled = activations.mean((2, 3))
    evaluated = torch.func.vjp(head, pooled)
    projection, pull = evaluated[0], evaluated[1]
    embedding = F.normalize(projection, dim=1)
    masked_key = units(3, DIM, seed=2)
    (gradient,) = torch.autograd.grad((embedding * masked_key).sum(), activations, retain_graph=True)
    alpha = gradcam_weights(
        head, pooled, projection, embedding, masked_key, cells=4, pullback=lambda vector: pull(vector)[0]
    )
    torch.testing.assert_close(alpha, gradient.mean((2, 3)))


def test_kernels_give_the_same(device: torch.device) -> None:
    encoder = tiny_encoder(DIM).to(device)
    inputs = Inputs(encoder, 3 * STRIDE)
    for name in ("images", "key", "masked_key", "queue", "saliency"):
        setattr(inputs, name, getattr(inputs, name).to(device))
    twin = copy.deepcopy(encoder)
    weight = torch.tensor([1.0, 0.0, 0.5], device=device)
    fused, torched = inputs.closed(encoder, weight=weight, kernels=True), inputs.closed(twin, weight=weight)
    for name, value in fused._asdict().items():
        torch.testing.assert_close(value, getattr(torched, name), rtol=1e-4, atol=1e-5, check_dtype=False, msg=name)
    fused.loss.backward()
    torched.loss.backward()
    assert_same_gradients(encoder, twin, 1e-2)


def activations_and_head(count: int = 4) -> tuple[Tensor, LinearHead, Tensor]:
    torch.manual_seed(0)
    return rand(count, 6, 3, 3, seed=1).requires_grad_(), LinearHead(6, DIM).double(), units(count, DIM, seed=3)


def attention_of(
    activations: Tensor,
    head: nn.Module,
    masked_key: Tensor,
    saliency: Tensor,
    weight: Tensor | None,
    objective: Objective = Objective(),  # noqa: B008 - frozen
) -> Losses:
    encoder = Encoder(nn.Identity(), head)
    return contrastive_attention_loss(
        encoder(activations),
        head,
        units(len(activations), DIM, seed=4),
        units(9, DIM, seed=5),
        objective,
        masked_key=masked_key,
        saliency=saliency,
        attention_weight=weight,
    )


def test_a_sample_of_weight_zero_contributes_nothing() -> None:
    activations, head, masked_key = activations_and_head()
    saliency = rand(4, 3, 3, seed=6).sigmoid()
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    spoiled_key, spoiled_saliency = masked_key.clone(), saliency.clone()
    spoiled_key[1], spoiled_saliency[3] = torch.nan, torch.inf
    losses = attention_of(activations, head, spoiled_key, spoiled_saliency, weight)
    (gradient,) = torch.autograd.grad(losses.loss, activations)
    clean = attention_of(activations, head, masked_key, saliency, weight)
    (expected,) = torch.autograd.grad(clean.loss, activations)
    assert torch.equal(gradient, expected)
    alone = attention_of(activations[[0, 2]], head, masked_key[[0, 2]], saliency[[0, 2]], weight[[0, 2]])
    torch.testing.assert_close(losses.loss_cast, alone.loss_cast)
    assert losses.cast_samples == 3
    # What is left at the samples without weight is InfoNCE's gradient, to the bit.
    (moco_only,) = torch.autograd.grad(
        attention_of(activations, head, masked_key, saliency, weight, Objective(attention=False)).loss, activations
    )
    total = attention_of(activations, head, spoiled_key, spoiled_saliency, weight, Objective(loss_combination="sum"))
    (summed,) = torch.autograd.grad(total.loss, activations)
    assert torch.equal(summed[[1, 3]], moco_only[[1, 3]])
    assert not torch.allclose(summed[[0, 2]], moco_only[[0, 2]])


def test_all_weights_zero() -> None:
    activations, head, masked_key = activations_and_head()
    losses = attention_of(activations, head, masked_key, torch.ones(4, 3, 3).double(), torch.zeros(4).double())
    assert losses.loss_cast == 0
    assert losses.cast_samples == 0
    assert losses.zero_cam == 0
    torch.testing.assert_close(losses.loss.detach(), losses.loss_moco / 4)
    (gradient,) = torch.autograd.grad(losses.loss, activations)
    assert gradient.isfinite().all()


def test_weights_apply_to_both_losses() -> None:
    activations, head, masked_key = activations_and_head()
    saliency = rand(4, 3, 3, seed=6).sigmoid()
    encoder = Encoder(nn.Identity(), head)
    key, queue = units(4, DIM, seed=4), units(9, DIM, seed=5)
    weight = torch.tensor([0.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    kept = [1, 3]
    losses, alone = (
        contrastive_attention_loss(
            encoder(activations[rows]),
            head,
            key[rows],
            queue,
            Objective(),
            masked_key=masked_key[rows],
            saliency=saliency[rows],
            weight=weight[rows],
        )
        for rows in (slice(None), kept)
    )
    torch.testing.assert_close(losses.loss, alone.loss)
    torch.testing.assert_close(losses.loss_cast, alone.loss_cast)
    per_sample, _ = info_nce(encoder(activations).embedding, key, queue, Objective().temperature)
    torch.testing.assert_close(losses.loss_moco, (per_sample[1] + 3 * per_sample[3]).detach() / 4)


def test_a_map_of_zeros_has_loss_one_no_gradient_and_is_counted() -> None:
    activations = rand(3, 5, 2, 2, seed=1).abs().requires_grad_()
    alpha = rand(3, 5, seed=2).abs()
    alpha[1] *= -1  # all evidence is against: the ReLU leaves nothing
    alpha.requires_grad_()
    losses, cam = attention_loss(activations, alpha, torch.ones(3, 2, 2).double())
    assert losses[1] == 1 and cam[1].abs().max() == 0
    assert losses[0] < 1 and losses[2] < 1
    losses.sum().backward()
    assert activations.grad is not None and alpha.grad is not None
    assert not activations.grad[1].any() and not alpha.grad[1].any()
    assert activations.grad[0].any() and activations.grad.isfinite().all()

    negative = (-rand(4, 6, 3, 3, seed=1).abs()).requires_grad_()
    head = LinearHead(6, DIM).double()
    embedding = Encoder(nn.Identity(), head)(negative).embedding.detach()
    with torch.no_grad():
        head.fc.weight.copy_(rand(DIM, 6, seed=7))
    losses_all = attention_of(negative, head, embedding, torch.ones(4, 3, 3).double(), None)
    assert losses_all.cam is not None
    assert losses_all.zero_cam == (losses_all.cam.amax((1, 2)) == 0).sum()


def test_empty_saliency_has_loss_one_and_no_gradient() -> None:
    activations = rand(2, 5, 2, 2, seed=1).abs().requires_grad_()
    saliency = torch.ones(2, 2, 2).double()
    saliency[0] = 0
    losses, _ = attention_loss(activations, rand(2, 5, seed=2).abs(), saliency)
    assert losses[0] == 1
    (gradient,) = torch.autograd.grad(losses.sum(), activations)
    assert not gradient[0].any() and gradient[1].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_cosine_does_not_depend_on_magnitudes(scale: float) -> None:
    cam, saliency = (rand(3, 4, 4, seed=seed, dtype=torch.float32).abs() for seed in (1, 2))
    exact = cam.double().requires_grad_()
    expected = 1 - F.cosine_similarity(exact.flatten(1), saliency.double().flatten(1))
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    scaled = (cam * scale).requires_grad_()
    losses = cosine_loss(scaled, saliency / scale)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    (own,) = torch.autograd.grad(losses.sum(), scaled)
    torch.testing.assert_close(own.double() * scale, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_cosine_does_not_hide_what_is_not_finite(value: float) -> None:
    cam = torch.ones(3, 2, 2)
    spoiled = cam.clone()
    spoiled[1, 0, 0] = value
    for losses in (cosine_loss(spoiled, cam), cosine_loss(cam, spoiled)):
        assert losses.isfinite().tolist() == [True, False, True]


def test_map_is_weighted_sum_of_channels() -> None:
    activations, alpha = rand(2, 5, 3, 4, seed=1), rand(2, 5, seed=2)
    torch.testing.assert_close(gradcam_map(activations, alpha), torch.einsum("nchw,nc->nhw", activations, alpha).relu())


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_info_nce(temperature: float) -> None:
    query, key, queue = units(6, DIM, seed=1).requires_grad_(), units(6, DIM, seed=2), units(30, DIM, seed=3)
    key = F.normalize(key + 2 * query.detach() * torch.linspace(0, 1, 6, dtype=torch.float64)[:, None], dim=1)
    loss, beaten = info_nce(query, key, queue, temperature)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / temperature
    expected = F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(loss, expected)
    assert torch.equal(beaten, (logits[:, 1:] > logits[:, :1]).sum(1))
    assert 0 < int((beaten == 0).sum()) < 6
    (own,) = torch.autograd.grad(loss.sum(), query, retain_graph=True)
    (gradient,) = torch.autograd.grad(expected.sum(), query)
    torch.testing.assert_close(own, gradient)


def test_info_nce_is_accurate_where_the_loss_is_tiny() -> None:
    query = units(1, DIM, seed=1, dtype=torch.float32)
    queue = -query.expand(8, DIM)
    loss, _ = info_nce(query, query, queue, 0.07)
    torch.testing.assert_close(loss.double(), 8 * torch.exp(torch.tensor([-2 / 0.07]).double()), rtol=1e-4, atol=0)


def test_keys_take_no_gradient() -> None:
    activations, head, masked_key = activations_and_head()
    masked_key.requires_grad_()
    key = units(4, DIM, seed=4).requires_grad_()
    output = Encoder(nn.Identity(), head)(activations)
    losses = contrastive_attention_loss(
        output, head, key, units(9, DIM, seed=5), Objective(), masked_key=masked_key, saliency=torch.ones(4, 3, 3)
    )
    losses.loss.backward()
    assert masked_key.grad is None and key.grad is None and activations.grad is not None


def test_combinations_and_moco_alone() -> None:
    moco, cast = torch.tensor(2.0), torch.tensor(0.5)
    assert Objective(lam=3, loss_combination="average").combine(moco, cast) == (2 + 1.5) / 4
    assert Objective(lam=3, loss_combination="sum").combine(moco, cast) == 3.5
    activations, head, _ = activations_and_head()
    output = Encoder(nn.Identity(), head)(activations)
    losses = contrastive_attention_loss(
        output, head, units(4, DIM, seed=4), units(9, DIM, seed=5), Objective(attention=False)
    )
    assert losses.loss == losses.loss_moco
    assert losses.cam is None and losses.loss_cast == 0 and losses.cast_samples == 0


def test_weighted_mean() -> None:
    values = torch.tensor([1.0, torch.nan, 4.0])
    assert weighted_mean(values, torch.tensor([1.0, 0.0, 0.5])) == 2.0
    assert weighted_mean(values, torch.zeros(3)) == 0
    assert weighted_mean(values[[0, 2]], None) == 2.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": -1.0}, "lam: got -1.0"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"loss_combination": "product"}, "loss_combination: got 'product'"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**settings)


def test_shapes_that_do_not_fit() -> None:
    activations, head, masked_key = activations_and_head()
    with pytest.raises(ValueError, match=r"saliency: got shape \(4, 3, 2\), expected \(4, 3, 3\)"):
        attention_of(activations, head, masked_key, torch.ones(4, 3, 2), None)
    with pytest.raises(ValueError, match=r"alpha: got shape \(4, 5\), expected \(4, 6\)"):
        attention_loss(activations, torch.ones(4, 5), torch.ones(4, 3, 3))
    with pytest.raises(ValueError, match="needs masked_key and saliency"):
        contrastive_attention_loss(
            Encoder(nn.Identity(), head)(activations), head, masked_key, units(9, DIM, seed=5), Objective()
        )


def test_mlp_head_is_used_by_its_pullback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closed form of a head that has one must not run the head a second time through ``torch.func.vjp``."""
    encoder = tiny_encoder(DIM, "mlp").double()
    assert isinstance(encoder.head, MLPHead)

    def refuse(*arguments: object) -> None:
        raise AssertionError("vjp of a head with a pull-back")

    monkeypatch.setattr(torch.func, "vjp", refuse)
    assert Inputs(encoder, 2 * STRIDE).closed(encoder).loss.isfinite()


def test_published_formulation_keeps_its_quirks() -> None:
    query, key = tiny_encoder(DIM).double(), tiny_encoder(DIM, seed=1).double()
    before = [parameter.clone() for parameter in key.parameters()]
    first, second, third = (rand(4, 3, 3 * STRIDE, 3 * STRIDE, seed=seed) for seed in range(3))
    saliency = rand(4, 3, 3, seed=3).sigmoid()
    queue = units(40, DIM, seed=5)
    losses = reference.published_step_losses(
        query, key, queue, first, second, third, saliency, temperature=TEMPERATURE, lam=3.0, momentum=0.9
    )
    # The momentum update ran twice, the query encoder too.
    for parameter, old, target in zip(key.parameters(), before, query.parameters()):
        torch.testing.assert_close(parameter, 0.81 * old + 0.19 * target)
    assert all(counter == 2 for name, counter in query.named_buffers() if name.endswith("num_batches_tracked"))
    # Each map spans [0, 1], negative evidence included, and there is one cosine for the whole batch.
    torch.testing.assert_close(losses.cam.amin((1, 2)), torch.zeros(4).double())
    torch.testing.assert_close(losses.cam.amax((1, 2)), torch.ones(4).double(), atol=1e-3, rtol=0)
    cosine = F.cosine_similarity(losses.cam.flatten(), saliency.flatten(), dim=0)
    torch.testing.assert_close(losses.attention, 1 - cosine)
    embedding = query(first).embedding
    expected, _ = reference.info_nce(embedding, losses.keys, queue, TEMPERATURE)
    torch.testing.assert_close(losses.contrastive, expected.mean())
    torch.testing.assert_close(losses.loss, (losses.contrastive + 3 * losses.attention) / 4)
    # Its gradient is of second order: the weights of the attention loss are not constants.
    (gradient,) = torch.autograd.grad(losses.attention, [*query.head.parameters()][:1])
    assert gradient.norm() > 0
