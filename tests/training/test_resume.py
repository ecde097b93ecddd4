"""Runs that are stopped at any moment, and what they need to go on to the same bits."""

import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from badloss_jax.core.errors import DataError, PreemptedError
from badloss_jax.core.mesh import make_mesh
from badloss_jax.core.preemption import Preemption
from badloss_jax.core.progress import Progress
from badloss_jax.runs.experiment import run_experiment
from badloss_jax.training import checkpoint
from badloss_jax.training.checkpoint import Checkpoints
from badloss_jax.training.in_flight import InFlight
from badloss_jax.training.loop import Passengers, Recipe, train
from badloss_jax.training.recorder import Recorder
from badloss_jax.trajectories.kinds import Kinds
from badloss_jax.trajectories.store import TrajectoryStore
from tests.conftest import ENVIRONMENT, ONLY_READS, overrides, without_cost
from tests.kills import snapshots
from tests.training.test_training import SPEC, resident

KINDS = Kinds(("features",), 10, 8, feature_dim=4)


class StopAfter(Preemption):
    """A machine that is taken away after so many steps."""

    def __init__(self, steps):
        super().__init__()
        self._left = steps

    def reached(self):
        self._left -= 1
        return self._left == 0


def training(
    folder,
    mesh,
    *,
    stop_after=0,
    identity="this",
    capture="step",
    spec=SPEC,
    kinds=KINDS,
    augment="crop_flip",
    epochs=3,
    **changed,
):
    """Three epochs of 25 steps (the last one padded), recorded; stopped after some steps if asked to."""
    data = resident(mesh)
    nobody = np.zeros(len(data), bool)
    store = TrajectoryStore(folder / "store", "", len(data), epochs, {})
    if not (store.folder / "about.json").exists():
        TrajectoryStore.create(store.folder, "", np.asarray(data.labels), nobody, epochs, kinds.layout())
    store = TrajectoryStore.open(store.folder)
    recorder = Recorder(kinds, capture, store, mesh, 64)
    reports = []
    settings = {"every_steps": 7, "preemption": StopAfter(stop_after)} | changed
    with Checkpoints(folder / "checkpoints", identity, len(data), **settings) as checkpoints:
        state = train(
            spec,
            Recipe(epochs, 3, 32, augment=augment),
            data,
            np.arange(len(data)),
            seed=0,
            phase="test",
            mesh=mesh,
            passengers=Passengers(recorder, checkpoints, on_epoch=reports.append),
        )
    return store, state, reports


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, mesh):
    return training(tmp_path_factory.mktemp("unbroken"), mesh)


@pytest.fixture
def stopped(tmp_path, mesh):
    """A training that was stopped after 40 steps, in the middle of its second epoch."""
    with pytest.raises(PreemptedError, match="after step 40; a checkpoint is saved in"):
        training(tmp_path, mesh, stop_after=40)
    return tmp_path


def assert_same(ours, theirs):
    for kind in KINDS.layout():
        np.testing.assert_array_equal(ours[0].read(kind), theirs[0].read(kind))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), ours[1], theirs[1]))


@pytest.mark.parametrize("stops", [(1,), (24, 1), (25, 25), (40, 30)])
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, mesh, unbroken, stops):
    for steps in stops:
        with pytest.raises(PreemptedError):
            training(tmp_path, mesh, stop_after=steps)
    resumed = training(tmp_path, mesh)
    assert_same(resumed, unbroken)
    told = ("epoch", "loss", "learning_rate")
    last = len(resumed[2])
    assert [[e[key] for key in told] for e in resumed[2]] == [[e[key] for key in told] for e in unbroken[2][-last:]]
    assert len(resumed[2]) == 3 - sum(stops) // 25 + (sum(stops) % 25 == 0)


def test_sweeps_go_on_to_the_same_bits(tmp_path, mesh):
    whole = training(tmp_path / "a", mesh, capture="sweep")
    with pytest.raises(PreemptedError):
        training(tmp_path / "b", mesh, capture="sweep", stop_after=55)
    assert_same(training(tmp_path / "b", mesh, capture="sweep"), whole)


@pytest.mark.slow
def test_a_training_moves_to_another_number_of_devices(stopped, unbroken):
    """From 1 to 8, whose column has 800 rows, and not 797; compared over the first 50 steps."""
    moved, *_ = training(stopped, make_mesh(jax.devices()[:8]))
    ours, theirs = moved.read("loss"), unbroken[0].read("loss")
    np.testing.assert_array_equal(ours[:, 0], theirs[:, 0])
    np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=0, atol=1e-5)
    assert not (ours[:, 2] == theirs[:, 2]).all()  # other devices did it, in another order of sums


_DOUBLE = """
import json, sys
from dataclasses import replace
from pathlib import Path
import jax, numpy as np
from badloss_jax.core.errors import PreemptedError
from badloss_jax.core.mesh import make_mesh
from tests.training.test_resume import training
from tests.training.test_training import KINDS, SPEC, record
folder, how = Path(sys.argv[1]), {"spec": replace(SPEC, dtype="float64"), "kinds": KINDS}
def on(count, augment):
    return record(folder / f"{count}{augment}", count, epochs=3, augment=augment, **how)[0].read("loss")
apart = {}
for augment, counts in (("none", (4, 8)), ("crop_flip", (4,))):
    one = on(1, augment)
    apart[augment] = max(np.abs(on(count, augment) - one).max() for count in counts)
one, eight = make_mesh(jax.devices()[:1]), make_mesh()
whole, *_ = training(folder / "whole", one, **how)
try:
    training(folder / "moved", eight, stop_after=40, **how)
except PreemptedError:
    moved, *_ = training(folder / "moved", one, **how)
apart["moved"] = np.abs(whole.read("loss") - moved.read("loss")).max()
print(json.dumps({name: float(value) for name, value in apart.items()}))
"""


@pytest.mark.slow
def test_whole_runs_agree_in_float64(tmp_path):
    """On any number of devices, with and without augmentation, and moved from eight to one in the middle."""
    environment = ENVIRONMENT | {"JAX_ENABLE_X64": "1", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": "."}
    run = subprocess.run(
        [sys.executable, "-c", _DOUBLE, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    apart = json.loads(run.stdout)
    assert apart.keys() == {"none", "crop_flip", "moved"}
    assert max(apart.values()) <= 1e-6


def test_another_trainings_checkpoint_is_refused(stopped, mesh):
    with pytest.raises(DataError, match=r"belongs to a training with other settings.*Removing .*checkpoints begins"):
        training(stopped, mesh, identity="that")


def test_a_checkpoint_of_another_format_is_refused(stopped, mesh):
    """Such as that which held all epochs."""
    for about in (stopped / "checkpoints").glob("*/about/*"):
        about.write_text(about.read_text().replace("badloss_jax.checkpoint/2", "badloss_jax.checkpoint/1"))
    with pytest.raises(DataError, match=r"format is 'badloss_jax.checkpoint/1'.*Removing .*checkpoints begins"):
        training(stopped, mesh)


def test_epochs_before_the_checkpoint_are_not_recorded_anew(stopped, mesh):
    next((stopped / "store" / "loss").glob("epoch_0000*")).unlink()
    with pytest.raises(DataError, match=r"store lacks epoch 0: .* Removing that folder begins this training again"):
        training(stopped, mesh)


def test_epochs_after_the_checkpoint_are_recorded_anew(stopped, mesh, unbroken):
    """A stored epoch that was reached after it, by more processes than there are now, is not taken for the new one."""
    store = TrajectoryStore.open(stopped / "store")
    columns = {kind: np.zeros((797, *shape), dtype) for kind, (shape, dtype) in store.layout.items()}
    for shard in range(2):
        rows = slice(400 * shard, 400 * shard + 400)
        store.write_epoch(1, {kind: column[rows] for kind, column in columns.items()}, shard, 2)
    assert_same(training(stopped, mesh), unbroken)


@pytest.mark.parametrize(("kinds", "held"), [((), []), (("step",), ["column_step"])])
def test_a_checkpoint_holds_what_steps_have_written_and_no_more(tmp_path, mesh, kinds, held):
    training(tmp_path, mesh, capture="sweep", kinds=Kinds(kinds, 10, 8), epochs=1)
    about = next((tmp_path / "checkpoints").glob("*/about/*"))
    assert [name for name in json.loads(about.read_text())["arrays"] if "column" in name] == held


def test_dtypes_are_checked(stopped, mesh, monkeypatch):
    about = next((stopped / "checkpoints" / "40" / "about").glob("*"))
    about.write_text(about.read_text().replace("float32 [797]", "float16 [797]"))
    shutil.rmtree(stopped / "checkpoints" / "35")
    with pytest.raises(DataError, match=r"column_loss is float16 \[797\], expected float32 \[797\]"):
        training(stopped, mesh)


def tear(checkpoint):
    """Cuts the files that hold the arrays in half."""
    files = [path for path in checkpoint.glob("arrays/**/d/*") if path.is_file()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(checkpoint):
    """Changes a checksum, as a change of the data would."""
    about = next((checkpoint / "about").glob("*"))
    content = json.loads(about.read_text())
    content["checksums"]["column_loss"] ^= 1
    about.write_text(json.dumps(content))


@pytest.mark.parametrize("harm", [tear, flip])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(stopped, mesh, unbroken, harm):
    harm(stopped / "checkpoints" / "40")
    with pytest.warns(UserWarning, match=r"checkpoints/40 cannot be used: .*; going on from the one before, .*/35"):
        assert_same(training(stopped, mesh), unbroken)


@pytest.mark.parametrize("harm", [tear, flip])
def test_if_all_are_damaged_the_training_stops(stopped, mesh, harm):
    for number in ("40", "35"):
        harm(stopped / "checkpoints" / number)
    with pytest.raises(DataError, match=r"checkpoints/40 cannot be used.*checkpoints/35 cannot be used.*Removing"):
        training(stopped, mesh)
    assert (stopped / "checkpoints" / "40").is_dir()  # nobody else's decision


def test_minutes_become_steps(tmp_path, mesh):
    training(tmp_path, mesh, every_steps=0, every_minutes=1e-7, epochs=1)
    saved = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == [24, 25]


def test_the_clock_sees_steps_that_are_done(tmp_path, mesh, monkeypatch):
    """Not those that the host is ahead of."""
    flights, looks = [], []
    init = InFlight.__init__

    def begin(flight, *given):
        flights.append(flight)
        init(flight, *given)

    def look():
        looks.append(len(flights[-1]._pending))
        return time.monotonic()

    monkeypatch.setattr(InFlight, "__init__", begin)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=look))
    training(tmp_path, mesh, every_steps=0, every_minutes=1, epochs=1)
    assert looks == [0, 0]


@pytest.mark.usefixtures("unrendered")
def test_sigterm_saves_and_leaves_with_75(tmp_path, tiny, mesh):
    """The real signal, in the middle of the recording; then the same run again."""
    changed = {
        "recording__epochs": 30,
        "recording__schedule_epochs": 30,
        "recording__kinds": "()",
        "scoring__kinds": "('loss',)",
        "retraining__enabled": False,
        "retraining__variants": "()",
        "controls": "()",
    }
    command = [sys.executable, "-m", "badloss_jax", "run", "--config", "configs/digits.py"]
    command += ["--workdir", str(tmp_path), *overrides(**changed)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "metrics.jsonl").is_file(), process)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 75, err
    assert "badloss: stopped by SIGTERM after step" in err
    step = int(err.split("after step ")[1].split(";")[0])

    said = io.StringIO()
    results = run_experiment(tiny(**changed), tmp_path, Progress(said), mesh=mesh)
    assert f"recording goes on after step {step}" in said.getvalue()
    assert results["resumes"] == [{"phase": "recording", "step": step}]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["model"] == "recording"] == list(range(30))
    assert not list((tmp_path / "checkpoints").iterdir())


def wait_for(fact, process, seconds=200):
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def test_a_stalled_run_shows_its_stacks_and_ends(tmp_path):
    code = """
import time
from badloss_jax.training.watchdog import Watchdog
with Watchdog(0.02) as watchdog:
    for _ in range(20):
        time.sleep(0.1)
        watchdog.alive()
    print("alive for 2 s", flush=True)
    time.sleep(60)
"""
    stalled = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert stalled.returncode == 1
    assert stalled.stdout == "alive for 2 s\n"
    assert "Timeout" in stalled.stderr
    assert 'File "<string>", line 9' in stalled.stderr


_FULL = """
import resource, signal, sys
from pathlib import Path
import jax
from badloss_jax.core.errors import DataError
from badloss_jax.training.checkpoint import Checkpoints
from badloss_jax.core.mesh import make_mesh
from tests.training.test_resume import training
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = Checkpoints.save
def fill_up(self, *arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    save(self, *arguments)
Checkpoints.save = fill_up
try:
    training(Path(sys.argv[1]), make_mesh(jax.devices()[:1]))
except DataError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_last_good_checkpoint(stopped, mesh, unbroken):
    """No file can grow beyond 4 KiB from the first checkpoint on, after 42 steps."""
    environment = ENVIRONMENT | ONLY_READS | {"PYTHONPATH": ".", "JAX_NUM_CPU_DEVICES": "8"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    full = subprocess.run(
        [sys.executable, "-c", _FULL, str(stopped)], env=environment, capture_output=True, text=True, check=False
    )
    assert "a checkpoint cannot be written in" in full.stdout, full.stderr
    assert "the last good one stays" in full.stdout
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir() if path.name.isdigit()) == ["35", "40"]
    assert_same(training(stopped, mesh), unbroken)


# As little as has every kind of file: checkpoints of a recording and of two networks, each taken up again.
KILLED = {
    "recording__batch_size": 100,
    "recording__kinds": "()",
    "scoring__kinds": "('loss',)",
    "retraining__batch_size": 100,
    "retraining__epochs": 1,
    "retraining__variants": "()",
    "controls": "()",
    "checkpoint__every_steps": 5,
    "report__gallery": 1,
}


def what_counts(workdir):
    """Everything that must not depend on how often a run was killed."""
    results = json.loads((workdir / "results.json").read_text())
    kept = {key: results[key] for key in ("undefended", "recording_model", "epochs_kept")}
    kept["variants"] = without_cost(results["variants"])
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept["epochs"] = [(line["model"], line["epoch"], line["loss"]) for line in lines]
    kept["files"] = {
        folder.parent.name: sorted(path.name for path in folder.iterdir())
        for folder in workdir.glob("models/*/weights")
    }
    return (workdir / "scores.parquet").read_bytes(), kept


@pytest.mark.slow
def test_a_kill_before_any_change_of_a_file_leaves_no_trace(tmp_path, tiny, mesh, monkeypatch):
    """At every moment there is, where `test_kills_leave_no_trace` is real and at random."""
    monkeypatch.setattr("badloss_jax.runs.experiment.write_reports", lambda folder: None)
    config = tiny(**KILLED)
    with snapshots(tmp_path / "whole", tmp_path / "killed") as moments:
        run_experiment(config, tmp_path / "whole", mesh=mesh)

    expected = what_counts(tmp_path / "whole")
    assert any("/checkpoints/recording/" in change for change, _ in moments.taken)
    assert len(moments.taken) > 30
    for change, workdir in moments.taken:
        run_experiment(config, workdir, mesh=mesh)
        assert what_counts(workdir) == expected, f"killed before {change}"
        assert not list((workdir / "checkpoints").iterdir())


@pytest.mark.slow
def test_kills_leave_no_trace(tmp_path):
    """kill -9 in every training in turn, a random time after it has got further than the run before."""
    changed = {
        "recording__epochs": 20,
        "recording__schedule_epochs": 20,
        "retraining__epochs": 20,
        "controls": "()",
        "retraining__variants": "('loss/fraction',)",
        "checkpoint__every_steps": 20,
        "scoring__kinds": "('loss',)",
        "recording__kinds": "()",
    }
    command = [sys.executable, "-m", "badloss_jax", "run", "--config", "configs/digits.py", *overrides(**changed)]
    subprocess.run([*command, "--workdir", str(tmp_path / "whole")], env=ENVIRONMENT, capture_output=True, check=True)

    workdir = tmp_path / "run"
    command += ["--workdir", str(workdir)]
    draw = random.Random(0)
    for training in ("recording", "undefended", "loss-fraction"):
        process = subprocess.Popen(command, env=ENVIRONMENT | ONLY_READS, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: checkpoints(workdir, training), process)  # noqa: B023
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        err = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, err
        assert not (workdir / "results.json").exists()

    last = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr
    assert "recording  done before" in last.stderr
    resumes = json.loads((workdir / "results.json").read_text())["resumes"]
    assert [resume["phase"] for resume in resumes] == ["recording", "undefended", "loss/fraction"]
    assert all(resume["step"] > 0 for resume in resumes)
    assert what_counts(workdir) == what_counts(tmp_path / "whole")


def checkpoints(workdir, training):
    """All whole checkpoints of a training."""
    return [path for path in workdir.glob(f"checkpoints/{training}/*") if path.name.isdigit()]
