"""``cast-fast validate``: decodes every file of a dataset, or compares shards with their hashes: the faults."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from cast_fast.data import shards
from cast_fast.data.layout import scan, write_faults
from cast_fast.errors import UserError
from cast_fast.files import shown

HELP = "decode every image and map of a dataset and list the faults"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``cast-fast validate``."""
    parser.add_argument("--images", type=Path, help="folder of images")
    parser.add_argument("--saliency", type=Path, help="folder of saliency maps; absent for images alone")
    parser.add_argument("--data", type=Path, metavar="SHARDS", help="folder of shards, instead of the two")
    parser.add_argument("--labels", type=Path, help="CSV file stem,class")
    parser.add_argument("--out", type=Path, metavar="LIST", help="write the faults here, one JSON object a line")
    parser.add_argument("--workers", type=int, help="decoding processes; one for each CPU when absent")
    parser.add_argument("--manifest", type=Path, help="cache of what is known of each file; in ~/.cache when absent")


def main(args: argparse.Namespace) -> int:
    """Runs ``cast-fast validate``; returns 0 for a clean dataset, 1 for one with faults or empty maps."""
    if (args.data is None) == (args.images is None) or (args.data is not None and args.saliency is not None):
        raise UserError("expected one dataset: --images DIR (with --saliency DIR), or --data SHARDS")
    if args.data is not None:
        dataset = shards.scan_shards(args.data, labels=args.labels)
        faults = (*shards.verify(args.data), *dataset.empty_maps())
        print(f"{len(dataset)} pairs in shards, which were decoded when they were packed; contents compared by SHA-256")
    else:
        dataset = scan(
            args.images,
            args.saliency,
            labels=args.labels,
            workers=args.workers,
            manifest=args.manifest,
            progress=True,
        )
        faults = dataset.faults + dataset.empty_maps()
        noun = "images" if args.saliency is None else "pairs"
        print(f"{len(dataset)} intact {noun}, {dataset.decoded} files decoded now")
    if dataset.samples:
        short = [min(sample.width, sample.height) for sample in dataset.samples]
        print(f"shorter side: {min(short)} to {max(short)} pixels, median {sorted(short)[len(short) // 2]}")
    if args.labels is not None:
        classes = Counter(sample.label for sample in dataset.samples if sample.label is not None)
        print(f"{classes.total()} with a label, {len(classes)} classes")
    for kind, count in sorted(Counter(fault.kind for fault in faults).items()):
        first = next(fault for fault in faults if fault.kind == kind)
        print(f"{kind}: {count}, for example {first}")
    if args.out is not None:
        write_faults(args.out, faults)
        print(f"{len(faults)} faults listed in {shown(args.out)}")
    return 1 if faults else 0
