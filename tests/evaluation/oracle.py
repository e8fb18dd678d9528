"""A slow, literal second reading of the official AP, in plain Python, for random cases."""

from __future__ import annotations

import math

from shapely.geometry import Point, Polygon

from cmpose.data.skeleton import JOINTS, SLOTS17


def slow_ap(sequences):
    """``[(ground truth, predictions)]`` PoseTrack18 objects in file order → 15 APs, or None."""
    records = {joint: [] for joint in JOINTS}
    annotated = dict.fromkeys(JOINTS, 0)
    for truth, predicted in sequences:
        for real_image, guess_image in zip(truth["images"], predicted["images"], strict=True):
            people = [a for a in truth["annotations"] if a["image_id"] == real_image["id"]]
            guesses = [a for a in predicted["annotations"] if a["image_id"] == guess_image["id"]]
            if not people:
                continue
            polygons = [
                Polygon(list(zip(xs, ys, strict=True)))
                for xs, ys in zip(
                    real_image.get("ignore_regions_x", []),
                    real_image.get("ignore_regions_y", []),
                    strict=True,
                )
            ]
            real = [(person, _joints(person, polygons)) for person in people]
            real = [(person, joints) for person, joints in real if joints]
            poses = [(guess, _joints(guess, polygons)) for guess in guesses]
            poses = [(guess, joints) for guess, joints in poses if joints]
            for _, joints in real:
                for joint in joints:
                    annotated[joint] += 1
            _assign(real, poses, records)
    return [_average_precision(records[joint], annotated[joint]) for joint in JOINTS]


def _joints(person, polygons):
    joints = {}
    for slot, name in enumerate(SLOTS17):
        x, y, v = person["keypoints"][3 * slot : 3 * slot + 3]
        if name not in JOINTS or (x == 0 and y == 0 and v == 0):
            continue
        if any(polygon.contains(Point(x, y)) for polygon in polygons):
            continue
        scores = person.get("scores")
        joints[name] = (x, y, scores[slot] if scores else -9999.0)
    return joints


def _near(person, joints, guess, joint):
    if joint not in joints or joint not in guess:
        return False
    _, _, w, h = person["bbox_head"]
    distance = math.dist(joints[joint][:2], guess[joint][:2])
    return distance / (0.6 * math.hypot(w, h)) <= 0.5


def _assign(real, poses, records):
    favourite = {}
    for p, (_, guess) in enumerate(poses):
        best, best_pck = 0, -1.0
        for g, (person, joints) in enumerate(real):
            pck = sum(_near(person, joints, guess, j) for j in JOINTS) / len(joints)
            if pck > best_pck:
                best, best_pck = g, pck
        favourite[p] = (best, best_pck)
    owner = {}
    for g in range(len(real)):
        best_pck = 0.0
        for p in range(len(poses)):
            if favourite[p][0] == g and favourite[p][1] > best_pck:
                owner[g], best_pck = p, favourite[p][1]
    person_of = {p: g for g, p in owner.items()}
    for p, (_, guess) in enumerate(poses):
        for joint, (_, _, score) in guess.items():
            g = person_of.get(p)
            hit = g is not None and _near(*real[g], guess, joint)
            records[joint].append((score, hit))


def _average_precision(records, annotated):
    if not records:
        return 0.0
    if annotated == 0:
        return None
    ranked = sorted(records, key=lambda record: -record[0])  # stable
    points, hits = [], 0
    for rank, (_, hit) in enumerate(ranked, start=1):
        hits += hit
        points.append((hits / annotated, hits / rank))
    area, last = 0.0, 0.0
    for i, (recall, _) in enumerate(points):
        if recall != last:
            area += (recall - last) * max(precision for _, precision in points[i:])
            last = recall
    return 100 * area
