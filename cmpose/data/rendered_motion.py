"""How rendered people move: joint-angle curves, forward kinematics, feet that stay on the ground.

A motion is a dictionary of angle curves in degrees over time (``walk``, ``run``, ``wave``, …).
``perform`` strings motions together and turns them into points in metres by forward kinematics.

Person axes: x to the person's left, y up, z forward. Angles: flexion swings a limb forward (the
knee bends it back), abduction swings it outwards, twist turns it about its own axis. The angle
``shoulder_flex_l`` belongs to the person's own left shoulder.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """A person's motion in person axes before heading and place are applied; F frames.

    Attributes:
        points: name → [F, 3], metres. The 15 joints, and what drawing needs besides.
        chest, pelvis, head: [F, 3, 3]; columns are the part's left, up and forward directions.
        travel: [F, 2] the root's way (left, forward) in metres that keeps the lower foot still.
    """

    points: dict[str, np.ndarray]
    chest: np.ndarray
    pelvis: np.ndarray
    head: np.ndarray
    travel: np.ndarray


# --------------------------------------------------------------------------- motions


def _bump(phase: np.ndarray, centre: float, sharpness: float) -> np.ndarray:
    """A periodic bump of height 1 at ``centre`` (von Mises shape)."""
    return np.exp(sharpness * (np.cos(phase - centre) - 1))


def _wobble(t: np.ndarray, rng: np.random.Generator, amplitude: float, speed: float) -> np.ndarray:
    """A smooth random curve: three sines."""
    curve = np.zeros_like(t)
    for k in range(1, 4):
        rate = speed * rng.uniform(0.4, 1.0) * k
        curve += np.sin(2 * np.pi * (rate * t + rng.random())) / k
    return amplitude * curve / 1.8


def _keys(phase: np.ndarray, times: list[float], values: list[float]) -> np.ndarray:
    """Cosine interpolation between key values of a cycle; ``phase`` counts cycles."""
    p = np.mod(phase, 1.0)
    at, val = np.asarray(times), np.asarray(values)
    i = np.clip(np.searchsorted(at, p, side="right") - 1, 0, len(at) - 2)
    w = (p - at[i]) / (at[i + 1] - at[i])
    w = 0.5 - 0.5 * np.cos(np.pi * w)
    return val[i] * (1 - w) + val[i + 1] * w


def walk(t: np.ndarray, rng: np.random.Generator, *, running: bool = False) -> Angles:
    """A gait cycle: legs in opposition, arms against legs, knee bent in the swing."""
    rate = rng.uniform(1.25, 1.55) if running else rng.uniform(0.75, 1.05)
    swing = rng.uniform(34, 44) if running else rng.uniform(20, 29)
    arms = rng.uniform(30, 48) if running else rng.uniform(14, 34)
    elbow = rng.uniform(75, 100) if running else rng.uniform(12, 28)
    phase = 2 * np.pi * (rate * t + rng.random())
    angles: Angles = {
        "spine_pitch": np.full_like(t, rng.uniform(8, 16) if running else rng.uniform(0, 6)),
        "spine_twist": rng.uniform(5, 11) * np.sin(phase),
        "pelvis_twist": -rng.uniform(4, 8) * np.sin(phase),
        "pelvis_roll": 3 * np.cos(phase),
        "stride": np.full_like(t, 1.35 if running else 1.0),
        "lift": np.maximum(0, np.cos(2 * phase + 0.6)) * (0.05 if running else 0.0),
    }
    spread = rng.uniform(5, 13)
    for side, p in (("l", phase), ("r", phase + np.pi)):
        flex = swing * np.sin(p) + (10 if running else 4)
        knee = (12 + 78 * _bump(p, -0.5, 1.8)) if running else (6 + 54 * _bump(p, -0.45, 2.4))
        angles |= {
            f"hip_flex_{side}": flex,
            f"knee_{side}": knee,
            f"ankle_{side}": -0.75 * (flex - knee) - 12 * _bump(p, -1.4, 3.0),
            f"shoulder_flex_{side}": -arms * np.sin(p) + (0 if running else 2),
            f"shoulder_abd_{side}": np.full_like(t, spread),
            f"shoulder_twist_{side}": np.full_like(t, -15.0),
            f"elbow_{side}": elbow - (18 if running else 14) * np.sin(p),
        }
    return angles


def run(t: np.ndarray, rng: np.random.Generator) -> Angles:
    return walk(t, rng, running=True)


def stand(t: np.ndarray, rng: np.random.Generator) -> Angles:
    """Standing, weight shifting, arms in one of a few natural holds."""
    shift = _wobble(t, rng, 5, 0.3)
    angles: Angles = {
        "spine_roll": -shift,
        "spine_pitch": 3 + _wobble(t, rng, 3, 0.3),
        "spine_twist": _wobble(t, rng, 9, 0.3),
        "pelvis_roll": shift,
    }
    stance = rng.uniform(2, 12)
    for side, sign in (("l", 1.0), ("r", -1.0)):
        angles[f"hip_abd_{side}"] = stance - sign * shift
        angles[f"knee_{side}"] = 4 + np.maximum(0, sign * shift) * 2
        angles[f"hip_flex_{side}"] = 2 + np.maximum(0, sign * shift)
        # flexion, abduction, twist, elbow: hanging, on the hip, gesturing, folded, pointing
        holds = [
            (2, 8, -10, 14),
            (-22, 44, -70, 92),
            (24, 14, -18, 78),
            (32, 6, -62, 98),
            (70, 18, 0, 12),
        ]
        weights = [0.42, 0.16, 0.2, 0.1, 0.12]
        hold = holds[int(rng.choice(len(holds), p=weights))]
        for name, value in zip(("flex", "abd", "twist"), hold[:3], strict=True):
            angles[f"shoulder_{name}_{side}"] = value + _wobble(t, rng, 7, 0.5)
        angles[f"elbow_{side}"] = np.maximum(2, hold[3] + _wobble(t, rng, 9, 0.6))
    return angles


def wave(t: np.ndarray, rng: np.random.Generator) -> Angles:
    """Standing with one raised arm whose forearm swings from side to side."""
    angles = stand(t, rng)
    side = str(rng.choice(["l", "r"]))
    swing = np.sin(2 * np.pi * (rng.uniform(1.1, 1.9) * t + rng.random()))
    angles[f"shoulder_flex_{side}"] = 10 + _wobble(t, rng, 5, 0.4)
    angles[f"shoulder_abd_{side}"] = rng.uniform(85, 135) + 6 * swing
    angles[f"shoulder_twist_{side}"] = np.full_like(t, rng.uniform(75, 95))
    angles[f"elbow_{side}"] = rng.uniform(45, 70) + rng.uniform(20, 32) * swing
    return angles


def jump(t: np.ndarray, rng: np.random.Generator) -> Angles:
    """Crouch, take off with swinging arms, fly, land."""
    phase = t / rng.uniform(1.2, 1.7) + rng.random()
    times = [0.0, 0.28, 0.44, 0.58, 0.74, 1.0]
    height = rng.uniform(0.18, 0.42)
    air = np.clip((np.mod(phase, 1.0) - 0.42) / 0.26, 0, 1)
    raised = rng.uniform(110, 170)
    angles: Angles = {
        "spine_pitch": _keys(phase, times, [6, 42, 0, 6, 34, 6]),
        "lift": 4 * height * air * (1 - air),
    }
    tuck = rng.uniform(5, 45)
    abduct = rng.uniform(8, 30)
    for side in "lr":
        hip = _keys(phase, times, [8, 78, -4, tuck, 66, 8])
        knee = _keys(phase, times, [14, 98, 4, tuck * 1.4 + 8, 88, 14])
        angles |= {
            f"hip_flex_{side}": hip,
            f"knee_{side}": knee,
            f"hip_abd_{side}": np.full_like(t, 6.0),
            f"ankle_{side}": np.where((air > 0) & (air < 1), -28.0, -(hip - knee)),
            f"shoulder_flex_{side}": _keys(phase, times, [5, -42, raised, raised - 25, 30, 5]),
            f"shoulder_abd_{side}": np.full_like(t, abduct),
            f"elbow_{side}": _keys(phase, times, [20, 26, 12, 20, 45, 20]),
        }
    return angles


def jumping_jack(t: np.ndarray, rng: np.random.Generator) -> Angles:
    """Legs and straight arms open and close in the frontal plane."""
    phase = rng.uniform(0.8, 1.2) * t + rng.random()
    opening = 0.5 - 0.5 * np.cos(2 * np.pi * phase)
    top = rng.uniform(120, 165)
    angles: Angles = {"lift": 0.08 * np.abs(np.sin(2 * np.pi * phase))}
    for side in "lr":
        angles |= {
            f"hip_abd_{side}": 2 + 24 * opening,
            f"knee_{side}": 6 + 14 * np.abs(np.cos(2 * np.pi * phase)),
            f"hip_flex_{side}": 3 + 7 * np.abs(np.cos(2 * np.pi * phase)),
            f"shoulder_abd_{side}": 10 + top * opening,
            f"elbow_{side}": 10 + 14 * (1 - opening),
            f"shoulder_twist_{side}": 60 * opening,
        }
    return angles


def crouch(t: np.ndarray, rng: np.random.Generator) -> Angles:
    """Down into a squat, stay, up again."""
    phase = t / rng.uniform(1.8, 3.2) + rng.random()
    depth = rng.uniform(0.55, 1.0)
    down = depth * _keys(phase, [0, 0.3, 0.55, 0.85, 1.0], [0, 1, 1, 0, 0])
    reach = rng.uniform(20, 85)
    wide = rng.uniform(8, 26)
    angles: Angles = {"spine_pitch": 4 + 38 * down, "neck_pitch": -20 * down}
    for side in "lr":
        hip, knee = 4 + 104 * down, 6 + 124 * down
        angles |= {
            f"hip_flex_{side}": hip,
            f"knee_{side}": knee,
            f"hip_abd_{side}": 4 + wide * down,
            f"ankle_{side}": -(hip - knee) * 0.9,
            f"shoulder_flex_{side}": 4 + reach * down + _wobble(t, rng, 6, 0.5),
            f"shoulder_abd_{side}": 10 + _wobble(t, rng, 4, 0.5),
            f"elbow_{side}": 22 + rng.uniform(10, 55) * down,
        }
    return angles


def dance(t: np.ndarray, rng: np.random.Generator) -> Angles:
    """Free movement of all joints: variety beyond the named motions."""
    speed = rng.uniform(0.4, 0.8)
    angles: Angles = {
        "spine_pitch": 6 + _wobble(t, rng, 12, speed),
        "spine_roll": _wobble(t, rng, 13, speed),
        "spine_twist": _wobble(t, rng, 22, speed),
        "pelvis_roll": _wobble(t, rng, 5, speed),
    }
    for side in "lr":
        hip = 16 + _wobble(t, rng, 24, speed)
        knee = np.maximum(3, 30 + _wobble(t, rng, 38, speed))
        angles |= {
            f"hip_flex_{side}": hip,
            f"hip_abd_{side}": 8 + _wobble(t, rng, 14, speed),
            f"knee_{side}": knee,
            f"ankle_{side}": -(hip - knee) * 0.7,
            f"shoulder_flex_{side}": 35 + _wobble(t, rng, 65, speed),
            f"shoulder_abd_{side}": 40 + _wobble(t, rng, 48, speed),
            f"shoulder_twist_{side}": _wobble(t, rng, 60, speed),
            f"elbow_{side}": np.maximum(3, 55 + _wobble(t, rng, 55, speed)),
        }
    return angles


def kick(t: np.ndarray, rng: np.random.Generator) -> Angles:
    """One leg swings back and kicks forward, the other stands; arms balance."""
    phase = t / rng.uniform(1.1, 1.6) + rng.random()
    leg, other = ("l", "r") if rng.random() < 0.5 else ("r", "l")
    times = [0.0, 0.3, 0.5, 0.65, 1.0]
    high = rng.uniform(45, 90)
    angles = stand(t, rng)
    angles["spine_pitch"] = _keys(phase, times, [4, 12, -10, -4, 4])
    angles[f"hip_flex_{leg}"] = _keys(phase, times, [4, -32, high, high * 0.6, 4])
    angles[f"knee_{leg}"] = _keys(phase, times, [10, 80, 10, 24, 10])
    angles[f"knee_{other}"] = _keys(phase, times, [6, 22, 10, 8, 6])
    angles[f"hip_flex_{other}"] = 0.6 * angles[f"knee_{other}"]
    angles[f"ankle_{leg}"] = _keys(phase, times, [0, -20, -35, -20, 0])
    angles[f"shoulder_flex_{leg}"] = _keys(phase, times, [0, 40, -35, -20, 0])
    angles[f"shoulder_flex_{other}"] = _keys(phase, times, [0, -35, 50, 30, 0])
    for side in "lr":
        angles[f"shoulder_abd_{side}"] = _keys(phase, times, [14, 40, 34, 26, 14])
        angles[f"elbow_{side}"] = np.full_like(t, rng.uniform(15, 40))
    return angles


MOTIONS: dict[str, Callable[[np.ndarray, np.random.Generator], Angles]] = {
    "walk": walk,
    "run": run,
    "stand": stand,
    "wave": wave,
    "jump": jump,
    "jumping_jack": jumping_jack,
    "crouch": crouch,
    "dance": dance,
    "kick": kick,
}
"""Name → motion; each takes times [F] in seconds and a random generator."""


def blend(first: Angles, second: Angles, weight: np.ndarray) -> Angles:
    """``first`` where weight is 0, ``second`` where it is 1; a missing curve counts as 0."""
    zero = np.zeros_like(weight)
    return {
        name: (1 - weight) * first.get(name, zero) + weight * second.get(name, zero)
        for name in sorted({*first, *second})
    }


# --------------------------------------------------------------------------- kinematics


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
    """Forward kinematics of ``angles`` for a person of this build; points in metres."""
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
    points["pelvis"] = root + pelvis @ [0, 0.02 * s, 0]
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

    soles = np.stack([points[f"{n}_{p}"] for n in ("left", "right") for p in ("heel", "toe")])
    soles = soles.reshape(2, 2, len(times), 3)
    low = soles[..., 1].min(1)  # [2 feet, F]
    # The lower foot carries: the root moves against it, so that the foot stays where it is.
    weight = np.exp(-(low - low.min(0)) / 0.02)
    weight /= weight.sum(0)
    step = -np.gradient(soles.mean(1)[..., [0, 2]], axis=1) if len(times) > 1 else soles[:, 0] * 0
    stride = 1 + (angle("stride") - 1) * (angle("stride") > 0)
    moved = (weight[..., None] * step[..., :2]).sum(0) * stride[:, None]
    travel = np.cumsum(moved, 0)

    ground = low.min(0) - angle("lift") - 0.012 * s
    for name in points:
        points[name] = points[name] - np.stack([zero, ground, zero], -1)
    return Pose3D(points, chest, pelvis, head, travel)


def perform(names: list[str], build: Build, times: np.ndarray, rng: np.random.Generator) -> Pose3D:
    """One motion after another, with the head looking around.

    Args:
        names: keys of ``MOTIONS``; each takes an equal share of the time, changes take 0.4 s.
        build: the person's measures.
        times: [F] seconds.
        rng: draws amplitudes, rates and phases.
    """
    angles = MOTIONS[names[0]](times, rng)
    span = (times[-1] - times[0]) / len(names)
    for k, name in enumerate(names[1:], start=1):
        weight = np.clip((times - times[0] - k * span) / 0.4 + 0.5, 0, 1)
        angles = blend(angles, MOTIONS[name](times, rng), weight * weight * (3 - 2 * weight))
    for name, amplitude in (("neck_pitch", 8.0), ("neck_roll", 5.0), ("neck_twist", 22.0)):
        angles[name] = angles.get(name, 0) + _wobble(times, rng, amplitude, 0.25)
    return pose(angles, build, times)
