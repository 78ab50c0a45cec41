"""CAST on top of a MoCo v2 training loop like the one you may already have.

    python docs/examples/moco_v2_cast.py --images DIR --saliency DIR

The loop is MoCo v2 (X. Chen et al., 2020) on one device. What CAST adds is marked (1) to (3): a masked key, its forward
pass, and one call that returns both losses. `DaliLoader` delivers uint8 crops with their maps; any loader that does so
will serve. `cast_fast.step.TrainStep` is this loop's body, compiled and guarded against non-finite gradients.
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F

from cast_fast.config import PRESETS, PretrainConfig
from cast_fast.data.dali_loader import Augmentation, DaliLoader
from cast_fast.data.layout import scan, usable
from cast_fast.data.saliency_crop import CropRule
from cast_fast.encoder import build_encoder, cam_grid
from cast_fast.objective import Objective, contrastive_attention_loss

parser = argparse.ArgumentParser()
parser.add_argument("--images", type=Path, required=True)
parser.add_argument("--saliency", type=Path, required=True)
parser.add_argument("--arch", default="resnet50")
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--batch", type=int, default=256)
parser.add_argument("--queue-size", type=int, default=65_536)
parser.add_argument("--steps", type=int, default=1000)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

torch.manual_seed(0)
encoder_q = build_encoder(args.arch, dim=128, head="mlp").to(device)
encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)
queue = F.normalize(torch.randn(args.queue_size, 128, device=device), dim=1)
pointer = 0
optimizer = torch.optim.SGD(encoder_q.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
objective = Objective(lam=3.0, temperature=0.2, loss_combination="sum")
mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
std = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)

dataset = usable(scan(args.images, args.saliency), skip_invalid=True, on_empty_saliency="skip")
loader = DaliLoader(
    dataset,
    batch=args.batch,
    size=args.size,
    cam_grid=cam_grid(encoder_q, args.size),
    augmentation=Augmentation.from_config(PretrainConfig(**PRESETS["cast-v2"])),
    rule=CropRule(),  # both crops of a pair hold the same salient object
    constrained=True,
    attention=True,
    seed=0,
    device=device,
    threads=4,
)


@torch.no_grad()
def embed_keys(images):
    """MoCo's keys; over several GPUs, shuffle the batch here."""
    return encoder_k(images).embedding


for step in range(args.steps):
    batch = next(loader)
    query, key = ((crops.float() / 255 - mean) / std for crops in (batch.query, batch.key))
    masked = key * batch.key_mask[:, None]  # (1) zero is the mean colour
    k = embed_keys(key)
    km = embed_keys(masked)  # (2)
    losses = contrastive_attention_loss(  # (3) InfoNCE and the attention loss from one forward pass of the query
        encoder_q(query),
        encoder_q.head,
        k,
        queue,
        objective,
        masked_key=km,
        saliency=batch.query_saliency,
        attention_weight=batch.weight,
    )
    optimizer.zero_grad()
    losses.loss.backward()
    optimizer.step()
    with torch.no_grad():
        for slow, fast in zip(encoder_k.parameters(), encoder_q.parameters()):
            slow.lerp_(fast, 0.001)
        place = (pointer + torch.arange(len(k), device=device)) % len(queue)
        queue[place] = k
        pointer = (pointer + len(k)) % len(queue)
    moco, attention = losses.loss_moco.item(), losses.loss_cast.item()
    print(f"step {step}: contrastive {moco:.3f}, attention {attention:.3f}", flush=True)
loader.close()
