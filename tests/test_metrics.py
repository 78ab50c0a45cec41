"""metrics.csv: exact rows, late reading, cut back to a step; timing apart; full disks reported."""

from __future__ import annotations

import csv
import logging
import math
import os
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cast_fast.errors import UserError
from cast_fast.metrics import COLUMNS, STEP_SCALARS, CsvLog, Metrics, Reading


def scalars(step: int, device: torch.device | str = "cpu") -> list[torch.Tensor]:
    return [torch.tensor(step + i / 7, device=device) for i in range(len(STEP_SCALARS))]


def record(metrics: Metrics, first: int, last: int, device: torch.device | str = "cpu") -> list[Reading]:
    readings = []
    for step in range(first, last + 1):
        metrics.record(step, scalars(step, device), (0.5 / step, 1, None), torch.tensor([step, step + 1]))
        readings += metrics.read()
    return readings


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def test_contract_of_the_first_columns() -> None:
    assert COLUMNS[:4] == ("step", "loss", "loss_moco", "loss_cast")


def test_rows_hold_the_exact_values_and_come_late(tmp_path: Path, device: torch.device) -> None:
    metrics = Metrics(tmp_path, step=0, delay=2, tensorboard_every=0)
    early = record(metrics, 1, 5, device)
    assert [reading.step for reading in early] == [1, 2, 3]
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]
    late = metrics.read(everything=True)
    assert [reading.step for reading in late] == [4, 5]
    assert late[1].index.tolist() == [5, 6]
    metrics.close()
    table = rows(tmp_path)
    assert len(table) == 5
    for step, row in enumerate(table, start=1):
        for i, name in enumerate(STEP_SCALARS):
            expected = torch.tensor(step + i / 7)
            assert torch.equal(torch.tensor(float(row[name])), expected), name
        assert float(row["lr"]) == pytest.approx(0.5 / step, rel=1e-8)
        assert row["fallback_query"] == "1" and row["fallback_key"] == ""


def test_record_keeps_no_reference_to_the_steps_memory(tmp_path: Path, device: torch.device) -> None:
    """A captured graph writes its outputs into the same memory each step."""
    metrics = Metrics(tmp_path, step=0, tensorboard_every=0)
    reused = scalars(1, device)
    for step in (1, 2, 3):
        for scalar in reused:
            scalar.fill_(float(step))
        metrics.record(step, reused, (0.1, None, None), torch.zeros(1))
    assert [reading.values["loss"] for reading in metrics.read(everything=True)] == [1, 2, 3]


def test_nonfinite_values_are_written(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, step=0, tensorboard_every=0)
    values = [torch.tensor(math.nan), torch.tensor(math.inf), *scalars(1)[2:]]
    values[STEP_SCALARS.index("finite")] = torch.tensor(False)
    metrics.record(1, values, (0.1, None, None), torch.zeros(1))
    (reading,) = metrics.read(everything=True)
    assert not reading.finite
    assert (rows(tmp_path)[0]["loss"], rows(tmp_path)[0]["loss_moco"], rows(tmp_path)[0]["finite"]) == (
        "nan",
        "inf",
        "0",
    )


@pytest.mark.parametrize("step", [0, 3, 6])
def test_resumed_file_equals_an_undisturbed_one(tmp_path: Path, step: int) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for run, last in ((whole, 8), (resumed, 6)):
        run.mkdir()
        metrics = Metrics(run, step=0)
        record(metrics, 1, last)
        metrics.read(everything=True)
        metrics.record_timing(last, 1.5, 3.0, 0.25, 100)
        metrics.close()
    with open(resumed / "metrics.csv", "a") as handle:
        handle.write("7,0.1234")  # killed in mid-write
    metrics = Metrics(resumed, step=step)
    record(metrics, step + 1, 8)
    metrics.read(everything=True)
    metrics.close()
    assert (resumed / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_tensorboard_events(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, step=0, tensorboard_every=2)
    record(metrics, 1, 4)
    metrics.read(everything=True)
    metrics.record_timing(4, 2.0, 30.0, 0.5, 1000)
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss_cast")] == [2, 4]
    assert [event.value for event in events.Scalars("images_per_second")] == [30.0]
    assert events.Scalars("lr")[0].value == pytest.approx(0.25)


def test_missing_rows_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="cast_fast"):
        Metrics(tmp_path, step=5, tensorboard_every=0).close()
    assert "ends at step 0, the checkpoint at 5" in caplog.text


def test_other_columns_are_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,other\n1,2\n")
    with pytest.raises(UserError, match=r"metrics\.csv.*step,other.*expected"):
        Metrics(tmp_path, step=0)
    assert (tmp_path / "metrics.csv").read_text() == "step,other\n1,2\n"


def test_header_cut_in_the_middle_is_mended(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("st")
    CsvLog(tmp_path / "log.csv", ("step", "a"), step=4).close()
    assert (tmp_path / "log.csv").read_text() == "step,a\n"


def test_cells_with_commas_and_quotes_stay_one_row(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "log.csv", ("step", "samples"), step=0)
    log.write([1, '["a,b", "c"]'])
    log.close()
    CsvLog(tmp_path / "log.csv", ("step", "samples"), step=1).close()
    with open(tmp_path / "log.csv", newline="") as handle:
        assert list(csv.reader(handle))[1] == ["1", '["a,b", "c"]']


def test_full_disk_is_a_users_error() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    log = CsvLog.__new__(CsvLog)
    log.path, log.columns = Path("/dev/full"), ("step", "a")
    log._handle = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UserError, match=r"cannot write /dev/full: No space left on device; saved checkpoints"):
        log.write([1, 2])
    log.close()


def test_unwritable_run_folder_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*metrics\.csv: No such file or directory"):
        Metrics(tmp_path / "absent", step=0)
