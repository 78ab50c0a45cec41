"""The scaling benchmark: what real processes count is what the model says, and the model behaves."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import scaling


def test_count_agrees_with_the_model(tmp_path: Path) -> None:
    found = scaling.measure(2, "reduce", tmp_path)
    model = scaling.modelled_bytes(scaling.MEASURED, 2, "reduce")
    assert scaling.disagreements(found["sent"], model) == []
    assert found["sent"]["gradients"] == pytest.approx(4 * scaling.MEASURED.parameters, rel=1e-6)
    if found["wire"] is not None:
        # Two ranks, and gloo's headers, acknowledgements and heartbeats.
        assert 1 < found["wire"] / (2 * sum(model.values())) < 1.3


def test_disagreements_are_named() -> None:
    model = scaling.modelled_bytes(scaling.MEASURED, 4, "gather")
    assert scaling.disagreements(model, model) == []
    (line,) = scaling.disagreements({**model, "gradients": 2 * model["gradients"]}, model)
    assert line.startswith("gradients: counted")
    (line,) = scaling.disagreements({**model, "surprise": 1e6}, model)
    assert line == "surprise: counted 1,000,000, model 0"


def test_one_rank_sends_nothing() -> None:
    assert scaling.modelled_bytes(scaling.FULL, 1, "gather") == {}
    assert scaling.usual_bytes(scaling.FULL, 1) == {}


def test_modelled_efficiency(tmp_path: Path) -> None:
    cluster = scaling.Cluster(step=0.165, nvlink=230e9, link=25e9)
    values = [scaling.efficiency(2**power, cluster) for power in range(11)]
    assert values[0] == {"ours": 1.0, "usual": 1.0}
    for before, after in itertools.pairwise(values):
        assert after["usual"] < before["usual"]
        assert after["usual"] < after["ours"] < 1
    assert values[-1]["ours"] > values[-1]["usual"]
    slow = scaling.efficiency(64, scaling.Cluster(step=0.165, nvlink=230e9, link=2.5e9))
    assert slow["ours"] < values[6]["ours"]
    scaling.chart(
        {(2, "gather"): {"sent": {"gradients": 1e6}}, (2, "reduce"): {"sent": {}}}, cluster, tmp_path / "a.png"
    )
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "0", "2"], "--ranks: got [0, 2], expected at least 1"),
        (["--ranks", "1", "--overlap"], "--ranks: got [1], expected at least 2"),
        (["--link", "0"], "--link: expected more than 0"),
        (["--out", "file"], "--out: cannot write"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert scaling.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("bench_out").exists()
