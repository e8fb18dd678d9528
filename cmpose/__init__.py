"""CM-Pose video human pose estimation; see README.md."""

from pathlib import Path

from cmpose._version import __version__

__all__ = ["__version__"]

# Installing puts kernels/ and configs/ into this package. In a checkout that is not installed, as
# on a machine where nothing can be, they are its neighbours and are found there.
_HERE = Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "kernels" / "launch.py").is_file():
    __path__.append(str(_HERE.parent))
