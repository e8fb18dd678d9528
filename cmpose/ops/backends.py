"""Which implementation of an op runs, and why the others do not.

An explicit ``backend=`` argument wins over ``CMPOSE_<OP>_BACKEND`` (for example
``CMPOSE_DPC_KNN_BACKEND``), which wins over ``CMPOSE_BACKEND``. ``auto`` takes the best backend
that is available. Any other choice either runs or raises :class:`BackendUnavailable`: an op never
falls back behind the caller's back.
"""

from __future__ import annotations

import os

OPS = (
    "spatial_attention",
    "temporal_attention",
    "corrupt_tokens",
    "reconstruction_loss",
    "heatmap_loss",
    "warp_clips",
    "select_tokens",
    "dpc_knn",
    "merge_clusters",
    "unmerge_tokens",
)
BACKENDS = ("auto", "reference", "triton", "cuda")


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run this op here; the message says why."""


def available(op: str) -> dict[str, str | None]:
    """The backends of ``op``: name → None when it can run, else the reason why it cannot.

    Raises:
        ValueError: ``op`` is not one of :data:`OPS`.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    return {
        "reference": None,
        "triton": f"no triton kernel for {op} in this version",
        "cuda": f"no cuda kernel for {op} in this version",
    }


def resolve(op: str, backend: str = "auto") -> str:
    """The backend that runs ``op``: ``reference``, ``triton`` or ``cuda``.

    Raises:
        ValueError: a backend that does not exist, in the argument or in the environment.
        BackendUnavailable: one that exists but cannot run ``op`` here.
    """
    source = "backend"
    for variable in (f"CMPOSE_{op.upper()}_BACKEND", "CMPOSE_BACKEND"):
        if backend == "auto" and os.environ.get(variable):
            backend, source = os.environ[variable], variable
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return "reference"
    reason = available(op)[backend]
    if reason is not None:
        raise BackendUnavailable(
            f"{op} cannot run on backend {backend!r} (from {source}): {reason}; "
            "use backend='auto' or 'reference'"
        )
    return backend
