"""The public's workflow does what ``.ci/run`` does, and a bug report asks for the machine."""

from __future__ import annotations

import re

import yaml

from tests.shared_data import PROJECT

GITHUB = PROJECT / ".github"


def test_the_workflow_runs_what_ci_runs() -> None:
    jobs = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())["jobs"]
    steps = {job: " ".join(s.get("run", "") for s in jobs[job]["steps"]) for job in jobs}
    ours = (PROJECT / ".ci" / "run").read_text()
    for target in re.findall(r"^(?:if ! )?make (\w+)", ours, flags=re.MULTILINE):
        # The tools are a part of the environment, made first to compile beside its installation.
        assert target == "tools" or f"make {target}" in steps["test"], target
    assert "python -m build" in steps["wheel"]
    assert "cmpose doctor" in steps["wheel"]
    required = set(re.findall(r"CMPOSE_REQUIRE_\w+", ours))
    assert set(jobs["test"]["env"]) < required
    least = re.search(r'requires-python = ">=([\d.]+)"', (PROJECT / "pyproject.toml").read_text())
    assert least is not None
    assert least[1] in jobs["test"]["strategy"]["matrix"]["python"]


def test_a_bug_report_asks_what_doctor_says() -> None:
    [form] = (GITHUB / "ISSUE_TEMPLATE").glob("bug*.yml")
    fields = {f.get("id"): f for f in yaml.safe_load(form.read_text())["body"]}
    doctor = fields["doctor"]
    assert "`cmpose doctor --json`" in doctor["attributes"]["description"]
    assert doctor["attributes"]["render"] == "json"
    assert doctor["validations"]["required"]
