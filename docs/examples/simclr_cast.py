"""CAST on top of SimCLR, in a plain PyTorch training loop with an encoder of your own.

    python docs/examples/simclr_cast.py --images DIR --saliency DIR

What CAST adds to a contrastive method is marked (1) to (4); the rest is SimCLR (T. Chen et al., ICML 2020) with little
augmentation. The attention loss needs activations that are averaged over space before the head, nothing else.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms.functional import normalize, resized_crop, to_tensor

from cast_fast.data.layout import scan, usable
from cast_fast.data.saliency_crop import crop_windows
from cast_fast.data.sampling import draw
from cast_fast.objective import attention_loss, gradcam_weights

parser = argparse.ArgumentParser()
parser.add_argument("--images", type=Path, required=True)
parser.add_argument("--saliency", type=Path, required=True)
parser.add_argument("--arch", default="resnet50")
for name, default in (("size", 224), ("batch", 64), ("steps", 1000)):
    parser.add_argument(f"--{name}", type=int, default=default)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"


class Pairs(torch.utils.data.Dataset):
    """Two crops of a picture with their saliency maps, which hold the same salient object; every epoch is shuffled."""

    def __init__(self):
        self.samples = usable(scan(args.images, args.saliency), skip_invalid=True, on_empty_saliency="skip").samples
        self.order = torch.cat([torch.randperm(len(self.samples)) for _ in range(0, len(self), len(self.samples))])

    def __len__(self):
        return args.steps * args.batch

    def __getitem__(self, position):
        sample = self.samples[self.order[position]]
        image = to_tensor(Image.open(sample.image).convert("RGB"))
        saliency = np.asarray(Image.open(sample.saliency))
        windows = crop_windows(saliency, draw(0, np.array([position])).windows[0])  # (1) crops that show the object
        views, maps = [], []
        for y0, x0, y1, x1 in windows.relative(*saliency.shape).tolist():
            for full, crops in ((image, views), (torch.from_numpy(saliency > 127)[None].float(), maps)):
                height, width = full.shape[1:]
                top, left = round(y0 * height), round(x0 * width)
                box = top, left, max(1, round(y1 * height) - top), max(1, round(x1 * width) - left)
                crops.append(resized_crop(full, *box, [args.size, args.size], antialias=True))
            if torch.rand(()) < 0.5:
                views[-1], maps[-1] = views[-1].flip(2), maps[-1].flip(2)
            views[-1] = normalize(views[-1], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        return torch.stack(views), torch.cat(maps)


torch.manual_seed(0)
network = torchvision.models.get_model(args.arch)
width = network.fc.in_features
trunk = nn.Sequential(*list(network.children())[:-2]).to(device)  # everything before pooling
head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128)).to(device)
optimizer = torch.optim.SGD([*trunk.parameters(), *head.parameters()], lr=0.03, momentum=0.9, weight_decay=1e-4)


def encode(images):
    """Everything that the attention loss asks for: activations, pooled features, projection, embedding."""
    activations = trunk(images)
    pooled = activations.mean(dim=(2, 3))
    projection = head(pooled)
    return activations, pooled, projection, F.normalize(projection, dim=1)


def nt_xent(first, second, temperature=0.2):
    """SimCLR's loss: each of the 2N views has its sister as the positive and all others as negatives."""
    both = torch.cat([first, second])
    logits = (both @ both.T / temperature).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(both), device=device).roll(len(first)))


for step, (views, maps) in enumerate(torch.utils.data.DataLoader(Pairs(), args.batch, drop_last=True)):
    views, maps = views.to(device), maps.to(device)
    activations, pooled, projection, embedding = encode(views.flatten(0, 1))
    contrastive = nt_xent(embedding[::2], embedding[1::2])
    with torch.no_grad():  # (2) the second view with all but the object blanked, embedded without gradient
        target = encode(views[:, 1] * (maps[:, 1:] > 0.5))[3]
    alpha = gradcam_weights(head, pooled[::2], projection[::2], embedding[::2], target)  # (3) Grad-CAM
    saliency = F.adaptive_avg_pool2d(maps[:, :1], activations.shape[2:])[:, 0]
    attention = attention_loss(activations[::2], alpha, saliency).loss.mean()
    loss = contrastive + 3.0 * attention  # (4) look there
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: contrastive {contrastive.item():.3f}, attention {attention.item():.3f}", flush=True)
