"""The main job end to end in a tiny configuration, and the scripts around it."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ceilings
import harness
import ladder
import profile_step
import pytest
import report
import sanitizer_cases
import throughput
import torch

import cast_kernels
from cast_fast.run_folder import batch_norm_groups

TINY = ["--arch", "resnet18", "--size", "32", "--batch", "2", "--queue-size", "16", "--repeats", "1", "--scenes", "4"]
STEPS = (*ladder.LADDER, *ladder.BESIDE, *ladder.ON_REQUEST)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile gives the function back: what it computes is tested elsewhere, and it takes a minute a line."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def tiny_settings(**flags: str) -> ladder.Settings:
    parser = throughput.OneLineParser()
    ladder.add_arguments(parser)
    flags = {"device": "cpu", "arch": "resnet18", "size": "32", "batch": "2", "queue-size": "16", **flags}
    return ladder.settings_from(parser.parse_args([f"--{name}={value}" for name, value in flags.items()]))


def run(out: Path, *flags: str, device: str = "cpu") -> tuple[int, dict[str, dict], dict]:
    code = throughput.main([*TINY, "--device", device, "--out", str(out), *flags])
    lines = (out / "results.jsonl").read_text().splitlines()
    records = {row["variant"]: row for row in map(json.loads, lines) if row["unit"] in ("images/s", "ratio")}
    return code, records, json.loads((out / "summary.json").read_text())


def test_whole_ladder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nvidia.dali")
    code, records, summary = run(tmp_path)
    assert code == 0
    assert list(summary["lines"]) == list(throughput.LINES)
    for name in ("kernels", "groups", *ladder.STREAMING):
        assert summary["lines"].pop(name)["status"] == "absent"
    assert summary["end_to_end_limited_by"] in ("loader", "step")
    assert summary["default_line"] == "compiled"
    assert {name for name in records if "/" not in name} == summary["lines"].keys()
    for name, entry in summary["lines"].items():
        assert entry["status"] == "ok"
        record = records[name]
        assert record["value"] == entry["images_per_second"] > 0
        assert record["repeats"] == record["rounds"] == entry["samples"] == entry["rounds"] == 1
        assert record["shape"] == {"arch": "resnet18", "size": 32, "batch": 2, "queue": 16}
        if name != "loader":
            fraction = record["value"] / records["trunk-bound"]["value"]
            assert entry["speedup_over_published"] == pytest.approx(record["value"] / records["published"]["value"])
            assert entry["overhead_over_moco"] == pytest.approx(records["moco"]["value"] / record["value"])
            assert entry["fraction_of_trunk_bound"] == pytest.approx(fraction)
            assert record["fraction_of_bound"] == (None if name == "end-to-end" else pytest.approx(fraction))
            # The loader's turns come after the ladder's rounds.
            assert entry["speedup_over_published_rounds"] == (0 if name == "end-to-end" else 1)
    assert records["compiled/published"]["value"] == summary["lines"]["compiled"]["speedup_over_published"]
    assert records["moco/compiled"]["value"] == summary["lines"]["compiled"]["overhead_over_moco"]
    assert not [name for name in records if "/" in name and "end-to-end" in name]
    text = capsys.readouterr().out
    assert all(name in text for name in throughput.LINES)
    assert "end-to-end: the" in text
    assert "pretrain --batch 2` runs the line compiled" in " ".join(text.split())
    assert (tmp_path / "throughput.png").stat().st_size > 10_000
    rates = [name for name in records if "/" not in name]
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2 * len(rates)  # a first turn and a round


def test_lines_differ_in_speed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # A step hardly moves the weights, so that rounding is not amplified, but still turns over a quarter of the queue.
    monkeypatch.setattr(ladder, "RATE", 1e-6)
    monkeypatch.setattr(ladder, "GROUP", 2)
    settings = tiny_settings(batch="4", size="64")
    losses = {}
    for name in ("published", "published-amp", "one-pass", "plain-compiled", "closed-form", "moco", "groups"):
        built = ladder.build(name, settings)
        results: list[Any] = [built.run() for _ in range(2)]
        losses[name] = [result[0].item() if isinstance(result, tuple) else result.item() for result in results]
    assert losses["published-amp"] == pytest.approx(losses["published"], rel=1e-4)
    assert losses["closed-form"] == pytest.approx(losses["one-pass"], rel=1e-4)
    assert losses["plain-compiled"] == pytest.approx(losses["one-pass"], rel=1e-4)
    assert losses["one-pass"][0] != pytest.approx(losses["one-pass"][1], rel=1e-3)
    # The released formulation has the same InfoNCE term and another attention term.
    assert losses["published"][0] != pytest.approx(losses["one-pass"][0], rel=1e-4)
    assert losses["groups"][0] != pytest.approx(losses["closed-form"][0], rel=1e-3)
    assert losses["moco"][0] != pytest.approx(losses["closed-form"][0], rel=1e-2)


@pytest.mark.parametrize(
    ("device", "batch", "line", "groups"),
    [
        ("cpu", 16, "compiled", 1),
        ("cpu", 32, "compiled", 1),
        ("cpu", 48, "compiled", 1),
        ("cpu", 64, "groups", 2),
        ("cuda", 256, "groups", 8),
        ("cuda", 250, "kernels", 1),
    ],
)
def test_the_default_line_is_what_pretrain_runs(device: str, batch: int, line: str, groups: int) -> None:
    settings = tiny_settings(**{"batch": str(batch), "queue-size": "4000"})
    settings = dataclasses.replace(settings, device=torch.device(device))
    assert ladder.default_line(settings) == line
    assert batch_norm_groups(settings.config, 1) == ladder.groups(settings) == groups
    assert (ladder.absent("groups", settings) is None) == (line == "groups")
    note = throughput.default_note(settings, (line,))
    assert f"pretrain --batch {batch}` runs the line {line} " in note
    assert ("the others have one group" in note) == (groups > 1)
    assert throughput.default_note(settings, ("moco",)).endswith("which is not in this table")


def test_the_line_groups_has_the_products_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny_settings(**{"batch": "64", "queue-size": "64"})
    taken: dict[str, int] = {}
    step = ladder.TrainStep

    def built(*args: Any, ranks: Any, **flags: Any) -> Any:
        taken[name] = ranks.groups
        return step(*args, ranks=ranks, **flags)

    monkeypatch.setattr(ladder, "TrainStep", built)
    for name in ("groups", "compiled", "moco"):
        ladder.build(name, settings)
    assert taken == {"groups": 2, "compiled": 1, "moco": 1}


def test_quotients_of_lines_that_share_no_round_are_marked() -> None:
    entry: dict[str, Any] = {"status": "ok", "images_per_second": 4.0, "p20": 3.0, "p80": 5.0, "rounds": 0}
    entry |= {"speedup_over_published": 2.0, "speedup_over_published_rounds": 3, "peak_bytes": None}
    entry |= {"overhead_over_moco": 1.25, "overhead_over_moco_rounds": 0, "fraction_of_trunk_bound": None}
    assert throughput.row_of("closed-form", entry, 2)[3:] == ["first turn", "500", "2.00", "~1.25", "–", "–"]


def test_half_precision_lines_run() -> None:
    settings = tiny_settings(precision="bf16")
    assert settings.line_precision("published") == "fp32"
    for name in ("published-amp", "one-pass", "trunk-bound"):
        assert settings.line_precision(name) == "bf16"
        ladder.build(name, settings).run()


def test_trunk_flops_are_those_of_the_literature() -> None:
    # 4.09 G multiply-adds at 224 pixels (He et al., 2016), the classifier's 2 M left out.
    settings = tiny_settings(arch="resnet50", size="224", batch="1")
    assert ladder.trunk_flops(settings) == pytest.approx(2 * 4.087e9, rel=2e-3)


def test_a_failing_line_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ladder.build

    def short_of_memory(name: str, settings: ladder.Settings) -> ladder.Built:
        if name == "one-pass":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return build(name, settings)

    monkeypatch.setattr(ladder, "build", short_of_memory)
    code, records, summary = run(tmp_path, "--variants", "one-pass,closed-form")
    assert code == 1
    assert records["one-pass"]["value"] is None
    assert records["closed-form"]["value"] > 0
    assert summary["lines"]["one-pass"]["status"] == "failed"
    assert "out of memory" in summary["lines"]["one-pass"]["reason"]
    assert "CUDA out of memory" in capsys.readouterr().out
    assert "short_of_memory" in (tmp_path / "failure-one-pass.txt").read_text()


def test_without_dali_the_loader_lines_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    code, records, summary = run(tmp_path, "--variants", "closed-form,loader,end-to-end")
    assert code == 0
    assert records.keys() == {"closed-form"}
    for name in throughput.LOADING:
        assert summary["lines"][name]["status"] == "absent"
    assert "DALI is not installed" in capsys.readouterr().out


def in_a_process(script: str, lines: str, out: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script that calls the benchmark with its own arguments."""
    folders = [str(harness.ROOT), str(harness.ROOT / "kernels"), str(harness.ROOT / "benchmarks")]
    return subprocess.run(
        [sys.executable, "-c", script, *TINY, "--device", "cpu", "--variants", lines, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_ladder_needs_none_of_the_picture_libraries(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['cv2', 'nvidia.dali', 'hypothesis']));"
        "import throughput; sys.exit(throughput.main(sys.argv[1:]))"
    )
    done = in_a_process(script, "closed-form", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["lines"]["closed-form"]["status"] == "ok"


def test_nothing_is_compiled_once_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali")

    def compile_late(*_: object, **__: object) -> None:
        pytest.fail("compiled after the deadline")

    monkeypatch.setattr(torch, "compile", compile_late)
    flags = [
        "--variants",
        "published,closed-form,compiled,trunk-bound,end-to-end",
        "--max-seconds",
        "0.001",
        "--repeats",
        "3",
    ]
    code, records, summary = run(tmp_path, *flags)
    assert code == 0
    # First turns alone, and so no record of a quotient.
    found = {name: (row["repeats"], row["rounds"]) for name, row in records.items()}
    assert found == dict.fromkeys(["published", "closed-form"], (1, 0))
    assert summary["lines"]["closed-form"]["speedup_over_published_rounds"] == 0
    for name in ("compiled", "trunk-bound", "end-to-end"):
        assert summary["lines"][name] == {"status": "absent", "reason": "not measured: out of time"}


def test_what_ladder_calls_compiled_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    settings = tiny_settings()
    for name in STEPS:
        if name not in ("kernels", "streaming"):  # their fused losses need CUDA
            monkeypatch.setattr(torch, "compile", lambda function, name=name, **_: compiled.append(name) or function)
            ladder.build(name, settings).run()
    assert {*compiled, "kernels", "streaming"} == set(ladder.COMPILED)


def test_lines_can_be_compiled_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled: list[dict[str, Any]] = []
    build, config = ladder.build, torch._inductor.config

    def failing(name: str, settings: ladder.Settings) -> ladder.Built:
        if name == "moco":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(name, settings)

    def compile_(function: Any, **_: Any) -> Any:
        compiled.append({"kept": config.autotune_local_cache})
        return function

    monkeypatch.setattr(ladder, "build", failing)
    monkeypatch.setattr(torch, "compile", compile_)
    flags = [*TINY, "--device", "cpu", "--out", str(tmp_path / "out"), "--compile-only"]
    with config.patch(autotune_local_cache=True):  # pytest's monkeypatch would leave the setting without a value
        assert throughput.main([*flags, "--variants", "closed-form,trunk-bound,compiled,kernels,moco"]) == 1
    assert compiled == [{"kept": False}] * 2  # trunk-bound and compiled; times taken beside others are not kept
    assert "moco: failed: OutOfMemoryError" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_lines_are_built_in_an_order_of_their_own() -> None:
    assert sorted(ladder.BUILDING) == sorted(STEPS)
    assert ladder.BUILDING[:2] == ("trunk-bound", "moco")  # every other line is compared with these when it ends


def test_quick_runs_have_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput.time, "monotonic", lambda: 1000.0)
    deadlines = [
        throughput.parse(["--device", "cpu", *flags]).deadline
        for flags in ([], ["--quick"], ["--quick", "--max-seconds", "30"])
    ]
    assert deadlines == [1360, 1200, 1030]


def test_turns_with_the_loader_begin_in_its_steady_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Loader:
        def __next__(self) -> None:
            events.append("take")

        def close(self) -> None:
            events.append("close")

    def time_calls(run: Callable[[], object], *, prepare: Callable[[], object], **_: object) -> list[float]:
        prepare()
        events.append("start")
        run()
        events.append("end")
        return [1.0]

    monkeypatch.setattr(throughput, "build_loader", lambda plan, dataset: Loader())
    monkeypatch.setattr(harness, "time_calls", time_calls)
    plan = throughput.parse([*TINY, "--device", "cpu", "--out", str(tmp_path), "--repeats", "2"])
    report = throughput.Report(plan, harness.open_results(tmp_path, harness.environment(torch.device("cpu"))))
    built = {"compiled": ladder.Built(lambda: None, (), lambda batch: events.append("step"))}
    dataset: Any = None
    throughput.measure_loading(report, dataset, built)
    alone = [*["take"] * 3, "start", *["take"] * 4, "end"]
    fed = [*["take", "step"] * 3, "start", *["take", "step"] * 4, "end"]
    assert events == [*alone, "take", "step", *fed, *(alone + fed) * 2, "close"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    build = ladder.build

    def interrupted(name: str, settings: ladder.Settings) -> ladder.Built:
        built = build(name, settings)
        calls = iter(range(100))

        def step() -> None:
            if name == "closed-form" and next(calls) == 3:  # in its second round, after a warm-up and a first turn
                os.kill(os.getpid(), number)
            built.run()

        return ladder.Built(step, built.state)

    monkeypatch.setattr(ladder, "build", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    # A job that a shell put in the background inherits SIGINT ignored.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, records, _ = run(tmp_path, "--variants", "one-pass,closed-form", "--repeats", "5")
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert code == 130
    found = {name: (row["repeats"], row["rounds"]) for name, row in records.items()}
    assert found == dict.fromkeys(["one-pass", "closed-form"], (1, 1))
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_killed_run_has_records_of_the_lines_before(tmp_path: Path) -> None:
    """A kernel that never ends can only be killed: nothing is written then, so it must have been before."""
    script = (
        "import os, signal, sys, ladder, throughput; build = ladder.build\n"
        "def hanging(name, settings):\n"
        "    if name == 'closed-form': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return build(name, settings)\n"
        "ladder.build = hanging; throughput.main(sys.argv[1:])"
    )
    done = in_a_process(script, "published,closed-form", tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (row,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert (row["variant"], row["repeats"], row["rounds"]) == ("published", 1, 0) and row["value"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "resnet51"], "--arch"),
        (["--batch", "0"], "--batch"),
        (["--batch", "1", "--size", "32"], "--batch"),
        (["--batch", "x"], "--batch"),
        (["--batch", "32"], "--queue-size"),
        (["--size", "8"], "--size"),
        (["--repeats", "0"], "--repeats"),
        (["--scenes", "0"], "--scenes"),
        (["--loader-threads", "-1"], "--loader-threads"),
        (["--max-seconds", "0"], "--max-seconds"),
        (["--variants", "compield"], "did you mean compiled"),
        (["--variants", ","], "--variants"),
        (["--images", "nowhere"], "--saliency"),
        (["--images", "nowhere", "--saliency", "nowhere-either"], "nowhere"),
        (["--data", "shards"], "--data"),
        (["--nonsense"], "--nonsense"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_a_wrong_flag_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    if message in ("nowhere", "--data"):
        pytest.importorskip("nvidia.dali")
    try:
        code = throughput.main([*TINY, "--device", "cpu", "--out", str(tmp_path / "out"), *flags])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_earlier_result_survives_a_wrong_flag(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    run(tmp_path, "--variants", "closed-form")
    kept = (tmp_path / "results.jsonl").read_text()
    assert throughput.main([*TINY, "--device", "cpu", "--out", str(tmp_path), "--images", "x", "--saliency", "y"]) == 2
    assert (tmp_path / "results.jsonl").read_text() == kept != ""


@pytest.mark.gpu
def test_ladder_on_cuda(tmp_path: Path, cuda: torch.device) -> None:
    code, records, summary = run(tmp_path, "--variants", ",".join(STEPS), device="cuda")
    assert code == 0
    assert records.keys() == set(STEPS)
    assert all(entry["peak_bytes"] > 0 for entry in summary["lines"].values())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize256x128x64", "convolution"),
        ("cudnn_infer_ampere_scudnn_winograd_128x128_ldg1_ldg4_relu_tile148t_nt_v1", "convolution"),
        ("triton_red_fused__native_batch_norm_legit_functional_relu_7", "BatchNorm"),
        ("triton_poi_fused_convolution_relu_3", "elementwise"),
        ("triton_red_fused_convolution_native_batch_norm_backward_threshold_backward_12", "BatchNorm"),
        ("_row_kernel", "loss"),
        ("_partials_kernel", "loss"),
        ("_combine_kernel", "loss"),
        ("_combine_statistics_kernel", "BatchNorm"),
        ("_relu_pool_input_gradient_kernel", "BatchNorm"),
        ("_input_gradients_kernel", "BatchNorm"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<…LerpFunctor>", "optimizer"),
        ("nvjet_hsh_128x64_gemm", "matmul"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("something else entirely", "other"),
    ],
)
def test_kernels_are_sorted_by_kind(name: str, kind: str) -> None:
    assert profile_step.kind_of(name) == kind


def test_every_kernel_of_ours_has_its_kind() -> None:
    folder = Path(cast_kernels.__file__).parent
    names = re.findall(r"^def (_\w+_kernel)\(", "".join(path.read_text() for path in folder.glob("*.py")), re.MULTILINE)
    assert len(names) > 10
    assert {profile_step.kind_of(name) for name in names} == {"loss", "BatchNorm"}


def test_idle_time_is_what_no_kernel_covers() -> None:
    events = [
        {"ph": "X", "cat": "kernel", "name": "conv", "ts": 0.0, "dur": 4000.0},
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 2000.0, "dur": 4000.0},  # on another stream
        {"ph": "X", "cat": "gpu_memset", "name": "Memset", "ts": 9000.0, "dur": 1000.0},
        {"ph": "X", "cat": "cpu_op", "name": "aten::conv", "ts": 0.0, "dur": 50000.0},
        {"ph": "i", "cat": "kernel", "name": "mark", "ts": 0.0},
    ]
    spans = profile_step.device_spans(events)
    assert profile_step.busy_time(spans) == 7000
    summary = profile_step.summarise(spans, steps=2, idle=True)
    assert summary.total == 5.0
    assert summary.kinds == {"convolution": (2.0, 0.5), "matmul": (2.0, 0.5), "copy": (0.5, 0.5), "idle": (1.5, 0.0)}
    text = profile_step.markdown(summary, "title")
    assert "| idle | 1.500 | 30.0% | 0.0 |" in text


def test_profile_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--arch", "resnet18", "--size", "32", "--batch", "2", "--queue-size", "16"]
    assert profile_step.main([*flags, "--line", "closed-form", "--steps", "1", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    times = {row["variant"]: row["value"] for row in rows}
    assert times["convolution"] > times.get("pooling", 0.0) > 0
    assert {"BatchNorm", "optimizer"} <= times.keys()
    assert "convolution" in (tmp_path / "profile.md").read_text()
    capsys.readouterr()
    assert profile_step.main([*flags, "--line", "kernels", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_ceilings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = {name: ceilings.CONVOLUTIONS[name] for name in ("stem 7×7/2", "layer4 3×3 512")}
    monkeypatch.setattr(ceilings, "CONVOLUTIONS", small)
    assert ceilings.main(["--device", "cpu", "--batch", "1", "--repeats", "1", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows][:2] == ["copy", "matmul"]
    assert len(rows) == 2 + 2 * len(small)
    assert all(row["value"] > 0 for row in rows)
    assert rows[2]["flops"] == 2 * 112 * 112 * 64 * 3 * 49
    assert "layer4 3×3 512 backward" in capsys.readouterr().out
    assert ceilings.main(["--device", "cpu", "--batch", "0", "--out", str(tmp_path)]) == 2


def test_sanitizer_cases_agree_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for name, case in sanitizer_cases.cases(torch.device("cpu")):
        names.append(name.split()[0])
        assert case() < sanitizer_cases.TOLERANCE, name
    other_forms = {"info_nce_partials", "info_nce_combine", "Partials"}
    assert set(names) == set(cast_kernels.__all__) - other_forms
    monkeypatch.setattr(sanitizer_cases, "cases", lambda device: iter([("astray", lambda: float("nan"))]))
    assert sanitizer_cases.main(["--device", "cpu"]) == 1


def _table(text: str) -> list[list[str]]:
    """The cells of the first table of a report."""
    lines = text.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("| goal"))
    return [line.split("|") for line in lines[start : lines.index("", start)]]


def test_goals_of_the_loader_the_memory_and_the_kernels(tmp_path: Path) -> None:
    env = harness.environment(torch.device("cpu"))

    def leave(phase: str, *rows: tuple[str, str, str, dict[str, int | str], float, str]) -> None:
        results = harness.Results(tmp_path / phase, env)
        for name, line, dtype, shape, value, unit in rows:
            held = harness.Measurement((value,))
            fraction = value if phase == "kernels" else None
            results.add(
                results.record(name, line, held, dtype=dtype, shape=shape, unit=unit, fraction_of_bound=fraction)
            )
        (tmp_path / phase / "log.txt").write_text("")

    batch: dict[str, int | str] = {"batch": 256}
    memory = [
        ("peak_memory", line, "bf16", batch, size, "bytes") for line, size in (("kernels", 1e9), ("published-amp", 2e9))
    ]
    leave("ladder-256", ("step", "groups", "bf16", batch, 1000.0, "images/s"), *memory)
    leave(
        "end-to-end",
        ("step", "groups", "bf16", batch, 1000.0, "images/s"),
        ("end-to-end", "end-to-end", "bf16", batch, 900.0, "images/s"),
    )
    leave("memory", ("step", "groups", "bf16", {"batch": 992}, 1000.0, "images/s"))
    leave(
        "loader",
        ("loader", "native", "uint8", batch, 1100.0, "images/s"),
        ("loader", "native-t8-hw0.9", "uint8", batch, 1500.0, "images/s"),
        ("loader", "packed-256", "uint8", batch, 9000.0, "images/s"),
        ("loader_gpu_share", "product", "bf16", batch, 0.03, "fraction"),
        ("loader_windows", "numpy", "uint8", batch, 5e-3, "s"),
        ("loader_windows", "native", "uint8", batch, 1e-3, "s"),
    )
    leave(
        "kernels",
        ("gradcam_cosine", "operator", "bfloat16", {"N": 512}, 0.8, "µs"),
        ("info_nce", "operator", "bfloat16", {"N": 256, "K": 65536}, 0.7, "µs"),
        ("info_nce", "eager", "bfloat16", {"N": 256, "K": 65536}, 2.8, "µs"),
        ("info_nce", "operator", "bfloat16", {"N": 64, "K": 65536}, 0.1, "µs"),
    )
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    found = {cells[1].strip(): [cell.strip() for cell in cells[3:5]] for cells in _table(text)}
    assert found["end to end with DALI over the step alone"] == ["0.9", "missed by 5.3%"]
    assert found["peak memory of kernels over published-amp"] == ["0.5", "met"]
    assert found["peak memory of streaming over published-amp"] == ["–", "not measured"]
    assert found["largest batch that fits"] == ["992", "–"]
    assert found["loader's best rate from files over the step's"] == ["1.5", "met"]
    assert found["loader, defaults, over the step's rate"] == ["1.1", "missed by 8.3%"]
    assert found["share of the GPU's time that the loader takes"] == ["0.03", "–"]
    assert found["windows: NumPy's CPU time over the native operator's"] == ["5", "met"]
    assert found["gradcam_cosine, N = 512, of its floor"] == ["0.8", "missed by 11.1%"]
    assert found["info_nce, N = 256, K = 65,536, over eager"] == ["4", "met"]
    assert found["the same, of its floor"] == ["0.7", "met"]


def _left_by_gpu_check(out: Path, device: str = "NVIDIA H200") -> None:
    env = dataclasses.replace(harness.environment(torch.device("cpu")), device=device)
    for name, batch, peak in (("ladder-256", 256, 30e9), ("ladder-64", 64, 12e9)):
        results = harness.Results(out / name, env)
        shape = {"batch": batch}
        rates = {"published": 0.4, "moco": 0.1, "kernels": 0.125, "streaming": 0.1, "groups": 0.128}
        for line, seconds in rates.items():
            rate = harness.Measurement((seconds,), rounds=(1,))
            results.add(
                results.record("step", line, rate, dtype="bf16", shape=shape, unit="images/s", scale=lambda s: 256 / s)
            )
        # The rounds say something else than the medians, and one of them less.
        gain = harness.Ratio(1.125, 1.0625, 1.25, 10)
        results.add(results.ratio("streaming/kernels", gain, dtype="bf16", shape=shape))
        held = harness.Measurement((peak,))
        results.add(results.record("peak_memory", "groups", held, dtype="bf16", shape=shape, unit="bytes"))
        (out / name / "log.txt").write_text("")
    (out / "ladder-256" / "status").write_text("ok\n300 s\n")
    (out / "tests").mkdir()
    (out / "tests" / "log.txt").write_text("1 failed\n")
    (out / "tests" / "status").write_text("failed: exit code 1\n10 s\n")


def test_report_of_a_gpu_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _left_by_gpu_check(tmp_path)
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert text.splitlines()[2].startswith("NVIDIA H200, commit ")
    goals = {cells[1].strip(): [cell.strip() for cell in cells[2:5]] for cells in _table(text)}
    assert goals["time of a CAST step over a MoCo step (theory: 1.25)"] == ["at most 1.27", "1.25", "met"]
    assert goals["rate over published"] == ["at least 4", "3.2", "missed by 20.0%"]
    assert goals["images a second, torch.compile (stated for an H200)"] == [
        "at least 4,080",
        "2,048",
        "missed by 49.8%",
    ]
    assert goals["gain by streaming BatchNorm"] == ["at least 1.09", "1.125", "met"]
    assert goals["images a second that pretrain trains at by default (groups)"] == ["–", "2,000", "–"]
    assert goals["its rate over published (one group)"] == ["–", "3.125", "–"]
    assert goals["share of the trunk bound"] == ["at least 0.95", "–", "not measured"]
    assert goals["trunk's traffic, MB an image, streaming (counted)"][2] == "met"
    assert goals["largest batch that fits"] == ["–", "–", "not measured"]
    assert "1 failed\n" in text
    assert "float32: cudnn_allow_tf32 True, matmul_allow_tf32 False, float32_matmul_precision highest" in text
    assert "## ladder-256\n\nok, 300 s\n" in text
    assert "| kernels | 2,048 | 2,048–2,048 | ~3.2 | – | ~1.25 | – | – | 1 |" in text
    assert "| groups | 2,000 | 2,000–2,000 | ~3.12 | – | ~1.28 | – | 27.94 | 1 |" in text
    assert text.count("streaming ÷ kernels: 1.125 (gain; the model says 1.04 to 1.07).") == 2
    assert "Not as above" not in text and "GPU before" not in text
    assert "## ladder-64\n\ncut off, not ended" in text
    assert "1 failed" in text
    assert report.main([str(tmp_path / "absent")]) == 2

    assert report.main([str(tmp_path), "--largest-batch"]) == 1  # the size of the memory is not known yet
    (tmp_path / "environment").mkdir()
    details = {"details": {"gpu_memory_bytes": 80e9}}
    (tmp_path / "environment" / "environment.json").write_text(json.dumps(details))
    capsys.readouterr()
    assert report.main([str(tmp_path), "--largest-batch"]) == 0
    batch = int(capsys.readouterr().out)
    per_image = 18e9 / 192
    filled = 12e9 + (batch - 64) * per_image
    assert filled <= report.HEADROOM * 80e9 < filled + report.BATCH_STEP * per_image


def test_a_report_of_another_gpu_has_no_verdict_on_rates(tmp_path: Path) -> None:
    _left_by_gpu_check(tmp_path, device="NVIDIA A100-SXM4-40GB")
    goals = {cells[1].strip(): [cell.strip() for cell in cells[3:5]] for cells in _table(report.report(tmp_path))}
    assert goals["images a second, torch.compile (stated for an H200)"] == ["2,048", "another GPU, no verdict"]
    assert goals["images a second, streaming (stated for an H200)"] == ["2,560", "another GPU, no verdict"]
    assert goals["rate over published"] == ["3.2", "missed by 20.0%"]


def test_a_report_warns_of_what_does_not_belong_together(tmp_path: Path) -> None:
    _left_by_gpu_check(tmp_path)
    path = tmp_path / "ladder-64" / "results.jsonl"
    rows = [json.loads(line) | {"commit": "0ddc0de"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    time = "2026/11/24 16:00:00.000"
    states = f"{time}, 5120 MiB, 97 %, 1980 MHz, 44, 120.50 W\n{time}, 900 MiB, 0 %, 1410 MHz, 71, 400.00 W\n"
    (tmp_path / "ladder-64" / "gpu.csv").write_text(states)
    (tmp_path / "ladder-256" / "gpu.csv").write_text(states.splitlines()[1] + "\n")
    text = report.report(tmp_path)
    assert text.count("Not as above") == 1
    assert "**Not as above: NVIDIA H200, commit 0ddc0de.**" in text.split("## ladder-64")[1]
    assert text.count("The GPU was not free") == 1
    assert "not free: 5120 MiB were in use before this phase" in text.split("## ladder-64")[1]
    assert "GPU before: memory 5120 MiB, utilisation 97 %, SM clock 1980 MHz, temperature 44, power 120.50 W; " in text
    assert "after: memory 900 MiB, utilisation 0 %, SM clock 1410 MHz, temperature 71, power 400.00 W." in text


@pytest.mark.parametrize(
    ("low", "high", "rounds", "verdict"),
    [
        (1.01, 1.4, 9, "gain"),
        (0.6, 0.99, 9, "loss"),
        (0.9, 1.2, 9, "within the"),
        (None, None, 0, "no round in common"),
    ],
)
def test_streaming_is_judged_by_the_rounds(low: float, high: float, rounds: int, verdict: str) -> None:
    line = {"name": "step", "variant": "trunk-bound", "unit": "images/s", "value": 95.0}
    records = [line, {**line, "variant": "trunk-streaming", "value": 100.0}]
    if rounds:
        ratio = {"name": "ratio", "variant": "trunk-streaming/trunk-bound", "unit": "ratio", "value": 1.0}
        records.append({**ratio, "p20": low, "p80": high, "rounds": rounds})
    (text, _) = report.streaming_lines(records)
    assert text.startswith("trunk-streaming ÷ trunk-bound: ") and f"({verdict}" in text
    assert report.streaming_lines([line]) == report.streaming_lines([]) == []


def test_a_record_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"value": 1}\n{"value"')
    assert report.read_records(tmp_path / "results.jsonl") == [{"value": 1}]
    assert report.read_records(tmp_path / "absent.jsonl") == []
