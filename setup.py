"""Maps the import package ``cast_kernels`` to ``kernels/cast_kernels``; everything else is in pyproject.toml.

The folder ``kernels`` is no package itself: the name belongs to another project on PyPI.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["cast_fast", "cast_fast.*"]), "cast_kernels"],
    package_dir={"cast_kernels": "kernels/cast_kernels"},
)
