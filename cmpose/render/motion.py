"""How rendered people move: joint-angle curves over time.

A motion (``walk``, ``run``, ``wave``, …) is a function from times to angle curves, whose amplitude,
rate and phase it draws; ``perform`` strings motions together and poses a body with them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cmpose.render.kinematics import Angles, Build, Pose3D, pose


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
    """A faster gait cycle with longer steps, in which both feet leave the ground."""
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
    flying = np.sqrt(4 * air * (1 - air))
    raised = rng.uniform(100, 155)
    swing = _keys(phase, [0.0, 0.2, 0.5, 0.62, 0.85, 1.0], [5, -38, raised, raised - 15, 25, 5])
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
            f"ankle_{side}": -(hip - knee) * (1 - flying) - 28 * flying,
            f"shoulder_flex_{side}": swing,
            f"shoulder_abd_{side}": np.full_like(t, abduct),
            f"elbow_{side}": _keys(phase, times, [20, 26, 12, 20, 45, 20]),
        }
    return angles


def jumping_jack(t: np.ndarray, rng: np.random.Generator) -> Angles:
    """Legs and straight arms open and close sideways."""
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
    phase = t / rng.uniform(1.3, 1.8) + rng.random()
    leg, other = ("l", "r") if rng.random() < 0.5 else ("r", "l")
    times = [0.0, 0.26, 0.52, 0.68, 1.0]
    high = rng.uniform(40, 80)
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


def sit(t: np.ndarray, rng: np.random.Generator) -> Angles:
    """Sitting: hands in the lap, at the wheels, on the knees, gesturing, or pushing."""
    angles: Angles = {
        "spine_pitch": rng.uniform(-8, 30) + _wobble(t, rng, 6, 0.4),
        "spine_roll": _wobble(t, rng, 6, 0.3),
        "spine_twist": _wobble(t, rng, 14, 0.3),
    }
    bend, apart = rng.uniform(72, 100), rng.uniform(0, 16)
    # flexion, abduction, twist, elbow
    holds = [(28, 8, -25, 70), (-18, 24, 0, 40), (42, 10, 0, 30), (60, 25, 0, 80), (8, 16, 0, 12)]
    pair = int(rng.integers(len(holds)))
    swing = rng.choice([0.0, 22.0]) * np.sin(2 * np.pi * (rng.uniform(0.5, 1.0) * t + rng.random()))
    for side in "lr":
        alone = rng.random() < 0.35
        hold = holds[int(rng.integers(len(holds))) if alone else pair]
        hip = bend + rng.uniform(-5, 5) + _wobble(t, rng, 3, 0.4)
        knee = rng.uniform(60, 112) + _wobble(t, rng, 5, 0.4)
        angles |= {
            f"hip_flex_{side}": hip,
            f"hip_abd_{side}": apart + _wobble(t, rng, 3, 0.3),
            f"knee_{side}": knee,
            f"ankle_{side}": knee - hip,
            f"shoulder_flex_{side}": hold[0] + swing + _wobble(t, rng, 9, 0.5),
            f"shoulder_abd_{side}": hold[1] + _wobble(t, rng, 7, 0.5),
            f"shoulder_twist_{side}": hold[2] + _wobble(t, rng, 7, 0.5),
            f"elbow_{side}": np.maximum(3, hold[3] - 0.8 * swing + _wobble(t, rng, 14, 0.6)),
        }
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
    "sit": sit,
}
"""Name → motion; each takes times [F] in seconds and a random generator."""


def blend(first: Angles, second: Angles, weight: np.ndarray) -> Angles:
    """``first`` where weight is 0, ``second`` where it is 1; a missing curve counts as 0."""
    zero = np.zeros_like(weight)
    return {
        name: (1 - weight) * first.get(name, zero) + weight * second.get(name, zero)
        for name in sorted({*first, *second})
    }


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
