"""Build script of cmpose. It never imports torch, so `pip install .` works in any environment.

The folder ``kernels/`` at the top of the repository is installed as ``cmpose.kernels``.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["cmpose", "cmpose.*"]), "cmpose.kernels"],
    package_dir={"cmpose": "cmpose", "cmpose.kernels": "kernels"},
)
