"""Build script of cmpose. It never imports torch, so `pip install .` works in any environment.

The folders ``kernels/`` and ``configs/`` at the top of the repository are installed as
``cmpose.kernels`` and ``cmpose.configs``.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["cmpose", "cmpose.*"]),
        "cmpose.kernels",
        "cmpose.configs",
    ],
    package_dir={
        "cmpose": "cmpose",
        "cmpose.kernels": "kernels",
        "cmpose.configs": "configs",
    },
    package_data={"cmpose.configs": ["*.yaml"], "cmpose": ["py.typed"]},
)
