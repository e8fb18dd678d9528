"""CM-Pose video human pose estimation; see README.md."""

from cmpose._version import __version__

__all__ = ["__version__"]
