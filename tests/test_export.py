"""Weights leave and enter under the names that other libraries use, with the same features."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from cast_fast import checkpoint, cli, export
from cast_fast.errors import UserError
from cast_fast.evaluate.weights import IdentityHead, Model, load_classifier, load_encoder, normalise, split_state
from cast_fast.moco import MoCo


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives BatchNorm statistics that differ from their start, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return module


def write_run(folder: Path, arch: str = "resnet18", head: str = "linear", size: int = 64) -> tuple[Path, MoCo]:
    moco = MoCo(arch, dim=16, head=head, queue_size=8, seed=3)
    lively(moco.query, 1)
    lively(moco.key, 2)
    config = {"arch": arch, "size": size, "method": "cast", "images": "/somewhere/images", "seed": 3}
    config |= {"batch": 32, "lr": 0.5}
    state = {"model": moco.state_dict(), "progress": {"processes": 4, "total_steps": 60}}
    checkpoint.save(folder, 40, state, config=config, fingerprint="f" * 32, keep=1)
    return folder, moco


@pytest.fixture(scope="module")
def run18(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MoCo]:
    return write_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def run50(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MoCo]:
    return write_run(tmp_path_factory.mktemp("runs") / "large", "resnet50", "mlp")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def own_features(moco: MoCo, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return moco.query.eval()(normalise(images)).pooled


def close(features: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((features - expected).abs().max() <= 1e-5 * expected.abs().max())


def detectron2_names(blocks: tuple[int, ...]) -> set[str]:
    """Every key of detectron2's bottleneck ResNet, written out from its class structure: stem, res2 … res5."""
    norm = ("weight", "bias", "running_mean", "running_var")
    names = {"stem.conv1.weight", *(f"stem.conv1.norm.{n}" for n in norm)}
    for stage, count in enumerate(blocks, start=2):
        for block in range(count):
            parts = ["conv1", "conv2", "conv3"] + (["shortcut"] if block == 0 else [])
            for part in parts:
                names.add(f"res{stage}.{block}.{part}.weight")
                names |= {f"res{stage}.{block}.{part}.norm.{n}" for n in norm}
    return names


def test_run_folder_gives_both_encoders_and_its_configuration(run50, images):
    folder, moco = run50
    model = load_encoder(folder)
    assert (model.arch, model.name, model.size, model.has_head) == ("resnet50", "large", 64, True)
    assert model.classifier is None and model.provenance["step"] == 40
    assert close(model.features(images), own_features(moco, images))
    assert model.key is not None
    with torch.no_grad():
        expected = moco.key.eval()(normalise(images)).embedding
        assert close(model.key(normalise(images)).embedding, expected)
    assert load_encoder(folder / "checkpoints" / "step-40").provenance["step"] == 40


def test_torchvision_export_is_read_by_torchvision(run50, images, tmp_path):
    folder, moco = run50
    done = export.export(load_encoder(folder), "torchvision", tmp_path / "weights.pth")
    state = torch.load(done.path, weights_only=True)
    assert len(state) == 318 and all(value.is_contiguous() for value in state.values())
    network = torchvision.models.resnet50()
    result = network.load_state_dict(state, strict=False)
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"} and result.unexpected_keys == []
    network.fc = nn.Identity()
    with torch.no_grad():
        assert close(network.eval()(normalise(images)), own_features(moco, images))


def test_timm_folder_is_read_by_timm(run50, images, tmp_path):
    folder, moco = run50
    done = export.export(load_encoder(folder), "timm", tmp_path / "for_timm")
    network: Any = timm.create_model(f"local-dir:{done.path}", pretrained=True)
    assert list(network.pretrained_cfg["mean"]) == [0.485, 0.456, 0.406] and network.num_classes == 0
    with torch.no_grad():
        assert close(network.eval()(normalise(images)), own_features(moco, images))
    assert "timm" in done.differences
    classifier: Any = timm.create_model(f"local-dir:{done.path}", pretrained=True, num_classes=5)
    assert torch.equal(classifier.conv1.weight, network.conv1.weight) and classifier.fc.out_features == 5
    again = load_encoder(done.path)
    assert torch.equal(again.features(images), load_encoder(folder).features(images))


def test_timm_loads_the_plain_file_strictly(run18, images, tmp_path):
    folder, moco = run18
    done = export.export(load_encoder(folder), "timm", tmp_path / "weights.safetensors")
    network = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(done.path))
    with torch.no_grad():
        assert close(network.eval()(normalise(images)), own_features(moco, images))


def test_safetensors_metadata_tells_preprocessing_and_provenance(run18, images, tmp_path):
    folder, moco = run18
    done = export.export(load_encoder(folder), "safetensors", tmp_path / "weights.safetensors")
    with safe_open(str(done.path), framework="pt") as opened:
        metadata = opened.metadata()
    assert all(isinstance(value, str) for value in metadata.values()) and metadata["format"] == "pt"
    about = json.loads(metadata["cast_fast"])
    assert about["preprocessing"]["mean"] == [0.485, 0.456, 0.406] and about["preprocessing"]["size"] == 64
    assert about["provenance"]["step"] == 40 and about["provenance"]["config"]["method"] == "cast"
    assert "/somewhere" not in metadata["cast_fast"]
    again = load_encoder(done.path)
    assert close(again.features(images), own_features(moco, images)) and again.size == 64
    assert isinstance(again.query.head, IdentityHead) and again.key is None
    card = done.card.read_text()
    assert done.sha256 in card and "CAST" in card and "| steps done | 40 of 60 |" in card
    assert "| global batch, pairs | 128 |" in card and "| lr, per 256 pairs of it | 0.5 |" in card


@pytest.mark.parametrize(("arch", "blocks"), [("resnet50", (3, 4, 6, 3))])
def test_detectron2_keys_follow_its_rule(arch, blocks, run50, images, tmp_path):
    folder, moco = run50
    done = export.export(load_encoder(folder), "detectron2", tmp_path / "weights.pkl", allow_pickle=True)
    content = pickle.loads(done.path.read_bytes())
    assert content["matching_heuristics"] is True and content["__author__"]
    assert set(content["model"]) == detectron2_names(blocks)
    assert all(type(value) is np.ndarray for value in content["model"].values())
    trunk = moco.query.trunk.state_dict()
    pairs = {
        "stem.conv1.norm.running_mean": "bn1.running_mean",
        "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "res3.0.shortcut.norm.bias": "layer2.0.downsample.1.bias",
        "res5.2.conv3.norm.weight": "layer4.2.bn3.weight",
        "res4.5.conv2.weight": "layer3.5.conv2.weight",
    }
    for theirs, ours in pairs.items():
        assert np.array_equal(content["model"][theirs], trunk[ours].numpy())


def test_detectron2_names_are_inverted_exactly():
    with torch.device("meta"):
        names = [n for n in torchvision.models.resnet101().state_dict() if not n.startswith("fc.")]
    renamed = [export.detectron2_name(name) for name in names]
    assert len(set(renamed)) == len(names) and [export.torchvision_name(name) for name in renamed] == names
    assert {n for n in renamed if not n.endswith("num_batches_tracked")} == detectron2_names((3, 4, 23, 3))


def test_detectron2_needs_consent_and_bottlenecks(run18, tmp_path):
    model = load_encoder(run18[0])
    with pytest.raises(UserError, match="--allow-pickle"):
        export.export(model, "detectron2", tmp_path / "weights.pkl")
    with pytest.raises(UserError, match="basic blocks"):
        export.export(model, "detectron2", tmp_path / "weights.pkl", allow_pickle=True)
    assert list(tmp_path.iterdir()) == []


def moco_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Ours → the naming of MoCo's released checkpoints."""
    renamed = {}
    for name, value in state.items():
        for ours, theirs in (("query.", "module.encoder_q."), ("key.", "module.encoder_k.")):
            if not name.startswith(ours):
                continue
            rest = (
                name.removeprefix(ours).removeprefix("trunk.").replace("head.fc", "fc").replace("head.hidden", "fc.0")
            )
            if any(n.startswith("query.head.hidden") for n in state) and rest.startswith("fc.") and "fc.0" not in rest:
                rest = rest.replace("fc.", "fc.2.")
            renamed[theirs + rest] = value
    return renamed | {"module.queue": torch.zeros(16, 8), "module.queue_ptr": torch.zeros(1)}


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_checkpoints_in_mocos_naming_are_imported(head, images, tmp_path):
    folder, moco = write_run(tmp_path / "run", head=head)
    state = moco_names(moco.state_dict())
    assert f"module.encoder_q.fc.{'2.' if head == 'mlp' else ''}weight" in state
    torch.save({"epoch": 7, "arch": "resnet18", "state_dict": state}, tmp_path / "moco.pth.tar")
    model, ours = load_encoder(tmp_path / "moco.pth.tar"), load_encoder(folder)
    assert model.name == "moco" and model.provenance["epoch"] == 7 and model.key is not None
    with torch.no_grad():
        for theirs, own in ((model.query, ours.query), (model.key, ours.key)):
            assert own is not None
            assert torch.equal(theirs(normalise(images)).embedding, own(normalise(images)).embedding)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.model."])
def test_torchvision_names_are_imported_with_any_prefix(prefix, images, tmp_path):
    network = lively(torchvision.models.get_model("resnet18", num_classes=1000)).eval()
    torch.save({prefix + name: value for name, value in network.state_dict().items()}, tmp_path / "supervised.pth")
    model = load_classifier(tmp_path / "supervised.pth")
    with torch.no_grad():
        assert torch.equal(model.scores(images), network(normalise(images)))
    assert model.classes is not None and model.classes[0] == "tench" and model.classes[207] == "golden retriever"


def test_a_single_network_is_found_under_any_name_but_two_are_not_guessed(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    torch.save({f"online.net.{name}": value for name, value in state.items()}, tmp_path / "one.pth")
    assert load_encoder(tmp_path / "one.pth").arch == "resnet18"
    both = {f"{part}.net.{name}": value for part in ("online", "slow") for name, value in state.items()}
    torch.save(both, tmp_path / "two.pth")
    with pytest.raises(UserError, match=r"holds 2 networks \(online\.net\., slow\.net\.\)"):
        load_encoder(tmp_path / "two.pth")


def test_missing_counters_are_no_reason_to_refuse(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    torch.save({n: v for n, v in state.items() if "num_batches" not in n}, tmp_path / "old.pth")
    assert load_encoder(tmp_path / "old.pth").arch == "resnet18"


class Payload:
    """Pickled, it creates a file when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_files_that_would_run_code_are_refused(tmp_path):
    payload = Payload(tmp_path / "ran")
    torch.save({"state_dict": payload}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(payload, protocol=2))
    for name in ("evil.pth", "evil.pkl"):
        with pytest.raises(UserError, match=r"refused, because reading it would have to run code \([\w.]+\)"):
            load_encoder(tmp_path / name)
    assert not payload.target.exists()


def test_a_namespace_of_settings_is_no_reason_to_refuse(images, tmp_path):
    network = lively(torchvision.models.resnet18()).eval()
    settings = argparse.Namespace(arch="resnet18", lr=0.03)
    torch.save({"args": settings, "epoch": 3, "state_dict": network.state_dict()}, tmp_path / "with_args.pth")
    model = load_encoder(tmp_path / "with_args.pth")
    with torch.no_grad():
        assert torch.equal(model.scores(images), network(normalise(images)))


def test_mean_and_deviation_come_with_the_file(run18, images, tmp_path):
    mean, std = (0.4717, 0.4499, 0.3837), (0.26, 0.2516, 0.2575)
    network = lively(torchvision.models.get_model("resnet18", num_classes=9)).eval()
    expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    # as the Backgrounds Challenge's own 9-way checkpoints have it
    state = {f"module.model.{name}": value for name, value in network.state_dict().items()}
    state |= {f"module.normalizer.new_{n}": torch.tensor(v).view(3, 1, 1) for n, v in (("mean", mean), ("std", std))}
    torch.save({"epoch": 1, "model": state}, tmp_path / "official.pt")
    model = load_encoder(tmp_path / "official.pt")
    assert (model.mean, model.std) == (mean, std)
    with torch.no_grad():
        assert torch.allclose(model.scores(images), network(expected), atol=1e-5)
    # what is exported says so, and is read again so
    for kind, name in (("timm", "folder"), ("safetensors", "x.safetensors"), ("torchvision", "x.pth")):
        done = export.export(model, kind, tmp_path / name)
        again = load_encoder(done.path)
        assert (again.mean, again.std) == (mean, std) and torch.equal(again.features(images), model.features(images))
        card = done.card.read_text()
        assert "0.4717, 0.4499, 0.3837" in card and "imported; its file does not say how" in card
    theirs: Any = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    assert tuple(theirs.pretrained_cfg["mean"]) == mean
    # timm's own folders have no description of ours
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((tmp_path / "folder" / "config.json").read_text())
    save_file(export.trunk_state(model), bare / "model.safetensors")
    assert (load_encoder(bare).mean, load_encoder(bare).name) == (mean, "bare")
    (bare / "config.json").write_text('{"pretrained_cfg": {"mean": [0.5], "std": [0.5]}}')
    with pytest.raises(UserError, match=r"config\.json.*expected three numbers"):
        load_encoder(bare)
    assert load_encoder(run18[0]).mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.write_bytes(b"stem,class"), "some other kind of file, expected weights"),
        (lambda p: p.write_bytes(b""), "an empty file, expected weights"),
        (lambda p: p.write_bytes(b"PK\3\4" + bytes(60)), "cannot be read as a torch file"),
        (lambda p: p.write_bytes(pickle.dumps([1, 2])), "is damaged, or a pickle that is no file of weights"),
        (lambda p: torch.save([1, 2], p), "holds a list"),
        (lambda p: torch.save({"weight": torch.zeros(3)}, p), "found no ResNet"),
        (lambda p: p.mkdir(), "neither a run folder"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_is_no_encoder_is_named(make, message, tmp_path):
    make(tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        load_encoder(tmp_path / "x.pth")


def test_a_wrong_shape_names_the_nearest_architecture(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    torch.save(state, tmp_path / "grey.pth")
    with pytest.raises(UserError, match=r"nearest is resnet18, 1 entries differ, such as conv1.weight"):
        load_encoder(tmp_path / "grey.pth")


def test_damaged_safetensors_and_lying_metadata(run18, tmp_path):
    model = load_encoder(run18[0])
    done = export.export(model, "safetensors", tmp_path / "weights.safetensors")
    export.save_safetensors(export.trunk_state(model), tmp_path / "lie.safetensors", {"arch": "resnet50"})
    with pytest.raises(UserError, match="says that it is a resnet50"):
        load_encoder(tmp_path / "lie.safetensors")
    content = done.path.read_bytes()
    done.path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_encoder(done.path)


def test_numbers_that_are_not_finite_are_not_exported_as_good(run18, tmp_path):
    model = load_encoder(run18[0])
    model.trunk.get_parameter("conv1.weight")[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        export.export(model, "torchvision", tmp_path / "weights.pth")


def test_command_line(run18, tmp_path, capsys):
    folder, _ = run18
    assert cli.main(["export", str(folder), "--format", "torchvision"]) == 0
    assert (folder / "exported" / "resnet18-torchvision.pth").is_file()
    assert "read back by torchvision" in capsys.readouterr().out
    assert cli.main(["export", str(folder / "checkpoints" / "step-40"), "--format", "timm"]) == 0
    assert (folder / "exported" / "resnet18-timm" / "config.json").is_file()
    capsys.readouterr()
    assert cli.main(["export", str(folder), "--format", "safetensors", "--out", str(tmp_path / "x.pth")]) == 2
    assert "--out" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "nothing")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "no such file" in captured.err


def test_heads_and_classifiers_are_told_apart():
    with torch.device("meta"):
        plain = torchvision.models.resnet18(num_classes=9).state_dict()
    assert set(split_state(plain, "x")) == {"query", "classifier"}
    moco = {f"encoder_q.{name}": value for name, value in plain.items()}
    assert set(split_state(moco, "x")) == {"query", "query_head"}


def test_models_without_classifier_cannot_score(run18, images):
    model = load_encoder(run18[0])
    assert isinstance(model, Model)
    with pytest.raises(ValueError, match="without classifier"):
        model.scores(images)
    with pytest.raises(UserError, match="cast-fast probe"):
        load_classifier(run18[0])
