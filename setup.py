"""Maps the import package ``cast_kernels`` to ``kernels/cast_kernels`` and builds the optional native DALI operator.

Everything else is in pyproject.toml. The folder ``kernels`` is no package itself: the name belongs to another project
on PyPI. An installation never fails for want of a compiler: without the operator the crop windows come from NumPy. The
environment variable CAST_FAST_CUDA (auto, on, off) chooses its CUDA backend; CAST_FAST_NATIVE=off leaves it all out.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


def load_plugin_module():
    """kernels/cast_kernels/dali_plugin.py alone: the package around it needs torch, which a build lacks."""
    spec = importlib.util.spec_from_file_location("dali_plugin", HERE / "kernels/cast_kernels/dali_plugin.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["dali_plugin"] = module
    spec.loader.exec_module(module)
    return module


dali_plugin = load_plugin_module()


def obstacle():
    """Why the native operator cannot be built here, or None."""
    if os.environ.get("CAST_FAST_NATIVE", "on").lower() in ("off", "0", "no"):
        return "CAST_FAST_NATIVE=off"
    try:
        dali_plugin.find_toolchain()
    except dali_plugin.PluginError as error:
        return str(error)
    return None


class BuildWithOperator(build_py):
    """The Python files, then the native operator beside them where it can be built."""

    def run(self):
        super().run()
        reason = obstacle()
        if reason is None:
            native = dali_plugin.NATIVE if self.editable_mode else Path(self.build_lib) / "cast_kernels" / "_native"
            try:
                dali_plugin.build(os.environ.get("CAST_FAST_CUDA", "auto").lower(), native=native)
                return
            except (dali_plugin.PluginError, OSError, ValueError) as error:
                reason = str(error)
        print(f"native DALI operator not built: the crop windows will come from NumPy. {reason}", file=sys.stderr)


class MaybeBinaryDistribution(Distribution):
    """A wheel that holds the operator is no pure Python wheel."""

    def has_ext_modules(self):
        return obstacle() is None


setup(
    packages=[*find_packages(include=["cast_fast", "cast_fast.*"]), "cast_kernels"],
    package_dir={"cast_kernels": "kernels/cast_kernels"},
    cmdclass={"build_py": BuildWithOperator},
    distclass=MaybeBinaryDistribution,
)
