"""Configuration: flags, presets, checks that name the flag, and what a resumed run may change."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from cast_fast.config import PretrainConfig, add_config_arguments, config_from_args, differing_fields, flag
from cast_fast.errors import UserError


def parse(*arguments: str) -> PretrainConfig:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return config_from_args(parser.parse_args(list(arguments)))


def test_every_field_is_a_flag_with_help_and_a_docstring() -> None:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    text = parser.format_help()
    source = Path(__import__("cast_fast.config").config.__file__).read_text()
    for field in dataclasses.fields(PretrainConfig):
        assert flag(field.name) in text
        assert field.metadata["help"]
        declaration = source.split(f"\n    {field.name}: ", 1)[1]
        body = declaration.split("\n    ", 12)
        assert any(line.startswith('"""') for line in body), f"{field.name} has no docstring"


def test_defaults_are_the_published_settings() -> None:
    config = parse()
    assert (config.arch, config.dim, config.queue_size, config.momentum) == ("resnet50", 128, 65_536, 0.999)
    assert (config.temperature, config.head, config.lam, config.loss_combination) == (0.07, "linear", 3.0, "average")
    assert (config.lr, config.sgd_momentum, config.weight_decay, config.clip_grad) == (0.5, 0.9, 1e-4, 2.0)
    assert (config.epochs, config.steps) == (200, None)
    assert (config.flip_p, config.grey_p, config.jitter_p, config.blur_p) == (0.5, 0.2, 0.5, 0.0)


def test_preset_fills_and_flags_win() -> None:
    config = parse("--preset", "cast-v2", "--temperature", "0.1", "--steps", "5")
    assert (config.head, config.loss_combination, config.blur_p, config.clip_grad) == ("mlp", "sum", 0.5, 0.0)
    assert config.temperature == 0.1
    assert (config.epochs, config.steps) == (None, 5)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"lr": 0.0}, "--lr"),
        ({"lr": float("nan")}, "--lr"),
        ({"batch_norm_groups": -1}, "--batch-norm-groups: got -1, expected at least 0"),
        ({"batch_norm_groups": 3}, "--batch-norm-groups: got 3, expected a divisor of --batch 256"),
        ({"batch_norm_groups": 2, "key_bn": "sync", "query_bn": "sync"}, "--batch-norm-groups: got 2 with --key-bn"),
        ({"queue_size": 255}, "--queue-size"),
        ({"temperature": 0.0}, "--temperature"),
        ({"momentum": 1.0}, "--momentum"),
        ({"phi": 0.0}, "--phi"),
        ({"phi": 1.5}, "--phi"),
        ({"size": 16}, "--size"),
        ({"batch": 0}, "--batch"),
        ({"method": "simclr"}, "--method"),
        ({"epochs": 1, "steps": 1}, "--steps"),
        ({"steps": 0}, "--steps"),
        ({"hue": 0.6}, "--hue"),
        ({"seed": -1}, "--seed"),
        ({"images": Path("a")}, "--saliency"),
        ({"saliency": Path("a")}, "--images"),
        ({"images": Path("a"), "saliency": Path("b"), "data": Path("c")}, "--data"),
        ({"blur_sigma_min": 3.0}, "--blur-sigma-max"),
    ],
)
def test_bad_values_name_their_flag(values: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        PretrainConfig(**values)


def test_queue_is_checked_against_the_global_batch() -> None:
    config = PretrainConfig(batch=64, queue_size=128)
    config.require_queue(2)
    with pytest.raises(UserError, match=r"--queue-size: got 128, expected at least the global batch of 256 .*64 × 4"):
        config.require_queue(4)


def test_dataset_and_run_folder_are_required_for_training() -> None:
    with pytest.raises(UserError, match="--images DIR"):
        PretrainConfig().require_dataset()
    with pytest.raises(UserError, match="--out"):
        PretrainConfig(images=Path("a"), saliency=Path("b")).require_dataset()


@pytest.mark.parametrize(
    ("method", "constrained", "attention", "maps"),
    [
        ("cast", True, True, True),
        ("moco", False, False, False),
        ("crops-only", True, False, True),
        ("attention-only", False, True, True),
    ],
)
def test_methods_switch_parts_off(method: str, constrained: bool, attention: bool, maps: bool) -> None:
    config = PretrainConfig(method=method)
    assert (config.constrained_crops, config.attention_loss, config.needs_saliency) == (constrained, attention, maps)


def test_json_round_trip() -> None:
    config = PretrainConfig(images=Path("/data/images"), saliency=Path("/data/maps"), out=Path("run"), steps=7)
    assert PretrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(UserError, match="unknown fields colour"):
        PretrainConfig.from_json({**config.to_json(), "colour": 1})


def test_resume_ignores_what_cannot_change_the_result_and_names_the_rest() -> None:
    saved = PretrainConfig(out=Path("a"), checkpoint_every=10, steps=7)
    moved = dataclasses.replace(saved, out=Path("b"), checkpoint_every=20, resume=True, loader_threads=3)
    assert differing_fields(saved, moved) == {}
    assert saved.fingerprint() == moved.fingerprint()
    other = dataclasses.replace(saved, lr=0.1)
    assert differing_fields(saved, other) == {"lr": (0.5, 0.1)}
    assert saved.fingerprint() != other.fingerprint()
