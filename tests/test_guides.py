"""Every code block of the guides runs, in the order in which they stand there, in a folder with what they speak of."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from badloss_jax.attacks import ATTACKS
from badloss_jax.cli import main
from badloss_jax.defenses import DEFENSES
from badloss_jax.runs.scan import suggest as original
from tests.runs.test_scan import write_digits

GUIDES = (
    "README.md",
    "badloss_jax/runs/README.md",
    "badloss_jax/scoring/README.md",
    "badloss_jax/trajectories/README.md",
    "badloss_jax/attacks/README.md",
    "badloss_jax/defenses/README.md",
    "configs/README.md",
)
# What makes commands of the guides short; the settings that they speak of stay.
SHORT = ("--config.recording.epochs=3", "--config.recording.batch_size=128", "--config.model.stages=(8,)")


def blocks(guide):
    return re.findall(r"^```(\w+)\n(.*?)^```", Path(guide).read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory, finished):
    """A folder with a training set, trusted paths, a finished run and the configs."""
    folder = tmp_path_factory.mktemp("guide")
    _, _, trusted = write_digits(folder / "photos", count=300, noise=12)
    (folder / "trusted.txt").write_text("\n".join(trusted), "utf-8")
    (folder / "clean_ids.txt").write_text("\n".join(map(str, range(500, 700))))
    for number, name in enumerate(sorted((folder / "photos").rglob("*.png"))):
        copy = folder / "images" / ("train" if number % 4 else "test") / name.parent.name / name.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(name)
    (folder / "configs").symlink_to(Path("configs").resolve())
    shutil.copytree(finished[0], folder / "RUN")
    return folder


def run_shell(line, folder):
    """Runs a command; `badloss run` and `badloss scan` train a small network for a few epochs."""
    words = line.split()
    if line.startswith("pip install") or words[0] == "launch/local.sh":  # .ci/run does the one, tests/cluster the other
        return
    assert words[0] == "badloss", line

    if words[1] == "run":  # the folder RUN holds a finished run of another config
        line = line.replace("--workdir RUN", "--workdir RAN").replace("/tmp/digits", "DIGITS")
        trains = "retraining" in line
        retraining = (f"enabled={trains}", "epochs=1", "batch_size=128")
        line += f" {shlex.join((*SHORT, *(f'--config.retraining.{text}' for text in retraining)))}"
    if words[1] == "scan":
        line += f" {shlex.join(SHORT)}"

    # A shell takes the line apart.
    taken_apart = subprocess.run(
        ["bash", "-ec", f"printf '%s\\0' {line}"], cwd=folder, capture_output=True, text=True, check=True
    )
    arguments = taken_apart.stdout.split("\0")[1:-1]
    assert main(arguments) == 0, line


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "unrendered")
@pytest.mark.parametrize("guide", GUIDES)
def test_every_block_of_a_guide_runs(guide, place, monkeypatch):
    names: dict = {"__name__": "guide"}
    known = dict(ATTACKS), dict(DEFENSES)
    monkeypatch.setattr("badloss_jax.runs.scan.suggest", shortened)
    found = blocks(guide)
    assert found
    try:
        for language, code in found:
            with monkeypatch.context() as patch:
                patch.chdir(place)
                if language == "python":
                    exec(compile(code, guide, "exec"), names)
                elif language == "sh":
                    for line in code.replace("\\\n", " ").splitlines():
                        run_shell(line, place)
                else:
                    assert language == "text", f"{guide} has a block of {language!r}, which nothing runs"
    finally:
        for registry, before in zip((ATTACKS, DEFENSES), known, strict=True):
            for name in registry.keys() - before.keys():
                del registry[name]
    if guide == "badloss_jax/trajectories/README.md":
        assert len(names["scores"].distances) == 1_000
        assert not np.isnan(names["scores"].p_values).any()


def shortened(config, *sizes):
    original(config, *sizes)
    config.recording.update(epochs=3, batch_size=128)
    config.model.stages = (8,)


def test_guides_are_linked_and_link_to_what_exists():
    top = Path("README.md").read_text("utf-8")
    for guide in (*GUIDES, "launch/README.md", "configs/results/README.md"):
        assert guide == "README.md" or f"]({guide})" in top or f"]({Path(guide).parent})" in top, guide
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", Path(guide).read_text("utf-8")):
            if target.startswith("http"):
                continue
            path = Path(guide).parent / target.replace("\\", "") if target else Path(guide)
            assert path.exists(), f"{guide}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, anchor
