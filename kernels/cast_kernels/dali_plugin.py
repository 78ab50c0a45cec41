"""The native DALI operators: finding, building and loading their library.

``ReadMembers`` reads members of shards; ``SaliencyCrop`` chooses the windows of crops; ``CropViews`` and
``SaliencyTargets`` make, on a CPU, what the training step gets of an image and its map.

The library is compiled against one version of DALI (its symbols carry the version) and lies in
``cast_kernels/_native/dali-VERSION/`` beside a ``build.json`` that says what it was built from. It is optional: without
it, Python's threads read, the windows come from ``cast_fast.data.saliency_crop``, which chooses the same ones, and the
views from DALI's own operators, which are slower on a CPU.

This file also runs as a script and imports only the standard library until the operator is loaded, so that ``setup.py``
and ``CMakeLists.txt`` can use it in an environment where nothing is installed::

    python kernels/cast_kernels/dali_plugin.py build [--cuda auto|on|off] [--optional]
    python kernels/cast_kernels/dali_plugin.py status
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger("cast_fast")

OPERATOR = "SaliencyCrop"
LIBRARY = "libcast_fast_dali.so"
NATIVE = Path(__file__).resolve().parent / "_native"
# present in a checkout (and when installing from one), absent from an installed wheel
PROJECT = Path(__file__).resolve().parents[2]
SOURCES = ("CMakeLists.txt", "kernels/csrc")
CUDA_CHOICES = ("auto", "on", "off")
# what DALI's headers include of CUDA's, and the package of PyPI that has it
CUDA_HEADERS = {
    "cuda_runtime_api.h": "nvidia-cuda-runtime",
    "crt/host_config.h": "nvidia-cuda-crt",
    "nv/target": "nvidia-cuda-cccl",
}
PAIR_CONSTRAINTS = ("overlap", "independent")


class PluginError(RuntimeError):
    """The native operator cannot be built or loaded; the message gives the reason and what to do."""


class Status(NamedTuple):
    """What `status` found.

    Attributes:
        library: the library to load, or None.
        cuda: whether it has the CUDA backend.
        reason: why there is no library that fits, or None.
    """

    library: Path | None
    cuda: bool
    reason: str | None


class Toolchain(NamedTuple):
    """What a build uses: paths of DALI, of the CUDA headers that DALI's headers include, and of the programs."""

    dali_version: str
    dali_include: Path
    dali_library: Path
    cuda_headers: tuple[Path, ...]
    cmake: Path
    compiler: Path
    nvcc: Path | None


def rebuild_command() -> str:
    """The shell command that builds the operator for the installed DALI."""
    if _has_sources():
        return f"{sys.executable} {Path(__file__).resolve()} build"
    return "pip install --force-reinstall --no-deps PATH_OF_THE_CAST_FAST_CHECKOUT"


def status() -> Status:
    """Find the library that fits the installed DALI, without loading anything."""
    version = dali_version()
    if version is None:
        return Status(None, False, "NVIDIA DALI is not installed")
    folder = NATIVE / f"dali-{version}"
    library = folder / LIBRARY
    if not library.is_file():
        others = sorted(path.parent.name.removeprefix("dali-") for path in NATIVE.glob(f"dali-*/{LIBRARY}"))
        built = f"is built for DALI {', '.join(others)}, but {version} is installed" if others else "is not built"
        obstacle = ""
        if _has_sources():
            try:
                find_toolchain()
            except PluginError as error:
                obstacle = f" (so far it cannot be: {error})"
        return Status(None, False, f"the native operator {built}{obstacle}; build it with: {rebuild_command()}")
    try:
        record = json.loads((folder / "build.json").read_text())
        recorded, sources, cuda = record["dali"], record["sources"], bool(record["cuda"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Status(None, False, f"{folder / 'build.json'} is unreadable ({error}); rebuild: {rebuild_command()}")
    if recorded != version:
        reason = f"{library} was built for DALI {recorded}, but {version} is installed; rebuild: {rebuild_command()}"
        return Status(None, False, reason)
    if _has_sources() and sources != _source_hash():
        return Status(None, False, f"{library} is older than its sources; rebuild: {rebuild_command()}")
    return Status(library, cuda, None)


def load() -> Status:
    """Make ``nvidia.dali.fn.saliency_crop`` available; harmless when it is already.

    Raises:
        PluginError: if no library fits the installed DALI, or it cannot be loaded. Names the command that rebuilds it.
    """
    found = status()
    if found.library is None and found.reason is not None and dali_version() is None:
        raise PluginError(found.reason)
    from nvidia.dali import backend, plugin_manager

    # DALI aborts the process when an operator is registered twice, from whichever file
    if backend.TryGetSchema(OPERATOR) is not None:
        return found
    if found.library is None:
        raise PluginError(found.reason)
    try:
        plugin_manager.load_library(str(found.library))
    except RuntimeError as error:
        raise PluginError(f"DALI cannot load {found.library}: {error}; rebuild: {rebuild_command()}") from error
    return found


@functools.cache
def unavailable_reason() -> str | None:
    """Why the native operator cannot be used in this process, or None once it is loaded. Asked once."""
    try:
        load()
    except PluginError as error:
        return str(error)
    return None


def saliency_crop(
    maps: Any,
    random: Any,
    *,
    phi: float = 0.2,
    pair_constraint: str = "overlap",
    constrained: bool = True,
    device: str | None = None,
) -> tuple[Any, Any, Any, Any]:
    """The operator inside a DALI pipeline; the rule is that of ``cast_fast.data.saliency_crop``.

    Args:
        maps: uint8 saliency maps (H, W) or (H, W, 1), salient where > 127. With ``constrained=False`` any uint8 images
            or, on the CPU, their shapes as from ``fn.peek_image_shape``.
        random: float64 (2, 11, 26), as made by ``window_random``, on the device of the maps.
        phi, pair_constraint: as in ``CropRule``.
        constrained: False gives ``unconstrained_windows``; so do maps without a salient pixel.
        device: "cpu" or "gpu"; None: where the maps are.

    Returns:
        (windows int32 (2, 4), relative float32 (2, 4), fallback uint8 (2,), held float64 (2,)) per sample: the fields
        of ``Windows`` with query and key in one tensor, and ``Windows.relative``. ``held`` is 0 where unconstrained.

    Raises:
        PluginError: as `load` does.
        ValueError: for ``phi`` outside [0, 1] or an unknown ``pair_constraint``. The operator itself refuses wrong
            inputs, by DALI's RuntimeError.
    """
    if not 0.0 <= phi <= 1.0:
        raise ValueError(f"phi: got {phi!r}, expected a number in [0, 1]")
    if pair_constraint not in PAIR_CONSTRAINTS:
        raise ValueError(f"pair_constraint: got {pair_constraint!r}, expected one of {PAIR_CONSTRAINTS}")
    load()
    from nvidia.dali import fn

    # DALI would round a number argument to float32
    arguments: dict[str, Any] = {
        "phi": repr(float(phi)),
        "pair_constraint": pair_constraint,
        "constrained": constrained,
    }
    if device is not None:
        arguments["device"] = device
    windows, relative, fallback, held = fn.saliency_crop(maps, random, **arguments)
    return windows, relative, fallback, held


def crop_views(images: Any, windows: Any, mirrors: Any, colours: Any = None, *, size: int) -> tuple[Any, Any]:
    """Both views of each image, inside a DALI pipeline, on the CPU.

    Args:
        images: uint8 (H, W, 3).
        windows: float32 (2, 4): ``relative`` of `saliency_crop`.
        mirrors: float32 (2, 2): not 0 in column 1 of a view that is flipped left to right.
        colours: float32 (2, 3, 4): [R', G', B'] = M [R, G, B, 1] on 0 to 255, rounded and clamped after it; None
            leaves the colours alone.
        size: side of the views.

    Returns:
        Query and key, uint8 (size, size, 3): resized by a triangle filter as wide as the scale, at least a pixel.

    Raises:
        PluginError: as `load` does. The operator itself refuses wrong inputs, by DALI's RuntimeError.
    """
    load()
    from nvidia.dali import fn

    query, key = fn.crop_views(images, windows, mirrors, *([] if colours is None else [colours]), size=size)
    return query, key


def saliency_targets(maps: Any, windows: Any, mirrors: Any, *, size: int, grid: tuple[int, int]) -> tuple[Any, Any]:
    """What the attention loss needs of each map, inside a DALI pipeline, on the CPU.

    Args:
        maps: uint8 (H, W, 1), salient where > 127.
        windows, mirrors: as of `crop_views`.
        size: side of the views.
        grid: rows and columns of cells.

    Returns:
        Salient share of each cell of the grid over the query's window, float32 ``grid``, an exact area average; and the
        key view's mask, uint8 (size, size, 1), 1 where the view's filter sees more salient than other area.

    Raises:
        PluginError: as `load` does. The operator itself refuses wrong inputs, by DALI's RuntimeError.
    """
    load()
    from nvidia.dali import fn

    share, mask = fn.saliency_targets(maps, windows, mirrors, size=size, grid=list(grid))
    return share, mask


def read_members(places: Any, ahead: Any, *, files: Sequence[str], parts: int) -> tuple[Any, ...]:
    """Parts of files, inside a DALI pipeline, read by its threads into its buffers.

    Args:
        places: int64 (parts, 3), ``[file, offset, size]``, a file being its place in ``files``.
        ahead: the same of what will be wanted next; the system is asked to read it ahead.
        files: their paths; they stay open while the pipeline lives.
        parts: of a sample.

    Returns:
        As many nodes as ``parts``, uint8 (size,).

    Raises:
        PluginError: as `load` does. The operator itself refuses wrong inputs and names a file that cannot be read, by
            DALI's RuntimeError.
    """
    load()
    from nvidia.dali import fn

    read = fn.read_members(places, ahead, files=list(files), parts=parts)
    return (read,) if parts == 1 else tuple(read)


def find_toolchain() -> Toolchain:
    """Everything a build needs.

    Raises:
        PluginError: naming what is missing.
    """
    if platform.system() != "Linux":
        raise PluginError(f"the native operator needs Linux, not {platform.system()}")
    if not _has_sources():
        raise PluginError(f"the operator's sources are not in {PROJECT}: build it from a checkout")
    version, folder = dali_version(), _dali_folder()
    if version is None or folder is None:
        raise PluginError("NVIDIA DALI is not installed (pip install nvidia-dali-cuda130)")
    include = folder / "include"
    if not (include / "dali" / "pipeline" / "operator" / "operator.h").is_file():
        prefix = os.environ.get("CONDA_PREFIX", "")  # conda packages the headers apart
        include = Path(prefix) / "include"
        if not (include / "dali" / "pipeline" / "operator" / "operator.h").is_file():
            raise PluginError(f"DALI {version} in {folder} comes without its headers")
    compiler = _which(os.environ.get("CXX", ""), "g++", "c++", "clang++")
    if compiler is None:
        raise PluginError("no C++ compiler found (Debian and Ubuntu: apt-get install g++)")
    cmake = _which("cmake")
    if cmake is None:
        raise PluginError("cmake not found (pip install cmake)")
    nvcc = find_nvcc()
    return Toolchain(version, include, folder, _find_cuda_headers(nvcc), cmake, compiler, nvcc)


def build(cuda: str = "auto", *, native: Path = NATIVE, verbose: bool = False) -> Path:
    """Compile the operator for the installed DALI, unless a current build is there.

    Args:
        cuda: "on", "off" or "auto" (when nvcc is found and works): whether to compile the CUDA backend.
        native: the folder that gets ``dali-VERSION/``.
        verbose: show the output of the compilers.

    Returns:
        The library.

    Raises:
        PluginError: if something is missing, with its name, or the compiler fails, with the end of its output.
        ValueError: for another value of ``cuda``.
    """
    if cuda not in CUDA_CHOICES:
        raise ValueError(f"cuda: got {cuda!r}, expected one of {CUDA_CHOICES}")
    tools = find_toolchain()
    with_cuda = cuda == "on" or (cuda == "auto" and tools.nvcc is not None)
    if with_cuda and tools.nvcc is None:
        raise PluginError("cuda=on, but no nvcc found: install a CUDA toolkit, or nvidia-cuda-nvcc with pip")
    try:
        return _build(tools, with_cuda, native, verbose)
    except PluginError as error:
        if cuda != "auto" or not with_cuda:
            raise
        log.warning("native DALI operator: building the CPU backend only, as %s does not work: %s", tools.nvcc, error)
        return _build(tools, False, native, verbose)


def _build(tools: Toolchain, with_cuda: bool, native: Path, verbose: bool) -> Path:
    record = {"dali": tools.dali_version, "cuda": with_cuda, "sources": _source_hash()}
    folder = native / f"dali-{tools.dali_version}"
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        library = folder / LIBRARY
        with contextlib.suppress(OSError, ValueError):
            if library.is_file() and json.loads((folder / "build.json").read_text()) == record:
                return library
        with tempfile.TemporaryDirectory(prefix="cast_fast_build_") as scratch:
            configure = [
                str(tools.cmake),
                *("-S", str(PROJECT), "-B", scratch),
                f"-DPython3_EXECUTABLE={sys.executable}",
                f"-DCMAKE_CXX_COMPILER={tools.compiler}",
                f"-DCAST_FAST_CUDA={'on' if with_cuda else 'off'}",
            ]
            ninja = _which("ninja")
            if ninja is not None:
                configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
            elif _which("make") is None:
                raise PluginError("neither make nor ninja found (pip install ninja)")
            environment = _build_environment(tools)
            _call(configure, environment, verbose)
            build_command = [str(tools.cmake), "--build", scratch, "--parallel", str(os.cpu_count() or 1)]
            _call(build_command, environment, verbose)
            # the record goes first and comes back last: a build that is cut short never looks current
            (folder / "build.json").unlink(missing_ok=True)
            shutil.copyfile(Path(scratch) / LIBRARY, folder / (LIBRARY + ".new"))
            os.replace(folder / (LIBRARY + ".new"), library)
        (folder / "build.json.new").write_text(json.dumps(record, indent=1) + "\n")
        os.replace(folder / "build.json.new", folder / "build.json")
    return library


def _build_environment(tools: Toolchain) -> dict[str, str]:
    # pip's isolated builds hide the environment through PYTHONPATH, also from a cmake that pip installed there. Where
    # DALI is stays known: elsewhere it may have been found through that variable alone.
    environment = {**os.environ, "PYTHONPATH": str(tools.dali_library.parents[1])}
    if tools.nvcc is not None:
        # pip's nvcc looks for its libraries in lib64, but its packages put them in lib
        libraries = tools.nvcc.resolve().parents[1] / "lib"
        if (libraries / "libcudart_static.a").is_file():
            environment["LIBRARY_PATH"] = os.pathsep.join(
                [str(libraries), *filter(None, [environment.get("LIBRARY_PATH")])]
            )
    return environment


def _call(command: list[str], environment: dict[str, str], verbose: bool) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )
    if verbose:
        print(done.stdout, end="")
    if done.returncode != 0:
        raise PluginError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One build at a time in a folder, also between processes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _has_sources() -> bool:
    return all((PROJECT / name).exists() for name in SOURCES)


def _source_hash() -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        path = PROJECT / name
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _site_folders() -> list[str]:
    """Where packages may lie. Inside pip's isolated build, sys.path lacks the environment that is installed into."""
    paths = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    return list(dict.fromkeys(path for path in paths if path and os.path.isdir(path)))


def dali_version() -> str | None:
    """Version of the installed NVIDIA DALI, from its metadata; None without it."""
    for distribution in importlib.metadata.distributions(path=_site_folders()):
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name.startswith("nvidia-dali-cuda"):
            return distribution.version
    return None


def _dali_folder() -> Path | None:
    for path in _site_folders():
        folder = Path(path) / "nvidia" / "dali"
        if (folder / "libdali.so").is_file():
            return folder
    return None


def _which(*names: str) -> Path | None:
    """A program on PATH or beside this interpreter, where pip puts the programs of an environment."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])
    for name in names:
        found = shutil.which(name, path=path) if name else None
        if found:
            return Path(found)
    return None


def find_nvcc() -> Path | None:
    """The CUDA compiler: of CUDACXX, CUDA_HOME, PATH, /usr/local/cuda, or pip's nvidia-cuda-nvcc; None without one."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.environ.get("CUDACXX", ""), *(os.path.join(home, "bin", "nvcc") for home in homes if home), "nvcc"]
    found = _which(*candidates)
    if found is not None:
        return found
    packaged = [Path(path).glob("nvidia/*/bin/nvcc") for path in _site_folders()]
    for nvcc in [Path("/usr/local/cuda/bin/nvcc"), *(nvcc for group in packaged for nvcc in group)]:
        if os.access(nvcc, os.X_OK):
            return nvcc
    return None


def _find_cuda_headers(nvcc: Path | None) -> tuple[Path, ...]:
    """Include folders with the headers of CUDA that DALI's headers include, with or without a CUDA compiler."""
    roots = [Path(home) for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    if nvcc is not None:
        roots.append(nvcc.resolve().parents[1])
    roots.append(Path("/usr/local/cuda"))
    folders = [root / "include" for root in roots]
    for path in _site_folders():
        folders += sorted(Path(path).glob("nvidia/cu*/include"))  # CUDA 13 and later, then 12
        folders += sorted(Path(path).glob("nvidia/cuda_*/include"))
    folders = [folder for parent in folders for folder in (parent, parent / "cccl")]
    for folder in folders:
        if all((folder / header).is_file() for header in CUDA_HEADERS):
            return (folder,)
    chosen: list[Path] = []
    for header, package in CUDA_HEADERS.items():
        folder = next((folder for folder in folders if (folder / header).is_file()), None)
        if folder is None:
            raise PluginError(f"DALI's headers need {header} of CUDA, which is not found (pip install {package})")
        chosen.append(folder)
    return tuple(dict.fromkeys(chosen))


def main(arguments: list[str] | None = None) -> int:
    """Command line: build, status, or paths (JSON for CMakeLists.txt)."""
    parser = argparse.ArgumentParser(prog="dali_plugin.py", description="Build or look for the native DALI operator.")
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="compile it for the installed DALI")
    default = os.environ.get("CAST_FAST_CUDA", "auto").lower()
    builder.add_argument("--cuda", choices=CUDA_CHOICES, default=default, help="CUDA backend (default: %(default)s)")
    builder.add_argument("--optional", action="store_true", help="when it cannot be built, say why and succeed")
    builder.add_argument("--native", type=Path, default=NATIVE, help="where it goes (default: %(default)s)")
    builder.add_argument("--verbose", action="store_true", help="show the compilers' output")
    commands.add_parser("status", help="say whether it is there")
    commands.add_parser("paths", help="what CMakeLists.txt asks for")
    options = parser.parse_args(arguments)
    try:
        if options.command == "paths":
            tools = find_toolchain()
            print(
                json.dumps(
                    {
                        "dali_include": str(tools.dali_include),
                        "dali_library": str(tools.dali_library),
                        "cuda_headers": ";".join(map(str, tools.cuda_headers)),
                        "nvcc": str(tools.nvcc or ""),
                    }
                )
            )
        elif options.command == "build":
            library = build(options.cuda, native=options.native, verbose=options.verbose)
            cuda = json.loads((library.parent / "build.json").read_text())["cuda"]
            print(f"native DALI operator ({'CPU and CUDA' if cuda else 'CPU only'}): {library}")
        else:
            found = status()
            backends = "CPU and CUDA" if found.cuda else "CPU only"
            print(f"native DALI operator ({backends}): {found.library}" if found.library else found.reason)
            return 0 if found.library else 1
    except PluginError as error:
        optional = options.command == "build" and options.optional
        note = ": crop windows will come from NumPy, views from DALI's own operators" if optional else ""
        print(f"native DALI operator not built{note}. {error}", file=sys.stderr)
        return 0 if optional else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
