"""DPC-kNN as the paper writes it, in float64 Python loops: Eqs. 9, 10 and 11, one clip at a time.

Nothing here is fast or clever, and nothing is shared with the op. Where the equations leave a
choice the rules are those that the op documents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Clusters:
    density: list[float]
    delta: list[float]
    score: list[float]
    centers: list[int]
    assignment: list[int]


def distance_squared(a: list[float], b: list[float]) -> float:
    return math.fsum((p - q) ** 2 for p, q in zip(a, b, strict=True))


def cluster(
    tokens: list[list[float]],
    k: int,
    num_clusters: int,
    *,
    scale: bool = True,
    include_self: bool = True,
    peak_delta: str = "row_max",
) -> Clusters:
    count = len(tokens)
    unit = len(tokens[0]) if scale else 1

    # Eq. 9: rho_i = exp(-(1/k) sum_{j in KNN(i)} ||f_i - f_j||^2)
    exponent = []
    for i in range(count):
        others = [
            distance_squared(tokens[i], tokens[j]) for j in range(count) if include_self or j != i
        ]
        exponent.append(-math.fsum(sorted(others)[:k]) / (k * unit))
    density = [math.exp(e) for e in exponent]

    def comes_before(j: int, i: int) -> bool:
        """rho_j > rho_i, and of equal densities the smaller index."""
        return exponent[j] > exponent[i] or (exponent[j] == exponent[i] and j < i)

    def distance(i: int, j: int) -> float:
        return math.sqrt(distance_squared(tokens[i], tokens[j]) / unit)

    # Eq. 10: delta_i = min_{j: rho_j > rho_i} ||f_i - f_j||, or max_j ||f_i - f_j|| for the peak
    delta = []
    for i in range(count):
        denser = [distance(i, j) for j in range(count) if comes_before(j, i)]
        if denser:
            delta.append(min(denser))
        elif peak_delta == "row_max":
            delta.append(max(distance(i, j) for j in range(count)))
        else:
            delta.append(max(distance(a, b) for a in range(count) for b in range(count)))

    score = [r * d for r, d in zip(density, delta, strict=True)]
    centers = sorted(range(count), key=lambda i: (-score[i], i))[:num_clusters]

    assignment = []
    for i in range(count):
        if i in centers:
            assignment.append(centers.index(i))
        else:
            to_centers = [distance(i, c) for c in centers]
            assignment.append(to_centers.index(min(to_centers)))
    return Clusters(density, delta, score, centers, assignment)


def merge(
    tokens: list[list[float]],
    weights: list[float],
    assignment: list[int],
    num_clusters: int,
    *,
    normalize: bool,
) -> list[list[float]]:
    """Eq. 11: sum_{j in cluster} s_j f_j, over the cluster's weights when normalising."""
    width = len(tokens[0])
    merged = []
    for cluster_index in range(num_clusters):
        members = [j for j, c in enumerate(assignment) if c == cluster_index]
        total = math.fsum(weights[j] for j in members)
        token = [math.fsum(weights[j] * tokens[j][d] for j in members) for d in range(width)]
        if normalize:
            token = [value / total if total else 0.0 for value in token]
        merged.append(token)
    return merged
