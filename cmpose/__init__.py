"""CM-Pose video human pose estimation; see README.md."""

import os

from cmpose._version import __version__

__all__ = ["__version__"]

# Installing puts kernels/ and configs/ into this package. In a checkout that is not installed, as
# on a machine where nothing can be, they are its neighbours and are found there.
_HERE = os.path.dirname(os.path.abspath(__file__))
_CHECKOUT = os.path.dirname(_HERE)
if not os.path.isdir(os.path.join(_HERE, "kernels")) and os.path.isfile(
    os.path.join(_CHECKOUT, "kernels", "launch.py")
):
    __path__.append(_CHECKOUT)
