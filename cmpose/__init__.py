"""CM-Pose video human pose estimation; see README.md.

``cmpose.load`` gives a trained model that predicts poses; ``cmpose.ops`` are the ops.
"""

import os
from typing import TYPE_CHECKING, Any

from cmpose._version import __version__

if TYPE_CHECKING:
    from cmpose.predict.pose_model import load

__all__ = ["__version__", "load"]

# Installing puts kernels/ and configs/ into this package. In a checkout that is not installed, as
# on a machine where nothing can be, they are its neighbours and are found there.
_HERE = os.path.dirname(os.path.abspath(__file__))
_CHECKOUT = os.path.dirname(_HERE)
if not os.path.isdir(os.path.join(_HERE, "kernels")) and os.path.isfile(
    os.path.join(_CHECKOUT, "kernels", "launch.py")
):
    __path__.append(_CHECKOUT)


def __getattr__(name: str) -> Any:
    # Importing cmpose stays quick: torch comes with the first name that needs it.
    if name == "load":
        from cmpose.predict.pose_model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
