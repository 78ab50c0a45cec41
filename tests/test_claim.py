"""The comparison of MoCo and CAST in small: what is equal, what is counted, what is said."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import claim
import numpy as np
import pytest
import torch

from cast_fast.encoder import cam_grid
from cast_fast.errors import UserError
from cast_fast.evaluate.statistics import Interval


@pytest.fixture(scope="module", autouse=True)
def own_threads() -> Iterator[None]:
    """A run takes threads by the number of runs side by side, as it is alone in its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_small_network_has_six_by_six_cells_and_equal_starts():
    assert cam_grid(claim.new_encoder(claim.CPU, 0), 96) == (6, 6)
    first, again, other = (claim.new_encoder(claim.QUICK, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_fingerprints_follow_the_settings():
    assert claim.CPU.fingerprint() == claim.Settings().fingerprint()
    assert dataclasses.replace(claim.CPU, lr=0.05).fingerprint() != claim.CPU.fingerprint()


def test_verdicts_by_hand():
    clear = Interval(0.1, 0.05, 0.15, 3)
    assert claim.verdict(clear, 1) == "better" and claim.verdict(clear, -1) == "worse"
    assert claim.verdict(Interval(0.1, -0.01, 0.2, 3), 1) == "no clear difference"
    assert claim.verdict(Interval(0.1, math.nan, math.nan, 1), 1) == "one seed only"


def runs_of(values: dict[str, list[float]]) -> dict[str, dict[int, dict]]:
    """Every metric of method m and seed s is values[m][s]."""
    return {
        method: {
            seed: {"metrics": {metric.name: {"mean": value} for metric in claim.METRICS}}
            for seed, value in enumerate(row)
        }
        for method, row in values.items()
    }


def test_differences_are_paired_by_seed():
    runs = runs_of({"moco": [0.1, 0.5, 0.9], "cast": [0.2, 0.61, 0.99]})
    found = claim.compare(runs, "moco", "cast")
    first = found["key/energy"]
    assert first["by_seed"] == pytest.approx([0.1, 0.11, 0.09]) and first["mean"] == pytest.approx(0.1)
    assert first["high"] - first["mean"] == pytest.approx(4.30265 * 0.01 / math.sqrt(3), abs=1e-6)
    assert first["verdict"] == "better" and found["bg_gap"]["verdict"] == "worse"


@pytest.mark.parametrize(
    ("cast", "opening"),
    [
        ([0.1, 0.5, 0.9], "No clear effect of CAST"),
        ([0.4, 0.2, 0.9], "No clear effect of CAST"),
        ([0.2, 0.61, 0.99], "CAST helped in some respects and hurt in others"),
    ],
)
def test_the_conclusion_is_plain(cast, opening):
    runs = runs_of({"moco": [0.1, 0.5, 0.9], "cast": cast})
    assert claim.conclusion(claim.compare(runs, "moco", "cast")).startswith(opening + " (")


@pytest.mark.parametrize(("wanted", "opening"), [("better", "CAST helped ("), ("worse", "CAST hurt (")])
def test_what_the_loss_optimises_alone_convinces_nobody(wanted, opening):
    calm = {metric.name: {"verdict": "no clear difference"} for metric in claim.METRICS}
    only = {**calm, claim.TRAINED_FOR[0]: {"verdict": "better"}}
    assert claim.conclusion(only).startswith("No clear effect")
    assert claim.conclusion({**only, "linear_free": {"verdict": wanted}}).startswith(opening)


def test_a_worker_does_not_outlive_its_parent(monkeypatch):
    left = threading.Event()
    monkeypatch.setattr(claim.os, "_exit", lambda code: left.set())
    parent = os.getppid()
    alive = [parent]
    monkeypatch.setattr(claim.os, "getppid", lambda: alive[0])
    monkeypatch.setattr(claim.time, "sleep", lambda seconds: left.wait(0.01))
    claim._end_with(parent)
    assert not left.wait(0.1)
    alive[0] = 1
    assert left.wait(10)


def test_full_and_quick_exclude_each_other(tmp_path, capsys):
    with pytest.raises(UserError, match="--full and --quick"):
        claim.settings_of(claim.parse(["--out", str(tmp_path), "--full", "--quick"]))
    assert claim.main(["--out", str(tmp_path), "--full", "--quick"]) == 2
    assert "error" in capsys.readouterr().err


FLAGS = ["--quick", "--jobs", "1", "--training-scenes", "24", "--test-scenes", "24", "--steps", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MoCo and CAST from one seed, tiny."""
    pytest.importorskip("nvidia.dali")
    out = tmp_path_factory.mktemp("claim") / "out"
    assert claim.main(["--out", str(out), "--seeds", "4", *FLAGS]) == 0
    return out


def test_results_hold_every_number(finished):
    summary = json.loads((finished / "results.json").read_text())
    assert summary["methods"] == ["moco", "cast", "untrained"] and summary["command"].endswith("--steps 2")
    assert str(finished) not in summary["command"]
    for method in summary["methods"]:
        found = summary["runs"][method]["4"]
        assert set(found["metrics"]) == {metric.name for metric in claim.METRICS}
        drop = found["metrics"]["linear_same"]["mean"] - found["metrics"]["linear_free"]["mean"]
        assert found["metrics"]["linear_drop"]["mean"] == pytest.approx(drop)
        assert found["metrics"]["key/energy"]["count"] == 24
    difference = summary["differences"]["cast - moco"]["only_fg"]
    assert difference["verdict"] == "one seed only" and difference["low"] is None
    curve = summary["runs"]["cast"]["4"]["training"]["curve"]
    assert [point["step"] for point in curve] == [1, 2] and all(0 < point["loss_cast"] <= 1 for point in curve)
    assert all(point["loss_cast"] == 0 for point in summary["runs"]["moco"]["4"]["training"]["curve"])
    text = (finished / "results.md").read_text()
    assert all(metric.title in text for metric in claim.METRICS) and "what the loss optimises" in text
    assert (finished / "chart.png").is_file() and (finished / "grounding.png").is_file()


def test_pictures_are_decoded_once(finished, monkeypatch):
    folder = next((finished / "work").iterdir()) / "test-free"
    pictures = claim.DecodedPictures(claim.opened(folder).dataset)
    first = pictures.image(3)
    monkeypatch.setattr(claim.FolderPictures, "image", None)
    assert pictures.image(3) is first
    with pytest.raises(TypeError):
        pictures.image(4)


def test_no_more_pictures_are_kept_than_there_is_room_for(finished):
    folder = next((finished / "work").iterdir()) / "test-free"
    pictures = claim.DecodedPictures(claim.opened(folder).dataset)
    pictures._room = 3 * 96 * 72 * 2
    again = [pictures.image(index) is pictures.image(index) for index in range(4)]
    assert again == [True, True, False, False]


def test_methods_share_scenes_and_first_step_but_not_the_rest(finished):
    summary = json.loads((finished / "results.json").read_text())
    work = finished / "work" / claim.settings_of(claim.parse(["--out", "x", *FLAGS])).fingerprint()
    assert len(list((work / "training" / "images").iterdir())) == 24
    correlated, free = ((work / name / "labels.csv").read_text() for name in ("test-same", "test-free"))
    assert correlated != free
    final = [summary["runs"][m]["4"]["training"]["curve"][-1]["loss_moco"] for m in ("moco", "cast")]
    assert final[0] != final[1]


def test_a_finished_run_is_not_repeated(finished, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("trained again")

    before = json.loads((finished / "results.json").read_text())
    monkeypatch.setattr(claim, "train", refuse)
    assert claim.main(["--out", str(finished), "--seeds", "4", *FLAGS]) == 0
    after = json.loads((finished / "results.json").read_text())
    assert after["runs"] == before["runs"]
    # without its result, a run goes on from its weights
    (path,) = (finished / "work").glob("*/runs/cast-4/result.json")
    path.unlink()
    assert claim.main(["--out", str(finished), "--seeds", "4", *FLAGS]) == 0
    again = json.loads((finished / "results.json").read_text())["runs"]["cast"]["4"]["metrics"]
    for name, found in before["runs"]["cast"]["4"]["metrics"].items():
        assert again[name]["mean"] == pytest.approx(found["mean"], abs=1e-6)
    with pytest.raises(AssertionError, match="trained again"):
        claim.main(["--out", str(finished), "--seeds", "5", *FLAGS])


def test_a_panel_a_metric_is_drawn_for_negative_values_too(tmp_path):
    runs = runs_of({"moco": [0.1, -0.5], "cast": [-0.2, 0.3], "untrained": [0.0, 0.0]})
    summary = {"methods": ["moco", "cast", "untrained"], "runs": runs}
    claim.draw_chart(tmp_path / "chart.png", summary)
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    assert np.isfinite([v["metrics"]["bg_gap"]["mean"] for v in runs["moco"].values()]).all()
