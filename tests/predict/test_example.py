"""``examples/poses_of_a_video.ipynb`` runs from top to bottom, and its outputs are there."""

from __future__ import annotations

from tests.predict import notebook
from tests.shared_data import PROJECT

FILE = PROJECT / "examples" / "poses_of_a_video.ipynb"


def kinds(outputs):
    return [[(o["output_type"], *sorted(o.get("data", ()))) for o in cell] for cell in outputs]


def test_the_notebook_runs(weights, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video, boxes, frames, people = clip
    out = str(tmp_path / "out")
    outputs = notebook.run(FILE, MODEL=str(weights), VIDEO=str(video), BOXES=str(boxes), OUT=out)
    committed = notebook.cells(FILE)
    assert kinds(outputs) == kinds([cell["outputs"] for cell in committed])
    assert [cell["execution_count"] for cell in committed] == [*range(1, len(committed) + 1)]
    texts = [
        "".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for c in outputs for o in c
    ]
    assert str(people) in texts  # found by a detector of one's own
    assert any(text.startswith(f"{people} poses in {frames} frames\n") for text in texts)
    assert texts[-1] == "report.html\n"
    assert (tmp_path / "out" / "report.html").is_file()
