"""launch/gpu_check.sh and gpu_paper.sh, on the CPU: with programs of the test's own in badloss's place, and with it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from badloss_jax.config import load_config
from tests.cluster.test_launch import program, wait_until

LAUNCH = Path("launch")
# The tests' own python3 takes a program of a test's in the place of `-m badloss_jax`, where there is one, and may say
# that jax runs on a GPU.
PYTHON = """\
import os, pathlib, sys
folder, arguments = pathlib.Path(__file__).parent, sys.argv[1:]
if "jax.default_backend()" in arguments[-1] and (folder / "backend").exists():
    sys.exit(print((folder / "backend").read_text()))
if arguments[:2] == ["-m", "badloss_jax"] and (folder / "in_its_place.py").exists():
    arguments[:2] = [str(folder / "in_its_place.py")]
os.execv(sys.executable, [sys.executable, *arguments])
"""
SHRUNK = [f"--config.{setting}" for setting in (
    "data.source=digits", "data.train_examples=300", "data.test_examples=60", "attacks.names=('patch',)",
    "attacks.patch.ratio=0.1", "probes.count=30", "model.name=resnet_small", "model.stages=(8,)",
    "recording.epochs=40", "recording.batch_size=16", "recording.kinds=()", "scoring.kinds=('loss',)",
    "scoring.loss.k=5", "retraining.epochs=1", "retraining.batch_size=16", "retraining.augment=none",
    "retraining.variants=()", "rejection.rules=('fraction',)", "controls=()",
)]  # fmt: skip


@pytest.fixture
def environment(tmp_path):
    """With the programs in tmp_path first on the PATH; python3 is the tests' own."""
    program(tmp_path, "python3", PYTHON)
    known = {key: value for key, value in os.environ.items() if not key.startswith("BADLOSS_")}
    return known | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd(),
                    "BADLOSS_CIFAR10": "CIFAR", "RESULTS": str(tmp_path / "results")}  # fmt: skip


def in_place_of_badloss(tmp_path, code):
    (tmp_path / "in_its_place.py").write_text(code, "utf-8")


def run(environment, script, *arguments, **changed):
    return subprocess.run([LAUNCH / script, *map(str, arguments)], env=environment | changed, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)  # fmt: skip


def test_a_check_stays_below_ten_minutes():
    text = (LAUNCH / "gpu_check.sh").read_text("utf-8")
    whole, quick = text[text.index("\nelse\n") :], text[: text.index("\nelse\n")]
    tests = int(re.findall(r"^part tests (\d+)", text, re.MULTILINE)[0])
    limits = [int(limit) for limit in re.findall(r"^  (?:train|bench) \S+ (\d+)\b", whole, re.MULTILINE)]
    assert len(limits) == 7
    assert tests + sum(limits) + 5 * (1 + len(limits)) <= 585
    assert "--quick" in quick


CHECKED = """\
import json, pathlib, sys
if "buffer" in sys.argv:
    sys.exit("no memory")
pathlib.Path(sys.argv[sys.argv.index("--out") + 1]).write_text(json.dumps({"figures": [1.5]}))
"""


ONE_TEST = "-k test_distances_are_those_of_float64 -p no:cacheprovider"


def test_a_part_that_fails_is_noted_and_the_others_go_on(environment, tmp_path):
    in_place_of_badloss(tmp_path, CHECKED)
    out = tmp_path / "out.json"
    done = run(environment, "gpu_check.sh", out, PYTEST_ADDOPTS=ONE_TEST)
    assert done.returncode == 1, done.stdout
    assert "NO GPU (jax runs on cpu): --quick" in done.stdout
    assert "out.json: tests ok, small ok, buffer FAILED" in done.stdout
    written = json.loads(out.read_text("utf-8"))
    assert (written["quick"], written["backend"]) == (True, "cpu")
    assert written["parts"]["small"]["figures"] == [1.5]
    assert written["parts"]["buffer"]["last_lines"] == ["no memory"]
    assert "2 passed, 6 deselected" in written["parts"]["tests"]["last_lines"][-1]


# What is known when a part begins is what a check leaves that is cut off there.
CUT_OFF = """\
import json, os, pathlib, sys
out = pathlib.Path(__file__).with_name("out.json")
known = json.loads(out.read_text())["parts"] if out.exists() else None
with open(pathlib.Path(__file__).with_name("known"), "a") as file:
    print(*known, file=file)
"""
SKIPPING = """\
import pytest
def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.skip(reason="for no reason"))
"""


def test_a_gpu_is_asked_for_all_parts_and_no_test_may_be_skipped(environment, tmp_path):
    in_place_of_badloss(tmp_path, CUT_OFF)
    (tmp_path / "backend").write_text("gpu")
    (tmp_path / "skip_all.py").write_text(SKIPPING)
    changed = {"PYTHONPATH": f"{os.getcwd()}:{tmp_path}", "PYTEST_ADDOPTS": f"{ONE_TEST} -p skip_all"}
    out = tmp_path / "out.json"
    done = run(environment, "gpu_check.sh", out, LIMITS="1.5", **changed)
    assert done.returncode == 1, done.stdout
    assert "== tests, at most 165 s" in done.stdout
    names = "tests small resnet18-64 resnet50-224 cifar10-resnet18 cifar10-resnet50 buffer scorer".split()  # noqa: SIM905
    assert done.stdout.endswith(f"out.json: tests FAILED, {', '.join(f'{name} ok' for name in names[1:])}\n")
    written = json.loads(out.read_text("utf-8"))
    assert (written["quick"], written["backend"], list(written["parts"])) == (False, "gpu", names)
    assert "skipped, and BADLOSS_TEST_GPU=1 wants" in "".join(written["parts"]["tests"]["last_lines"])
    known = (tmp_path / "known").read_text("utf-8").splitlines()
    assert known == [" ".join(names[:count]) for count in range(1, len(names))]
    assert not list(tmp_path.glob(".*.json"))


def test_tests_that_want_a_gpu_do_not_pass_without(environment):
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", *ONE_TEST.split(), "tests/gpu"]
    changed = {"BADLOSS_TEST_GPU": "1"}
    done = subprocess.run(command, env=environment | changed, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert "BADLOSS_TEST_GPU=1 wants a GPU, and jax runs on cpu" in done.stdout


@pytest.mark.slow
def test_a_quick_check_runs_everything(environment, tmp_path):
    out = tmp_path / "out.json"
    done = run(environment, "gpu_check.sh", "--quick", out)
    assert done.returncode == 0, done.stdout
    parts = json.loads(out.read_text("utf-8"))["parts"]
    assert parts["small"]["figures"][0]["model"]["dtype"] == "bfloat16"
    assert parts["buffer"]["figures"][0]["examples"] == 2000
    assert {figure["method"] for figure in parts["scorer"]["figures"]} > {"numba", "xla", "sklearn brute"}


@pytest.mark.parametrize("script", ["gpu_check.sh", "gpu_paper.sh"])
@pytest.mark.parametrize("arguments", [["--config"], ["out", "--quick"], ["out", "1x"]])
def test_scripts_say_how_to_use_them(script, arguments, environment):
    done = run(environment, script, *arguments)
    assert done.returncode == 2
    assert f"launch/{script}" in done.stdout


@pytest.mark.parametrize("factor", ["0", "0.0", "-1", "2x", "1e3", "a"])
def test_time_limits_are_multiplied_by_a_number(environment, factor):
    done = run(environment, "gpu_check.sh", LIMITS=factor)
    assert done.returncode == 2
    assert "usage: [LIMITS=FACTOR]" in done.stdout


TRAINED = """\
import os, pathlib, signal, sys, time
folder = pathlib.Path(__file__).parent
workdir = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
name = "/".join(workdir.parts[-2:])
with (folder / "log").open("a") as log:
    log.write(" ".join(sys.argv[1:-2]) + " " + name + chr(10))
if sys.argv[1] == "score":
    sys.exit("too few epochs")
plan = folder / "plan" / name.replace("/", "-")
todo = plan.read_text().split() if plan.exists() else []
if todo:
    plan.write_text(" ".join(todo[1:]))
if todo and todo[0] == "wait":
    def stop(*_):
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    time.sleep(60)
if todo:
    sys.exit(int(todo[0]))
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "results.json").write_text(name)
"""


def log_of(tmp_path):
    """The runs that were begun, and what was scored."""
    lines = (tmp_path / "log").read_text("utf-8").splitlines()
    (tmp_path / "log").unlink()
    return [line if line.startswith("score ") else line.rpartition(" ")[2] for line in lines]


def plan(tmp_path, name, what):
    (tmp_path / "plan").mkdir(exist_ok=True)
    (tmp_path / "plan" / name).write_text(what)


def test_the_paper_is_stopped_by_its_budget_and_goes_on(environment, tmp_path):
    in_place_of_badloss(tmp_path, TRAINED)
    plan(tmp_path, "cifar10-seed3", "wait")
    out, results = tmp_path / "out", tmp_path / "results"
    stopped = run(environment, "gpu_paper.sh", out, 3, 4, BUDGET="0.1")
    assert stopped.returncode == 75, stopped.stdout
    assert "cifar10-resnet18 seed 3: done, copied to" in stopped.stdout
    assert "cifar10 seed 3: stopped; the same command goes on from here" in stopped.stdout
    assert f"python3 -m badloss_jax score --workdir {out}/cifar10/seed3\ntoo few epochs\nnothing is" in stopped.stdout
    assert "BADLOSS_GTSRB is not set: gtsrb is left out" in stopped.stdout
    assert log_of(tmp_path) == ["cifar10-resnet18/seed3", "cifar10/seed3", "score cifar10/seed3"]
    assert (results / "cifar10-resnet18" / "seed3.json").read_text() == "cifar10-resnet18/seed3"
    done = run(environment, "gpu_paper.sh", out, 3, 4, BUDGET="5", BADLOSS_GTSRB="GTSRB")
    assert done.returncode == 0, done.stdout
    assert "cifar10-resnet18 seed 3: finished before" in done.stdout
    assert log_of(tmp_path) == [
        "cifar10/seed3",
        "gtsrb/seed3",
        "cifar10-resnet18/seed4",
        "cifar10/seed4",
        "gtsrb/seed4",
    ]
    copied = {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()}
    assert copied == {f"{name}/seed{seed}.json" for name in ("cifar10", "cifar10-resnet18", "gtsrb") for seed in (3, 4)}


def test_a_run_that_fails_does_not_stop_the_others(environment, tmp_path):
    in_place_of_badloss(tmp_path, TRAINED)
    plan(tmp_path, "cifar10-resnet18-seed0", "1")
    done = run(environment, "gpu_paper.sh", tmp_path / "out", 0)
    assert done.returncode == 1, done.stdout
    assert "cifar10-resnet18 seed 0: FAILED with exit code 1" in done.stdout
    assert log_of(tmp_path) == ["cifar10-resnet18/seed0", "cifar10/seed0"]
    nothing = run(environment, "gpu_paper.sh", tmp_path / "out", 0, BADLOSS_CIFAR10="")
    assert nothing.returncode == 2


def test_experiments_can_be_chosen_and_ordered(environment, tmp_path):
    in_place_of_badloss(tmp_path, TRAINED)
    chosen = {"NAMES": "gtsrb cifar10", "BADLOSS_GTSRB": "GTSRB"}
    done = run(environment, "gpu_paper.sh", tmp_path / "out", 1, 0, **chosen)
    assert done.returncode == 0, done.stdout
    assert "left out" not in done.stdout
    assert log_of(tmp_path) == ["gtsrb/seed1", "cifar10/seed1", "gtsrb/seed0", "cifar10/seed0"]
    nothing = run(environment, "gpu_paper.sh", tmp_path / "out", 2, NAMES="gtsrb")
    assert nothing.returncode == 2
    assert "BADLOSS_GTSRB is not set: gtsrb is left out" in nothing.stdout
    for wrong in ("cifar10 resnet50", "cifar10,gtsrb", "@", "*", " "):
        done = run(environment, "gpu_paper.sh", tmp_path / "out", 2, NAMES=wrong)
        assert done.returncode == 2, wrong
        assert 'NAMES="cifar10-resnet18 cifar10 gtsrb"' in done.stdout
    assert not (tmp_path / "log").exists()


def test_results_of_other_settings_are_not_taken_for_the_papers(environment, tmp_path):
    in_place_of_badloss(tmp_path, TRAINED)
    before = sorted(Path("configs/results").rglob("*"))
    done = run(environment, "gpu_paper.sh", tmp_path / "out", 0, "--config.recording.epochs=3", RESULTS="")
    assert done.returncode == 0, done.stdout
    assert "not copied, as settings were changed" in done.stdout
    assert sorted(Path("configs/results").rglob("*")) == before
    assert "--config.seed=0 --config.recording.epochs=3" in (tmp_path / "log").read_text()


def test_the_papers_runs_are_named_after_their_configs():
    text = (LAUNCH / "gpu_paper.sh").read_text("utf-8")
    found = re.findall(r"^  \[(\S+)\]=(configs/\S+)$", text, re.MULTILINE)
    assert len(found) == 3
    assert f'\nall="{" ".join(name for name, _ in found)}"\n' in text
    for name, spec in found:
        assert spec == (f"configs/{name.replace('-', '.py:')}" if "-" in name else f"configs/{name}.py")
        assert load_config(spec).model.name == ("resnet18" if "resnet18" in name else "resnet50")


@pytest.mark.slow
def test_the_paper_shrunk_stopped_and_resumed(environment, tmp_path):
    """With badloss itself; a signal to the script ends a run in the way in which its budget does."""
    out = tmp_path / "out"
    first = out / "cifar10-resnet18" / "seed0"
    command = [LAUNCH / "gpu_paper.sh", out, "0", *SHRUNK]
    running = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        # Four epochs, of which a stop may cost the last.
        wait_until((first / "trajectories" / "loss" / "epoch_0003-00000-of-00001.npy").exists, 300)
        running.send_signal(signal.SIGTERM)
        shown, _ = running.communicate(timeout=300)
    finally:
        running.kill()
    assert running.returncode == 75, shown
    assert "stopped; the same command goes on from here" in shown
    assert re.search(r"The recording was not at its end: \d+ of 40 epochs were recorded", shown)
    assert len(list(first.glob("rescored/*/report.html"))) == 1
    done = run(environment, "gpu_paper.sh", out, 0, *SHRUNK)
    assert done.returncode == 0, done.stdout
    results = json.loads((tmp_path / "results" / "cifar10-resnet18" / "seed0.json").read_text("utf-8"))
    assert results["resumes"][0]["phase"] == "recording"
    assert (tmp_path / "results" / "cifar10" / "seed0.json").is_file()
