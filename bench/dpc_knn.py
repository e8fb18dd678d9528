"""dpc_knn: tokens to labels.

No fused GPU kernel for feature tokens is public. The peers are the two ways in which it is
written: by torch.cdist as in TCFormer (Zeng et al., CVPR 2022), whose density, tie breaking and
peak distance differ from the op's; and by the Gram matrix, with the op's own rules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness.peers import compiled, eager
from bench.harness.shapes import BATCHES, FORWARD, Shape, grid
from bench.harness.workload import Arguments, Draw, OpBench, counted_flops
from cmpose import ops


@torch.no_grad()
def tcformer(tokens: Tensor, k: int, num_clusters: int) -> tuple[Tensor, ...]:
    """TCFormer's clustering: exp(−mean d²) of distances over √D, noise for ties, global peak."""
    batch, size, width = tokens.shape
    distance = torch.cdist(tokens.float(), tokens.float()) * width**-0.5
    near = distance.topk(k, dim=-1, largest=False).values
    density = torch.exp(-near.square().mean(-1))
    density = density + 1e-6 * torch.rand_like(density)  # so that they differ
    farthest = distance.flatten(1).amax(-1)[:, None, None]
    denser = density[:, None, :] > density[:, :, None]
    delta = torch.where(denser, distance, farthest).amin(-1)
    centers = (delta * density).topk(num_clusters, dim=-1).indices
    to_centers = distance.gather(1, centers[..., None].expand(-1, -1, size))
    labels = to_centers.argmin(1)
    own = torch.arange(num_clusters, device=tokens.device).expand(batch, -1)
    return density, delta, centers, labels.scatter(1, centers, own)


@torch.no_grad()
def gram(tokens: Tensor, k: int, num_clusters: int) -> tuple[Tensor, ...]:
    """The op's rules on |x|² + |y|² − 2 x·y of centred tokens, the product in their own dtype."""
    batch, size, width = tokens.shape
    centred = tokens - tokens.mean(1, keepdim=True)
    norms = centred.float().square().sum(-1)
    products = torch.bmm(centred, centred.transpose(1, 2)).float()
    square = (norms[:, :, None] + norms[:, None] - 2 * products).clamp(min=0.0)
    square = square.masked_fill(torch.eye(size, dtype=torch.bool, device=tokens.device), 0.0)
    log_density = -square.topk(k, dim=-1, largest=False).values.sum(-1) / (k * width)
    rank = log_density.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    later = rank[:, None, :] >= rank[:, :, None]
    delta = square.masked_fill(later, float("inf")).amin(-1)
    delta = (torch.where(rank == 0, square.amax(-1), delta) / width).sqrt()
    score = log_density + delta.log()
    centers = score.argsort(dim=-1, descending=True, stable=True)[:, :num_clusters]
    labels = square.gather(2, centers[:, None].expand(-1, size, -1)).argmin(-1)
    own = torch.arange(num_clusters, device=tokens.device).expand(batch, -1)
    return log_density, delta, centers, labels.scatter(1, centers, own)


def _make(shape: Shape, draw: Draw) -> Arguments:
    tokens = draw.normal(*(shape[n] for n in "BMD"))
    return {"tokens": tokens, "k": shape["k"], "num_clusters": shape["L"]}


def _bytes(shape: Shape, element: int, direction: str) -> int:
    """Tokens read once; log ρ and δ in float32, centres and labels in int64 written."""
    B, M, D, L = (shape[n] for n in "BMDL")
    return B * (M * D * element + 2 * M * 4 + (L + M) * 8)


def _flops(shape: Shape, direction: str) -> int:
    """One pass over all pairs: the Gram matrix, whichever way the distances are computed."""
    return counted_flops(lambda: gram(**_make(shape, Draw(torch.float32, "meta"))))


_REFERENCE = {"B": 32, "M": 192, "D": 768, "k": 5, "L": 48}

# A quarter of the tokens are clusters, as in TCFormer; CM-Pose makes 32 of its 132.
_TOKENS = [{"M": m, "L": m // 4} for m in (192, 64, 576, 1024, 4096)] + [{"M": 132, "L": 32}]
_LONG = [{"M": 16384, "L": 1024, "B": 4}, {"M": 65536, "L": 1024, "B": 1}]

TCFORMER = tuple(
    {"B": 32, "M": m, "D": d, "k": 5, "L": m // 4} for m, d in ((3072, 128), (768, 320), (192, 512))
)
"""Its three stages at 256 × 192 pixels."""

CHAT_UNIVI = tuple(
    {"B": 8, "M": m, "D": 1024, "k": k, "L": merged}
    for m, k, merged in ((256, 5, 64), (576, 5, 64), (64, 3, 32), (32, 3, 16))
)
"""Its three merges of 256 or 576 image tokens."""


def _shapes() -> list[Shape]:
    """What has a target, what others have published, very many tokens; then batches and widths."""
    widths = [{"D": d} for d in (768, 1024, 1280)]
    first, long = grid(_REFERENCE, _TOKENS), [_REFERENCE | sizes for sizes in _LONG]
    rest = [s for s in grid(_REFERENCE, _TOKENS, BATCHES, widths) if s not in first]
    return [*first, *TCFORMER, *CHAT_UNIVI, *long, *rest]


BENCH = OpBench(
    op="dpc_knn",
    directions=(FORWARD,),
    shapes=_shapes(),
    small={"B": 2, "M": 24, "D": 16, "k": 3, "L": 6},
    cpu=[
        {"B": 8, "M": 132, "D": 768, "k": 5, "L": 32},
        {"B": 4, "M": 192, "D": 768, "k": 5, "L": 48},
        {"B": 1, "M": 1024, "D": 768, "k": 5, "L": 256},
        {"B": 1, "M": 4096, "D": 256, "k": 5, "L": 1024},
    ],
    make=_make,
    call=ops.dpc_knn,
    bytes=_bytes,
    peers={
        "eager": eager(gram),
        "tcformer": eager(tcformer, checked=False),
        "compile": compiled(gram),
        "compile_tcformer": compiled(tcformer, checked=False),
    },
    flops=_flops,
    options={"valid": lambda inputs: {"valid": torch.ones_like(inputs["tokens"][..., 0]) > 0}},
    exact_shape=lambda s: {**s, "B": 1, "M": min(s["M"], 1024), "L": min(s["L"], 256)},
)
