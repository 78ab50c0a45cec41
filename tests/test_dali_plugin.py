"""The native operator returns the integers of the NumPy rule, on the CPU, in its CUDA arithmetic, and on a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from cast_fast.data.saliency_crop import (
    WINDOW_SHAPE,
    CropRule,
    crop_windows,
    unconstrained_windows,
    window_random,
)
from cast_kernels import dali_plugin

pytest.importorskip("nvidia.dali")

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "kernels" / "csrc"
RULES = [CropRule(), CropRule(pair_constraint="independent"), CropRule(phi=0.65), CropRule(phi=0.0), CropRule(phi=1.0)]


NO_DEVICE: Any = None  # DALI's stub asks for an int


class Sample(NamedTuple):
    saliency: np.ndarray
    random: np.ndarray


@pytest.fixture(scope="module")
def toolchain() -> dali_plugin.Toolchain:
    try:
        return dali_plugin.find_toolchain()
    except dali_plugin.PluginError as error:
        pytest.skip(f"the native operator cannot be built here: {error}")


@pytest.fixture(scope="module")
def plugin(request: pytest.FixtureRequest) -> dali_plugin.Status:
    """The operator, loaded; built first where it is not but could be."""
    if dali_plugin.status().library is None:
        request.getfixturevalue("toolchain")
        dali_plugin.build()
    return dali_plugin.load()


def made_samples(count: int, seed: int) -> list[Sample]:
    """Maps of every kind and size, a few of them empty; one in five with extreme or meaningless random numbers."""
    rng = np.random.default_rng(seed)
    nasty = np.array([0.0, np.nextafter(1.0, 0.0), np.nan, np.inf, -np.inf, -1.0, 1e308, 5e-324, 2.0**31, 0.5])
    samples = []
    for index in range(count):
        height, width = rng.integers(1, 100, 2).tolist()
        if index % 10 == 0:
            height, width = [(1, 1), (1, 300), (300, 1), (40, 700), (600, 20), (530, 300), (3, 4300)][index // 10 % 7]
        saliency = rng.integers(0, 128, (height, width)).astype(np.uint8)
        kind = rng.integers(6)
        if kind == 0:
            saliency[rng.integers(height), rng.integers(width)] = 128
        elif kind == 1:
            saliency[rng.random((height, width)) < rng.choice([0.01, 0.3, 0.9])] = 255
        elif kind in (2, 3):
            for _ in range(kind):
                y, x = rng.integers(height), rng.integers(width)
                saliency[y : y + rng.integers(1, 1 + height), x : x + rng.integers(1, 1 + width)] = 200
        elif kind == 4:
            saliency[:] = 255
        random = window_random(rng.random(WINDOW_SHAPE))
        if index % 5 == 0:
            random = np.where(rng.random(WINDOW_SHAPE) < 0.4, rng.choice(nasty, WINDOW_SHAPE), random)
        samples.append(Sample(saliency, random))
    return samples


def expected(sample: Sample, rule: CropRule, constrained: bool = True) -> tuple[np.ndarray, ...]:
    """windows, relative, fallback, held by the NumPy rule."""
    height, width = sample.saliency.shape
    if constrained and (sample.saliency > 127).any():
        windows = crop_windows(sample.saliency, sample.random, rule)
    else:
        windows = unconstrained_windows(height, width, sample.random)
    both = np.stack([windows.query, windows.key])
    return both, windows.relative(height, width), windows.fallback.astype(np.uint8), windows.held


def assert_same(outputs: list[Any], samples: list[Sample], rule: CropRule, constrained: bool = True) -> None:
    for output, dtype in zip(outputs, (np.int32, np.float32, np.uint8, np.float64)):
        assert output.dtype == dtype and len(output) == len(samples)
    for index, sample in enumerate(samples):
        for name, output, value in zip(
            ("windows", "relative", "fallback", "held"), outputs, expected(sample, rule, constrained)
        ):
            np.testing.assert_array_equal(
                output[index], value, f"{name} of sample {index}, map {sample.saliency.shape}, {rule}"
            )


def run_pipeline(
    samples: list[Sample],
    rule: CropRule,
    *,
    threads: int = 2,
    gpu: bool = False,
    constrained: bool = True,
    view: Callable[[np.ndarray], np.ndarray] = lambda saliency: saliency,
    random: list[np.ndarray] | None = None,
) -> list[np.ndarray]:
    from nvidia.dali import fn, pipeline_def

    device: Any = 0 if gpu else None

    @pipeline_def(batch_size=len(samples), num_threads=threads, device_id=device, prefetch_queue_depth=1)
    def pipeline():
        maps = fn.external_source(lambda: [np.ascontiguousarray(view(sample.saliency)) for sample in samples])
        numbers = fn.external_source(lambda: random or [sample.random for sample in samples])
        if gpu:
            maps, numbers = maps.gpu(), numbers.gpu()
        return dali_plugin.saliency_crop(
            maps, numbers, phi=rule.phi, pair_constraint=rule.pair_constraint, constrained=constrained
        )

    pipe = pipeline()
    pipe.build()
    return [np.asarray((output.as_cpu() if gpu else output).as_array()) for output in pipe.run()]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_cpu_backend_equals_numpy(plugin: dali_plugin.Status, rule: CropRule) -> None:
    samples = made_samples(700, seed=int(1000 * rule.phi))
    assert_same(run_pipeline(samples, rule), samples, rule)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_cuda_backend_equals_numpy(plugin: dali_plugin.Status, cuda: Any, rule: CropRule) -> None:
    assert plugin.cuda, "built without the CUDA backend: dali_plugin.py build --cuda on"
    samples = made_samples(700, seed=int(1000 * rule.phi))
    assert_same(run_pipeline(samples, rule, gpu=True), samples, rule)
    assert_same(run_pipeline(samples, rule, gpu=True, constrained=False), samples, rule, constrained=False)


def test_full_size_maps_and_any_number_of_threads(plugin: dali_plugin.Status) -> None:
    rng = np.random.default_rng(0)
    samples = []
    for random in window_random(rng.random((12, *WINDOW_SHAPE))):
        saliency = np.zeros((480, 640), np.uint8)
        y, x = rng.integers(480), rng.integers(640)
        saliency[y : y + 150, x : x + 200] = 255
        samples.append(Sample(saliency, random))
    for threads in (1, 3):
        assert_same(run_pipeline(samples, CropRule(), threads=threads), samples, CropRule())
    with_channel = run_pipeline(samples, CropRule(), view=lambda saliency: saliency[:, :, None])
    assert_same(with_channel, samples, CropRule())


def test_tall_columns(plugin: dali_plugin.Status) -> None:
    """Columns with 254 to 514 salient pixels: the CPU backend counts them in bytes first. Panoramas, so boxes count."""
    rng = np.random.default_rng(5)
    samples = []
    for height in (254, 255, 256, 257, 510, 511, 512, 513, 514):
        saliency = np.zeros((height, 40), np.uint8)
        saliency[:, 10:30] = 255
        samples += [Sample(saliency, random) for random in window_random(rng.random((4, *WINDOW_SHAPE)))]
    assert_same(run_pipeline(samples, CropRule()), samples, CropRule())


def test_unconstrained_windows_from_maps_images_and_shapes(plugin: dali_plugin.Status) -> None:
    samples = made_samples(200, seed=1)
    rule = CropRule()
    views: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda saliency: saliency,
        lambda saliency: np.repeat(saliency[:, :, None], 3, axis=2),
        lambda saliency: np.array([*saliency.shape, 3], np.int64),
    ]
    for view in views:
        outputs = run_pipeline(samples, rule, constrained=False, view=view)
        assert_same(outputs, samples, rule, constrained=False)


def test_relative_windows_serve_a_resize(plugin: dali_plugin.Status) -> None:
    """The float32 shares select the very pixels of the window when handed to a resize of the window's own size."""
    from nvidia.dali import fn, pipeline_def, types

    rng = np.random.default_rng(2)
    saliency = rng.integers(0, 256, (60, 80)).astype(np.uint8)
    random = window_random(rng.random(WINDOW_SHAPE))

    @pipeline_def(batch_size=1, num_threads=1, device_id=NO_DEVICE, prefetch_queue_depth=1)
    def pipeline() -> Any:
        maps = fn.external_source(lambda: [saliency[:, :, None]], layout="HWC")
        numbers = fn.external_source(lambda: [random])
        windows, relative, _, _ = dali_plugin.saliency_crop(maps, numbers)
        corners = relative[0]
        size = fn.cast(windows[0][2:4], dtype=types.FLOAT)
        return windows, fn.resize(
            maps,
            size=size,
            roi_start=corners[0:2],
            roi_end=corners[2:4],
            roi_relative=True,
            interp_type=types.INTERP_NN,
        )

    pipe = pipeline()
    pipe.build()
    windows, crop = (np.asarray(output.at(0)) for output in pipe.run())
    y, x, h, w = windows[0].tolist()
    np.testing.assert_array_equal(crop[:, :, 0], saliency[y : y + h, x : x + w])


def test_operator_is_stateless_in_checkpoints(plugin: dali_plugin.Status) -> None:
    from nvidia.dali import fn, pipeline_def

    samples = made_samples(64, seed=3)

    @pipeline_def(batch_size=8, num_threads=2, device_id=NO_DEVICE, prefetch_queue_depth=1, enable_checkpointing=True)
    def pipeline():
        maps = fn.external_source(lambda info: samples[info.idx_in_epoch % 64].saliency, batch=False)
        numbers = fn.external_source(lambda info: samples[info.idx_in_epoch % 64].random, batch=False)
        return dali_plugin.saliency_crop(maps, numbers)

    first = pipeline()
    first.build()
    for _ in range(3):
        first.run()
    checkpoint = first.checkpoint()
    resumed = pipeline(checkpoint=checkpoint)
    resumed.build()
    for _ in range(2):
        for old, new in zip(first.run(), resumed.run()):
            np.testing.assert_array_equal(old.as_array(), new.as_array())


@pytest.mark.parametrize(
    ("view", "random", "constrained", "message"),
    [
        (lambda s: s.astype(np.float32), np.zeros(WINDOW_SHAPE), True, "expected uint8"),
        (lambda s: np.stack([s, s, s], axis=2), np.zeros(WINDOW_SHAPE), True, r"shape \(H, W\)"),
        (lambda s: np.array(s.shape, np.int64), np.zeros(WINDOW_SHAPE), True, "only constrained=False"),
        (lambda s: np.array([0, 5], np.int64), np.zeros(WINDOW_SHAPE), False, "sides of at least 1"),
        (lambda s: s, np.zeros(WINDOW_SHAPE, np.float32), True, "expected float64"),
        (lambda s: s, np.zeros((2, 10, 26)), True, r"shape \(2, 11, 26\)"),
    ],
)
def test_operator_refuses_wrong_inputs(
    plugin: dali_plugin.Status, view: Any, random: np.ndarray, constrained: bool, message: str
) -> None:
    samples = made_samples(1, seed=4)
    with pytest.raises(RuntimeError, match=message):
        run_pipeline(samples, CropRule(), view=view, random=[random], constrained=constrained)


def test_arguments_are_refused_before_the_pipeline() -> None:
    with pytest.raises(ValueError, match=r"phi: got 1\.5"):
        dali_plugin.saliency_crop(None, None, phi=1.5)
    with pytest.raises(ValueError, match="pair_constraint: got 'both'"):
        dali_plugin.saliency_crop(None, None, pair_constraint="both")
    with pytest.raises(ValueError, match="cuda: got 'maybe'"):
        dali_plugin.build("maybe")


HARNESS = r"""
// Runs the rule as a block of CUDA threads does, one thread after the other.
#include <cstdio>
#include <vector>
#include "saliency_crop.h"
using namespace cast_fast;

struct BlockMap {
  const uint8_t *values;
  int32_t rows, columns;
  int threads;
  int32_t height() const { return rows; }
  int32_t width() const { return columns; }
  int32_t Count(const Window &window) const {
    int32_t count = 0;
    for (int thread = 0; thread < threads; thread++) count += CountShare(values, columns, window, thread, threads);
    return count;
  }
  Survey Look(const Window &window) const {
    Survey all;
    for (int thread = 0; thread < threads; thread++) {
      const Survey one = LookShare(values, columns, window, thread, threads);
      all.count += one.count;
      all.sum_y += one.sum_y;
      all.sum_x += one.sum_x;
      all.y0 = one.y0 < all.y0 ? one.y0 : all.y0;
      all.x0 = one.x0 < all.x0 ? one.x0 : all.x0;
      all.y1 = one.y1 > all.y1 ? one.y1 : all.y1;
      all.x1 = one.x1 > all.x1 ? one.x1 : all.x1;
    }
    return all;
  }
};

int main() {
  struct { int32_t height, width, threads, overlap; double phi; } head;
  while (fread(&head, sizeof head, 1, stdin) == 1) {
    std::vector<uint8_t> values(static_cast<size_t>(head.height) * head.width);
    std::vector<double> random(kRandomNumbers);
    if (fread(values.data(), 1, values.size(), stdin) != values.size()) return 3;
    if (fread(random.data(), sizeof(double), random.size(), stdin) != random.size()) return 3;
    int32_t windows[8];
    float relative[8];
    uint8_t fallback[2];
    double held[2];
    const Sample sample = {values.data(), random.data(), windows, relative, fallback, held, head.height, head.width};
    const BlockMap map = {values.data(), head.height, head.width, head.threads};
    Store(Choose(map, random.data(), Rule{head.phi, head.overlap != 0, true}), sample);
    fwrite(windows, sizeof windows, 1, stdout);
    fwrite(relative, sizeof relative, 1, stdout);
    fwrite(fallback, sizeof fallback, 1, stdout);
    fwrite(held, sizeof held, 1, stdout);
  }
  return 0;
}
"""


def test_a_build_finds_dali_where_only_pythonpath_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """cmake asks Python again where DALI is."""
    monkeypatch.setenv("PYTHONPATH", "/of/an/isolated/build")
    environment = dali_plugin._build_environment(dali_plugin.find_toolchain())
    question = "import importlib.util, sys; sys.exit(importlib.util.find_spec('nvidia.dali') is None)"
    subprocess.run([sys.executable, "-S", "-c", question], env=environment, check=True)


def test_cuda_arithmetic_on_the_host_equals_numpy(tmp_path: Path) -> None:
    """What the kernel runs, thread by thread, compiled for the CPU with the sanitizers that stop at undefined code."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "harness.cc").write_text(HARNESS)
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Werror"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = tmp_path / "harness"
    subprocess.run([compiler, *flags, f"-I{CSRC}", str(tmp_path / "harness.cc"), "-o", str(program)], check=True)
    cases, data = [], []
    for number, rule in enumerate(RULES):
        for index, sample in enumerate(made_samples(150, seed=10 + number)):
            height, width = sample.saliency.shape
            threads = (32, 256)[index % 2]
            data.append(struct.pack("4id", height, width, threads, rule.pair_constraint == "overlap", rule.phi))
            data += [sample.saliency.tobytes(), sample.random.tobytes()]
            cases.append((sample, rule))
    done = subprocess.run([str(program)], input=b"".join(data), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    layout = np.dtype([("windows", "i4", (2, 4)), ("relative", "f4", (2, 4)), ("fallback", "u1", 2), ("held", "f8", 2)])
    results = np.frombuffer(done.stdout, layout)
    assert len(results) == len(cases)
    for result, (sample, rule) in zip(results, cases):
        for name, value in zip(layout.names or (), expected(sample, rule)):
            np.testing.assert_array_equal(result[name], value, f"{name}, map {sample.saliency.shape}, {rule}")


def test_cuda_kernel_compiles_without_contraction_or_spills(tmp_path: Path) -> None:
    nvcc = dali_plugin.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    match = re.search(r"COMPILE_LANGUAGE:CUDA>:([^>]*)>", (ROOT / "CMakeLists.txt").read_text())
    assert match is not None
    flags = match.group(1).split(";")
    source = str(CSRC / "saliency_crop.cu")
    known = subprocess.run([str(nvcc), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    wanted = [number for number in (80, 90, 100) if f"sm_{number}" in known]
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in wanted]
    command = [str(nvcc), "-c", *flags, *targets, source, "-o", str(tmp_path / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert re.findall(r"Compiling entry function '\w*SaliencyCropKernel\w*' for 'sm_(\d+)'", report) == [
        str(number) for number in wanted
    ]
    assert re.findall(r"(\d+) bytes spill (?:stores|loads)", report) == ["0"] * (2 * len(wanted))
    ptx = tmp_path / "kernel.ptx"
    command = [str(nvcc), "-ptx", *flags, f"-arch=compute_{wanted[0]}", source, "-o", str(ptx)]
    subprocess.run(command, check=True, capture_output=True)
    text = ptx.read_text()
    assert "mul.rn.f64" in text or "mul.f64" in text
    assert not re.search(r"\bfma\.", text), "a contracted multiply-add would change windows"
    assert ".approx" not in text


@pytest.fixture
def native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for libraries instead of the package's own."""
    monkeypatch.setattr(dali_plugin, "NATIVE", tmp_path)
    return tmp_path


def pretend_library(native: Path, version: str | None, **record: Any) -> Path:
    folder = native / f"dali-{version}"
    folder.mkdir()
    (folder / dali_plugin.LIBRARY).write_bytes(b"")
    (folder / "build.json").write_text(json.dumps(record))
    return folder


def test_loading_twice_is_harmless(plugin: dali_plugin.Status, native: Path) -> None:
    """Also when the second library is another file: DALI would abort the process if it were loaded."""
    dali_plugin.load()
    version = dali_plugin.dali_version()
    folder = native / f"dali-{version}"
    shutil.copytree(plugin.library.parent if plugin.library else native, folder)
    dali_plugin.load()
    assert dali_plugin.unavailable_reason() is None


def test_status_names_the_cause_and_the_command(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = dali_plugin.dali_version()
    found = dali_plugin.status()
    assert found.library is None and found.reason is not None
    assert "is not built" in found.reason and found.reason.endswith(dali_plugin.rebuild_command())
    pretend_library(native, "1.2.3")
    assert f"is built for DALI 1.2.3, but {version} is installed" in (dali_plugin.status().reason or "")
    folder = pretend_library(native, version, dali=version, cuda=False, sources="of another day")
    assert "older than its sources" in (dali_plugin.status().reason or "")
    (folder / "build.json").write_text(json.dumps({"dali": "1.2.3", "cuda": False, "sources": ""}))
    assert f"was built for DALI 1.2.3, but {version} is installed" in (dali_plugin.status().reason or "")
    (folder / "build.json").write_text("{")
    assert "unreadable" in (dali_plugin.status().reason or "")
    monkeypatch.setattr(dali_plugin, "dali_version", lambda: None)
    assert dali_plugin.status().reason == "NVIDIA DALI is not installed"
    with pytest.raises(dali_plugin.PluginError, match="not installed"):
        dali_plugin.load()


def test_a_library_of_another_version_is_not_loaded(tmp_path: Path) -> None:
    """In a process of its own, where no other test has loaded the operator."""
    version = dali_plugin.dali_version()
    pretend_library(tmp_path, version, dali="1.2.3", cuda=False, sources="")
    code = (
        "import sys; from pathlib import Path; import dali_plugin\n"
        f"dali_plugin.NATIVE = Path({str(tmp_path)!r})\n"
        "print(dali_plugin.unavailable_reason())\n"
        "from nvidia.dali import backend; assert backend.TryGetSchema(dali_plugin.OPERATOR) is None\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels" / "cast_kernels")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert f"was built for DALI 1.2.3, but {version} is installed; rebuild: " in done.stdout


@pytest.fixture
def no_compiler(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has neither compiler nor cmake."""
    (tmp_path / "bin").mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CUDA_HOME", "CUDACXX")}
    return {**environment, "PATH": str(tmp_path / "bin")}


def test_building_without_a_compiler_says_so(tmp_path: Path, no_compiler: dict[str, str]) -> None:
    script = str(ROOT / "kernels" / "cast_kernels" / "dali_plugin.py")
    for option, code in (([], 1), (["--optional"], 0)):
        command = [sys.executable, script, "build", "--native", str(tmp_path / "native"), *option]
        done = subprocess.run(command, capture_output=True, text=True, env=no_compiler, check=False)
        assert done.returncode == code
        assert "no C++ compiler found" in done.stderr and "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_installing_without_a_compiler_succeeds(tmp_path: Path, no_compiler: dict[str, str]) -> None:
    command = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path / "build")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=no_compiler, check=False)
    assert done.returncode == 0, done.stderr
    assert "the crop windows will come from NumPy. no C++ compiler found" in done.stderr
    assert (tmp_path / "build" / "lib" / "cast_kernels" / "dali_plugin.py").is_file()


def test_a_failing_compiler_is_reported(
    toolchain: dali_plugin.Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho 'this compiler is broken' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(dali_plugin.PluginError, match="this compiler is broken"):
        dali_plugin.build("off", native=tmp_path / "native")
    assert not list((tmp_path / "native").rglob(dali_plugin.LIBRARY))
