"""Poses of people in a picture from an exported CM-Pose, with onnxruntime, NumPy and OpenCV alone.

    python serve_onnx.py MODEL.onnx BOXES.json POSES.json FRAME.jpg [FRAME.jpg ...]

BOXES.json is [[x, y, width, height], ...] in pixels; frames are one picture, or T in a row.
"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime


def main(model: str, boxes: str, out: str, *pictures: str) -> None:
    session = onnxruntime.InferenceSession(model)
    about = json.loads(session.get_modelmeta().custom_metadata_map["cmpose"])
    _, T, _, H, W = session.get_inputs()[0].shape
    frames = [cv2.imread(file)[..., ::-1] for file in pictures] * (T if len(pictures) == 1 else 1)
    mean, std = (255 * np.float32(about[name]) for name in ("mean", "std"))
    udp, poses = int(about["udp"]), []
    for x, y, width, height in json.loads(Path(boxes).read_text()):
        side = max(height, width * H / W) * about["box_enlarge"]  # in the crop's aspect ratio
        linear = np.diag([(W - udp) / (side * W / H), (H - udp) / side])
        shift = np.array([W - udp, H - udp]) / 2 - linear @ [x + width / 2, y + height / 2]
        matrix = np.column_stack([linear, shift])
        crops = np.stack([cv2.warpAffine(frame, matrix, (W, H)) for frame in frames])
        clip = ((crops - mean) / std).transpose(0, 3, 1, 2)[None].astype(np.float32)
        [[heatmaps]] = session.run(["heatmaps"], {"clips": clip})
        pose = []
        for joint, heatmap in zip(about["joints"], heatmaps, strict=True):
            h, w = heatmap.shape
            v, u = np.unravel_index(heatmap.argmax(), heatmap.shape)
            point = np.array([u, v], float)
            if 1 < u < w - 1 and 1 < v < h - 1:  # a quarter pixel towards the higher neighbour
                point[0] += 0.25 * np.sign(heatmap[v, u + 1] - heatmap[v, u - 1])
                point[1] += 0.25 * np.sign(heatmap[v + 1, u] - heatmap[v - 1, u])
            crop = point * [(W - udp) / (w - udp), (H - udp) / (h - udp)]
            xy = np.linalg.solve(linear, crop - shift).tolist()
            pose.append({"joint": joint, "xy": xy, "score": float(heatmap[v, u])})
        poses.append(pose)
    Path(out).write_text(json.dumps(poses))


if __name__ == "__main__":
    main(*sys.argv[1:])
