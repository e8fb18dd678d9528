"""cmpose ablate: the runs of the paper's tables, resuming, time limits, and the report."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cmpose.cli import main
from cmpose.evaluation.intervals import Interval
from cmpose.files import Interrupted, InUse, claim
from cmpose.render.settings import Difficulty
from cmpose.study import ablate as study_module
from cmpose.study.ablate import AblationOptions, ablate
from cmpose.study.command import UNFINISHED
from cmpose.study.grid import FULL, PARTS, TABLES, Study, chosen_parts, run_name
from cmpose.study.pool import RunPool
from cmpose.study.presets import PRESETS, RenderedData, preset_recipe
from cmpose.study.report import by_name, numbers, sentences, verdict, write_report
from cmpose.study.runs import finished_results, learnt_fields, run_config, run_one
from tests.recipes import (
    FINE,
    children_of,
    command,
    interrupt_after,
    is_alive,
    one_thread,
    recipe,
    write_recipe,
)
from tests.shared_data import PROJECT

RATIOS = (0.15, 0.75)


# -- what is run ----------------------------------------------------------------------------------


def test_the_runs_of_the_papers_tables_and_figure():
    study = Study(preset_recipe("cpu"), ratios=RATIOS, seeds=2)
    settings = study.settings()
    assert list(settings) == [
        "full",
        "mask_task=false+denoise_task=false",
        "denoise_task=false",
        "mask_task=false",
        "fine=causal_only",
        "fine=off",
        "mask_ratio=0.15",
        "mask_ratio=0.75",
        "noise_ratio=0.15",
        "noise_ratio=0.75",
    ]
    for name, setting in settings.items():
        assert setting.keys() == settings["full"].keys(), name
    model = run_config(study.recipe, settings["noise_ratio=0.75"], 1).model
    assert (model.mask_ratio, model.noise_ratio, model.fine) == (0.45, 0.75, "full")
    assert (model.mask_task, model.denoise_task) == (True, True)
    runs = study.runs()
    assert len(runs) == len(set(runs)) == 20
    assert runs[:10] == [(name, 0) for name in settings], "a whole seed before the next"


def test_the_same_setting_is_one_run_for_all_parts():
    study = Study(preset_recipe("cpu"), ratios=(0.45, 0.3))
    for table in TABLES:
        assert study.name(study.rows(table)[-1].setting) == "full"
    for field in ("model.mask_ratio", "model.noise_ratio"):
        assert [ratio for ratio, _ in study.points(field)] == [0.3, 0.45]
        assert study.name(study.points(field)[1][1]) == "full"
    assert sum(name == "full" for name, _ in study.runs()) == 3
    only = Study(preset_recipe("cpu"), parts=("table5",), seeds=1)
    assert list(only.settings()) == ["full", "fine=causal_only", "fine=off"]


def test_the_papers_numbers_and_the_best_row():
    assert [row.paper for row in TABLES["table4"]] == [85.6, 86.9, 87.0, 87.5]
    assert [row.paper for row in TABLES["table5"]] == [85.4, 86.0, 87.5]
    assert TABLES["table5"][1].setting == {**FULL, "model.fine": "off"}
    assert chosen_parts(["figure3", "table4"]) == ("table4", "figure3")
    assert chosen_parts([]) == PARTS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_built(name):
    from cmpose.models.checks import check_config

    preset = PRESETS[name]
    study = Study(preset_recipe(name), ratios=preset.ratios, seeds=preset.seeds)
    assert preset.seeds >= 3
    for setting in study.settings().values():
        check_config(run_config(study.recipe, setting, 0).model)
    assert 60 * preset.limit_minutes <= 9 * 60


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": 0}, r"seeds=0: must be at least 1"),
        ({"parts": ()}, r"parts=\[\]: give some of table4, table5, figure3"),
        ({"ratios": (0.3, 1.0)}, r"ratios: 1.0 is not between 0 and 1"),
    ],
)
def test_a_study_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Study(preset_recipe("cpu"), **fields)


# -- running --------------------------------------------------------------------------------------


def tiny(root, **fields):
    return recipe(root, **FINE | {"train.epochs": 1, "train.checkpoint_every": 1} | fields)


TWO_RUNS = {
    "own_data": True,
    "options": AblationOptions(parts=("table5",), seeds=1, jobs=2),
    "progress": False,
}


def test_a_study_from_start_to_report(rendered, tmp_path, monkeypatch, capsys):
    """Two runs in two processes; called again it keeps them; other settings are refused."""
    monkeypatch.setattr(
        "cmpose.study.grid.TABLES",
        {"table5": (TABLES["table5"][1], TABLES["table5"][2])},
    )
    out = tmp_path / "study"
    assert ablate(out, recipe=tiny(rendered), **TWO_RUNS)
    results = {path.stem: json.loads(path.read_text()) for path in (out / "runs").iterdir()}
    assert results.keys() == {"full-seed0", "fine=off-seed0"}
    for name, result in results.items():
        assert set(result["subsets"]) >= {"all"}
        assert result["subsets"]["all"]["ap"] == pytest.approx(result["ap"]["columns"]["Mean"])
        assert result["box_source"] == "ground truth"
        assert result["steps"] >= 2
        assert not (out / "train" / name / "model").exists()
        assert (out / "train" / name / "log.jsonl").is_file()
    assert results["full-seed0"]["recipe"]["model.fine"] == "full"
    assert results["fine=off-seed0"]["recipe"]["model.fine"] == "off"
    page = (out / "report" / "ablation.md").read_text()
    assert "one seed: no interval" in page
    assert "ground truth" in page
    assert (out / "report" / "differences.svg").is_file()

    before = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    # As a process leaves it that is killed between a result and the end of its weights.
    left = out / "train" / "full-seed0" / "model" / "model.safetensors"
    left.parent.mkdir()
    left.touch()
    assert ablate(out, recipe=tiny(rendered), **TWO_RUNS)
    assert not left.parent.exists()
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()} == before
    assert len((out / "pieces.jsonl").read_text().splitlines()) == 2

    with pytest.raises(ValueError, match=r"settings\.json: .*train\.lr was 0\.001, is 0\.5"):
        ablate(out, recipe=tiny(rendered, **{"train.lr": 0.5}), **TWO_RUNS)
    assert ablate(out, recipe=tiny(rendered, **{"train.log_every": 7}), **TWO_RUNS)


def test_a_run_that_was_cut_goes_on_from_its_checkpoint(rendered, tmp_path, monkeypatch):
    """And ends as one that was not."""
    config = tiny(rendered, **{"train.epochs": 2, "train.checkpoint_every": 0})
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    expected = run_one(config, straight, "full", 0, threads=1)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, signal.SIGTERM)
        with pytest.raises(Interrupted, match="stopped after step 3"):
            run_one(config, cut, "full", 0, threads=1)
    assert not (cut / "runs").exists()
    actual = run_one(config, cut, "full", 0, threads=1)
    assert actual["subsets"] == expected["subsets"]
    log = (cut / "train" / "full-seed0" / "log.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, log) if line["kind"] == "train"]
    assert steps == list(range(1, expected["steps"] + 1))


def test_time_that_is_up_starts_no_run_and_the_command_says_so(rendered, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "GRACE", 1.0)
    monkeypatch.setattr(study_module, "baseline", lambda recipe, folder: time.sleep(2.2))
    file = write_recipe(tmp_path / "r.yaml", tiny(rendered))
    with pytest.raises(SystemExit) as stopped:
        main(
            ["ablate", str(tmp_path / "out"), "--config", str(file), "--parts", "[table5]"]
            + ["--seeds", "1", "--limit_minutes", "0.05"]
        )
    assert stopped.value.code == UNFINISHED
    assert not (tmp_path / "out" / "train").exists()


def study_that_trains_for_ever(rendered):
    config = tiny(rendered, **{"train.epochs": 100_000, "train.checkpoint_every": 10**9})
    return Study(config, ("table5",), seeds=1)


class OnceItTrains(float):
    """A time that has come once the study's first run has taken a step; then calls something."""

    def __new__(cls, folder, call=lambda: None):
        self = super().__new__(cls, "inf")
        self.log = folder / "train" / "full-seed0" / "log.jsonl"
        self.call, self.started = call, time.perf_counter()
        return self

    def __lt__(self, now):
        trains = self.log.is_file() and self.log.read_text() != ""
        if trains:
            self.call()
        return trains or now > self.started + 120


def assert_run_is_saved(folder):
    [saved] = (folder / "train" / "full-seed0" / "checkpoints").glob("step-*")
    assert int(saved.name[5:]) >= 1
    assert not (folder / "runs").exists()


def test_runs_under_way_when_time_is_up_are_saved(rendered, tmp_path):
    runs = RunPool(study_that_trains_for_ever(rendered), tmp_path, jobs=1, progress=False)
    assert not runs.work(OnceItTrains(tmp_path))
    assert not runs.workers
    assert_run_is_saved(tmp_path)


def test_runs_under_way_are_saved_on_request(rendered, tmp_path):
    runs = RunPool(study_that_trains_for_ever(rendered), tmp_path, jobs=1, progress=False)
    ask = OnceItTrains(tmp_path, lambda: signal.raise_signal(signal.SIGTERM))
    message = r"stopped; 0 of 3 runs are finished and those under way are saved: the same command"
    with pytest.raises(Interrupted, match=message):
        runs.work(ask)
    assert_run_is_saved(tmp_path)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
def test_runs_end_with_a_killed_study(rendered, tmp_path):
    out = tmp_path / "study"
    study = study_that_trains_for_ever(rendered)
    file = write_recipe(tmp_path / "r.yaml", study.recipe)
    arguments = ["ablate", str(out), "--config", str(file), "--parts", "[table5]", "--seeds", "1"]
    process = subprocess.Popen(
        command(*arguments, "--jobs", "1"),
        cwd=PROJECT,
        env=one_thread(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    trains = OnceItTrains(out)
    while not trains < time.perf_counter():
        assert process.poll() is None
        time.sleep(0.05)
    children = children_of(process.pid)
    assert children
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(map(is_alive, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with claim(out / "train" / "full-seed0", "train", "--output"):
        pass


def test_a_run_that_fails_is_named_with_its_reason(rendered, tmp_path):
    config = tiny(rendered, **{"train.batch_size": 1000})
    study = Study(config, ("table5",), seeds=1)
    message = r"run full-seed0 failed: ValueError: train\.batch_size=1000 .*output\.txt"
    with pytest.raises(RuntimeError, match=message):
        RunPool(study, tmp_path, jobs=1, progress=False).work(float("inf"))


def result(name, seed, ap, **more):
    """A finished run's, made up."""
    subsets = {
        subset: {"ap": ap + shift, "pckh": ap, "error": 0.5, "frames": 9, "joints": 90}
        for subset, shift in {"all": 0.0, "clean": 4.0, "occluded": -3.0, "defocused": -5.0}.items()
    }
    return {
        "name": name,
        "seed": seed,
        "subsets": subsets,
        "box_source": "ground truth",
        "clips": 20,
        "steps": 7,
        "training_seconds": 3.0,
        "evaluation_seconds": 1.0,
        "threads": 1,
        "provenance": {
            "gpu": None,
            "cpu": "a CPU",
            "commit": "0123456789abcdef",
            "dirty": False,
            "torch": "2.13",
            "python": "3.11",
            "utc": "2026-01-02T03:04:05Z",
        },
    } | more


def test_results_of_other_settings_or_broken_ones_are_refused(tmp_path):
    study = Study(preset_recipe("cpu"), ("table5",), seeds=1)
    path = tmp_path / "runs" / "full-seed0.json"
    path.parent.mkdir()
    config = run_config(study.recipe, study.settings()["full"], 0)
    settings = learnt_fields(config)
    path.write_text(json.dumps(result("full", 0, 40.0, recipe=settings)))
    assert [r["name"] for r in finished_results(study, tmp_path)] == ["full"]
    path.write_text(json.dumps(result("full", 0, 40.0, recipe=settings | {"model.depth": 9})))
    message = r"full-seed0\.json is of other settings \(model\.depth was 9, is 2\): delete it"
    with pytest.raises(ValueError, match=message):
        finished_results(study, tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"full-seed0\.json: not valid JSON .*; delete it"):
        finished_results(study, tmp_path)


def test_arguments_that_cannot_work_are_refused(rendered, tmp_path):
    for fields, message in (
        ({"preset": "tpu"}, r"preset='tpu': there are cpu, gpu"),
        ({"options": AblationOptions(jobs=-1)}, r"jobs=-1.*at least 1"),
        (
            {"options": AblationOptions(limit_minutes=1.0)},
            r"limit_minutes=1\.0: .*more than 1\.3 minutes",
        ),
        ({"recipe": recipe(rendered)}, r"data\.root=.*renders its own data.*--config"),
    ):
        with pytest.raises(ValueError, match=message):
            ablate(tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()


def test_one_process_at_a_time_works_in_a_folder(rendered, tmp_path):
    with (
        claim(tmp_path, "ablate", "folder"),
        pytest.raises(InUse, match="another cmpose ablate is writing there"),
    ):
        ablate(tmp_path, recipe=recipe(rendered), **TWO_RUNS)
    assert not list(tmp_path.iterdir())


def test_rendering_stops_when_time_is_up_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "_CHUNK", 1)
    monkeypatch.setattr(study_module, "cores", lambda: 1)
    calls = []
    monkeypatch.setattr(
        study_module, "render_dataset", lambda root, **fields: calls.append((fields["split"],
        fields["first_video"], fields["videos"])),
    )  # fmt: skip
    data = RenderedData(2, 1, 3, 25.0, 1, Difficulty())
    assert not study_module.render(tmp_path, data, stop_at=0.0, progress=False)
    assert calls == []
    assert study_module.render(tmp_path, data, stop_at=time.perf_counter() + 60, progress=False)
    assert calls == [("train", 0, 1), ("train", 1, 1), ("val", 0, 1)]
    calls.clear()
    assert study_module.render(tmp_path, data, stop_at=float("inf"), progress=False)
    assert calls == [("train", 0, 2), ("val", 0, 1)]


# -- the report -----------------------------------------------------------------------------------


def written(tmp_path, finished, **fields):
    study = Study(preset_recipe("cpu"), ratios=RATIOS, **fields)
    (tmp_path / "pieces.jsonl").write_text('{"seconds": 90.0, "command": "cmpose ablate x"}\n')
    return write_report(study, tmp_path, tmp_path / "report", finished).read_text()


def made_up(seeds):
    """Every run; off is 5 ± little below, causal_only differs by seed in either direction."""
    study = Study(preset_recipe("cpu"), ratios=RATIOS, seeds=seeds)
    shifts = {"fine=off": lambda s: -5.0 + 0.1 * s, "fine=causal_only": lambda s: (s - 1) * 3.0}
    return [
        result(
            name, seed, 40.0 + 2 * seed + shifts.get(name, lambda s: 1.0)(seed) * (name != "full")
        )
        for name, seed in study.runs()
    ]


def test_differences_are_taken_seed_by_seed():
    results = by_name(made_up(3))
    full = numbers(results, "full", "all", "ap")
    assert full.value == Interval(42.0, pytest.approx(4.303 * 2 / 3**0.5, rel=1e-3), 3)
    assert full.difference is None
    off = numbers(results, "fine=off", "occluded", "ap").difference
    assert off.mean == pytest.approx(-4.9)
    assert off.half == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert verdict(off) == "worse than the full model"
    assert verdict(off, lower_is_better=True) == "better than the full model"
    unsure = numbers(results, "fine=causal_only", "all", "ap").difference
    assert unsure.mean == pytest.approx(0.0)
    assert verdict(unsure) == "within noise"
    lines = sentences([("off", "fine=off"), ("causal", "fine=causal_only")], results)
    assert (
        "(95 % interval -5.1 to -4.7, 3 seeds): worse than the full model. By subset: clean "
        in lines[0]
    )
    assert ": within noise. By subset: clean within noise; occluded within noise;" in lines[1]


def test_the_report_of_a_whole_study(tmp_path):
    page = written(tmp_path, made_up(3))
    for text in (
        "`cmpose ablate x`", "a CPU", "torch 2.13", "commit 012345678;", "1.5 minutes in 1 call(s)",
        "Boxes: ground truth", "Table 4", "Table 5", "Figure 3", "defocused 9 frames",
        "within noise", "| (b) no Fine Token Enhancement | 3 |",
    ):  # fmt: skip
        assert text in page, text
    assert "Unfinished" not in page
    for target in re.findall(r"\]\((\S+)\)", page):
        assert (tmp_path / "report" / target).is_file(), target
    content = json.loads((tmp_path / "report" / "ablation.json").read_text())
    assert (len(content["runs"]), content["missing"]) == (30, 0)
    first = (tmp_path / "report" / "ratios.svg").read_bytes()
    written(tmp_path, made_up(3))
    assert (tmp_path / "report" / "ratios.svg").read_bytes() == first


def test_the_report_of_one_seed_claims_nothing(tmp_path):
    page = written(tmp_path, made_up(1), seeds=1)
    assert "with one seed, which says nothing about noise" in page
    assert "than the full model" not in page.replace("− full", "")
    assert "±" not in page.partition("## In words")[2]


def test_the_report_of_an_unfinished_study_says_so(tmp_path):
    page = written(tmp_path, [r for r in made_up(3) if r["name"] != "full"][:5])
    assert "**Unfinished: 25 of 30 runs are missing.**" in page
    assert "Nothing to compare yet" in page


def test_names_of_runs_are_names_of_files():
    study = Study(preset_recipe("gpu"), ratios=PRESETS["gpu"].ratios)
    for name, seed in study.runs():
        assert re.fullmatch(r"[\w=.+-]+-seed\d+", run_name(name, seed))


def test_data_without_head_boxes_is_refused_before_a_run(rendered, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "score_mean_pose", lambda recipe, folder: (None, {}))
    with pytest.raises(ValueError, match=r"val_annotations='annotations/val': nobody has a head"):
        ablate(tmp_path, recipe=recipe(rendered), **TWO_RUNS)
    assert not list((tmp_path / "runs").glob("*.json"))
