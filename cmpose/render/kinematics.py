"""Bodies of rendered people: measures, and forward kinematics from joint angles to points.

Person axes: x to the person's left, y up, z forward. Angles are in degrees: flexion swings a limb
forward (the knee bends it back), abduction swings it outwards, twist turns it about its own axis.
The angle ``shoulder_flex_l`` belongs to the person's own left shoulder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Angles = dict[str, np.ndarray]
"""Angle curves in degrees, [F] each; also ``lift`` (metres off the ground) and ``stride``."""


@dataclass(frozen=True)
class Build:
    """A person's measures in metres.

    Attributes:
        stature: height from sole to crown.
        girth: factor on the thickness of limbs and torso.
        head: factor on the head's size (children have larger heads for their height).
        leg: factor on the length of the legs; the torso takes the rest.
        shoulder: half the distance between the shoulder joints.
        hip: half the distance between the hip joints.
    """

    stature: float
    girth: float
    head: float
    leg: float
    shoulder: float
    hip: float

    @staticmethod
    def draw(rng: np.random.Generator) -> Build:
        """A random person; about one in eight is a child."""
        child = rng.random() < 0.12
        stature = rng.uniform(1.15, 1.45) if child else rng.uniform(1.52, 1.95)
        return Build(
            stature=stature,
            girth=rng.uniform(0.86, 1.28),
            head=rng.uniform(1.12, 1.25) if child else rng.uniform(0.96, 1.08),
            leg=rng.uniform(0.95, 1.05),
            shoulder=stature * rng.uniform(0.098, 0.118),
            hip=stature * rng.uniform(0.055, 0.064),
        )


@dataclass
class Pose3D:
    """A person's motion in person axes, which still have to be turned and put somewhere; F frames.

    Attributes:
        points: name → [F, 3], metres: the 15 joints, and others that drawing needs.
        chest: [F, 3, 3]; columns are its left, up and forward directions.
        pelvis: likewise.
        head: likewise.
        travel: [F, 2] position (left, forward) of the root in metres, such that the lower foot
            stays where it is.
    """

    points: dict[str, np.ndarray]
    chest: np.ndarray
    pelvis: np.ndarray
    head: np.ndarray
    travel: np.ndarray


def _rotation(axis: int, degrees: np.ndarray) -> np.ndarray:
    """[F] → [F, 3, 3], right-handed about axis 0, 1 or 2."""
    a = np.deg2rad(degrees)
    out = np.zeros((len(a), 3, 3))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    out[:, axis, axis] = 1
    out[:, i, i] = out[:, j, j] = np.cos(a)
    out[:, j, i] = np.sin(a)
    out[:, i, j] = -np.sin(a)
    return out


def pose(angles: Angles, build: Build, times: np.ndarray) -> Pose3D:
    """Forward kinematics: the points of a person of this build, in metres.

    Args:
        angles: curves in degrees; a missing one counts as 0.
        build: measures.
        times: [F] seconds.
    """
    zero = np.zeros_like(times)

    def angle(name: str) -> np.ndarray:
        return angles.get(name, zero)

    def turn(x: np.ndarray, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        return _rotation(0, x) @ _rotation(2, z) @ _rotation(1, y)

    s = build.stature
    thigh, shank = 0.247 * s * build.leg, 0.243 * s * build.leg
    torso = 0.82 * s - 0.04 * s - thigh - shank  # hip joints to shoulder line
    pelvis = _rotation(1, angle("pelvis_twist")) @ _rotation(2, angle("pelvis_roll"))
    pelvis = pelvis @ _rotation(0, 0.4 * angle("spine_pitch"))
    spine = turn(0.6 * angle("spine_pitch"), angle("spine_roll"), angle("spine_twist"))
    chest = pelvis @ spine
    head = chest @ turn(
        angle("neck_pitch") - 0.6 * angle("spine_pitch"), angle("neck_roll"), angle("neck_twist")
    )

    points: dict[str, np.ndarray] = {}
    root = np.zeros((len(times), 3))
    points["pelvis"] = root + pelvis @ [0, -0.015 * s, 0]
    waist = root + pelvis @ [0, 0.35 * torso, 0]
    points["waist"] = waist
    shoulders = waist + chest @ [0, 0.65 * torso, 0]
    points["neck_base"] = shoulders + chest @ [0, 0.012 * s, 0]
    points["head_bottom"] = shoulders + chest @ [0, 0.018 * s, 0.004 * s]
    crown = s * 0.163 * build.head
    points["head_centre"] = points["head_bottom"] + head @ [0, 0.60 * crown, 0.012 * s]
    points["head_top"] = points["head_bottom"] + head @ [0, crown, 0.006 * s]
    points["nose"] = points["head_bottom"] + head @ [0, 0.52 * crown, 0.072 * s * build.head]

    for side, sign, name in (("l", 1.0, "left"), ("r", -1.0, "right")):
        hip = root + pelvis @ [sign * build.hip, 0, 0]
        leg = pelvis @ turn(
            -angle(f"hip_flex_{side}"),
            sign * angle(f"hip_abd_{side}"),
            sign * (8 + angle(f"hip_twist_{side}")),
        )
        knee = hip + leg @ [0, -thigh, 0]
        lower = leg @ _rotation(0, angle(f"knee_{side}"))
        ankle = knee + lower @ [0, -shank, 0]
        foot = lower @ _rotation(0, -angle(f"ankle_{side}"))
        points |= {f"{name}_hip": hip, f"{name}_knee": knee, f"{name}_ankle": ankle}
        points[f"{name}_heel"] = ankle + foot @ [0, -0.024 * s, -0.018 * s]
        points[f"{name}_toe"] = ankle + foot @ [0, -0.028 * s, 0.095 * s]

        # The shoulder joint rises with a raised arm.
        rise = 0.035 * s * np.clip((angle(f"shoulder_abd_{side}") - 60) / 90, 0, 1)
        joint = np.stack([zero + sign * build.shoulder, rise - 0.004 * s, zero], -1)
        shoulder = shoulders + (chest @ joint[..., None])[..., 0]
        arm = chest @ turn(
            -angle(f"shoulder_flex_{side}"),
            sign * angle(f"shoulder_abd_{side}"),
            sign * angle(f"shoulder_twist_{side}"),
        )
        elbow = shoulder + arm @ [0, -0.172 * s, 0]
        fore = arm @ _rotation(0, -angle(f"elbow_{side}"))
        points |= {f"{name}_shoulder": shoulder, f"{name}_elbow": elbow}
        points[f"{name}_wrist"] = elbow + fore @ [0, -0.148 * s, 0]
        points[f"{name}_hand"] = elbow + fore @ [0, -0.148 * s - 0.062 * s, 0.008 * s]

    low, travel = _tread(points, angle("stride"))
    ground = low.min(0) - angle("lift") - 0.012 * s
    for name in points:
        points[name] = points[name] - np.stack([zero, ground, zero], -1)
    return Pose3D(points, chest, pelvis, head, travel)


def _tread(points: dict[str, np.ndarray], stride: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Height of each sole's lowest point, [2 feet, F], and ``Pose3D.travel``, [F, 2].

    Args:
        points: with heels and toes, [F, 3].
        stride: [F] factor on the length of the steps; 0 means 1.
    """
    soles = np.stack([points[f"{n}_{p}"] for n in ("left", "right") for p in ("heel", "toe")])
    soles = soles.reshape(2, 2, len(stride), 3)
    low = soles[..., 1].min(1)  # [2 feet, F]
    # The lower foot carries the body: it stays where it is, so the root moves against it.
    weight = np.exp(-(low - low.min(0)) / 0.02)
    weight /= weight.sum(0)
    step = -np.gradient(soles.mean(1)[..., [0, 2]], axis=1) if len(stride) > 1 else soles[:, 0] * 0
    factor = 1 + (stride - 1) * (stride > 0)
    moved = (weight[..., None] * step[..., :2]).sum(0) * factor[:, None]
    return low, np.cumsum(moved, 0)
