"""What a release is made by: the steps of the workflows, run here, and the changelog's form."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT

WORKFLOWS = ROOT / ".github/workflows"
CHANGES = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def workflow(name: str) -> dict[str, Any]:
    return yaml.safe_load((WORKFLOWS / name).read_text())


def run_step(name: str, job: str, step: str, folder: Path, **variables: str) -> int:
    """The shell lines of a step, as GitHub runs them."""
    (lines,) = [s["run"] for s in workflow(name)["jobs"][job]["steps"] if s.get("name") == step]
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", lines], cwd=folder, env=os.environ | variables
    ).returncode


def test_actions_are_pinned_and_may_do_little() -> None:
    for path in sorted(WORKFLOWS.iterdir()):
        used = re.findall(r"uses: ([^\s.]\S+)", path.read_text())
        assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", name) for name in used)
        assert workflow(path.name)["permissions"] in ({}, {"contents": "read"})


def test_the_notes_of_a_release_are_its_section(tmp_path: Path) -> None:
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n- later\n"
        "\n## [1.2.3] - 2027-01-31\n\n### Added\n\n- this\n"
        "\n## [1.2.30] - 2026-12-31\n\n- earlier\n\n## [1.0.0] - 2026-12-01\n"
    )
    step = ("release.yml", "notes", "The version's section of the changelog", tmp_path)
    assert run_step(*step, GITHUB_REF_NAME="v1.2.3") == 0
    assert (tmp_path / "notes.md").read_text().strip() == "### Added\n\n- this"
    assert run_step(*step, GITHUB_REF_NAME="v1.0.0") == 1
    assert run_step(*step, GITHUB_REF_NAME="v2.0.0") == 1


def test_the_readme_of_a_release_links_to_its_commit(tmp_path: Path) -> None:
    """PyPI shows it, and has neither pages nor pictures."""
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    step = ("ci.yml", "package", "Links and pictures of the README, for PyPI", tmp_path)
    assert run_step(*step, REPOSITORY="https://host/owner/name", GITHUB_SHA="abc") == 0
    text = (tmp_path / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 10 and all(link.startswith("https://") for link in links)
    assert "](https://host/owner/name/blob/abc/docs/compatibility.md#targets)" in text
    pictures = re.findall(r"!\[[^\]]*\]\((.*?)\)", text)
    start = "https://host/owner/name/raw/abc/docs/"
    assert pictures and all(picture.startswith(start) for picture in pictures)


def test_the_changelog_is_in_keep_a_changelogs_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    for version in versions[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\S*\] - \d{4}-\d\d-\d\d", version), version
    for section in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert kinds == [kind for kind in CHANGES if kind in kinds], kinds


@pytest.mark.parametrize("form", ["bug", "wrong-token"])
def test_a_report_has_what_is_asked_for_first(form: str) -> None:
    fields = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())["body"]
    required = {f["id"] for f in fields if f.get("validations", {}).get("required")}
    assert {"doctor", "command" if form == "bug" else "program"} <= required
