import io
import json
import math
import pickle
import re
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import jax
import numpy as np
import pytest

from badloss_jax.attacks.manifest import draw_manifest
from badloss_jax.attacks.poisoning import apply_manifest, unpoisoned
from badloss_jax.config import load_config
from badloss_jax.core import order as orders
from badloss_jax.core.errors import DataError
from badloss_jax.core.mesh import make_mesh
from badloss_jax.core.order import TrainingPasses, cut_batches, epoch_batches
from badloss_jax.core.progress import Progress
from badloss_jax.data import digits
from badloss_jax.models import ModelSpec
from badloss_jax.runs.experiment import run_experiment
from badloss_jax.training.loop import Passengers, Recipe, train
from badloss_jax.training.passes import map_examples
from badloss_jax.training.recorder import Recorder
from badloss_jax.training.resident import ResidentData
from badloss_jax.training.streamed import StreamedData
from badloss_jax.trajectories.kinds import Kinds
from badloss_jax.trajectories.store import TrajectoryStore
from tests.conftest import ENVIRONMENT, overrides

COUNT = 797


@pytest.fixture(scope="module")
def poisoning():
    return make_poisoning()


def make_poisoning():
    changed = {"attacks__names": "('patch','blend_p','sinusoid')", "attacks__overlap": 0.3}
    config = load_config("configs/digits.py", overrides(**changed))
    train_set = digits.load({}).train
    images = np.pad(train_set.images[:COUNT], ((0, 0), (2, 2), (2, 2), (0, 0)))
    labels = train_set.labels[:COUNT]
    return apply_manifest(draw_manifest(config.attacks, labels, 10, (12, 12, 1), 0), images, labels)


def resident(poisoning, mesh):
    return ResidentData.place(
        mesh, poisoning.images, poisoning.labels, poisoning.ids, poisoning.triggered(poisoning.ids)
    )


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("start", [0, 11])
def test_batches_hold_what_lies_on_the_devices_bit_by_bit(poisoning, devices, start):
    mesh = make_mesh(jax.devices()[:devices])
    order = epoch_batches(np.arange(COUNT), 32, 800, seed=0, phase="p", epoch=0)
    streamed = list(StreamedData(poisoning, mesh).batches(order, start))
    assert len(streamed) == 25 - start
    for ours, theirs in zip(streamed, resident(poisoning, mesh).batches(order, start), strict=True):
        real = np.asarray(ours.real)
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(real, theirs.real)
        np.testing.assert_array_equal(ours.labels[real], theirs.labels[real])
        np.testing.assert_array_equal(ours.images[real], theirs.images[real])
    assert not real.all()  # the last batch is padded


@pytest.mark.parametrize("devices", [1, 4])
def test_passes_see_what_lies_on_the_devices(poisoning, devices):
    mesh, ids = make_mesh(jax.devices()[:devices]), np.arange(COUNT)[::-3]

    def look(batch):
        return batch.ids, batch.labels, batch.images

    ours, theirs = (map_examples(look, data, ids, 50, mesh)
                    for data in (StreamedData(poisoning, mesh), resident(poisoning, mesh)))  # fmt: skip
    for here, there in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(here, there)
    np.testing.assert_array_equal(ours[0], ids)
    np.testing.assert_array_equal(ours[1], poisoning.labels[ids])


SPEC = ModelSpec("resnet_small", (12, 12, 1), 10, (8,), 1)
DOUBLE = replace(SPEC, dtype="float64")
KINDS = Kinds((), 10, 8)


def losses(folder, data, mesh, spec=SPEC):
    """Records 50 steps with crops and flips, the last one of each epoch padded."""
    labels = np.zeros(COUNT, np.int32)
    store = TrajectoryStore.create(folder, "", labels, labels > 0, 2, KINDS.layout())
    train(spec, Recipe(2, 30, 32, augment="crop_flip"), data, np.arange(COUNT), seed=0, phase="test", mesh=mesh,
          passengers=Passengers(Recorder(KINDS, "sweep", store, mesh, 64)))  # fmt: skip
    return store.read("loss")


@pytest.mark.parametrize("devices", [1, 4])
def test_fifty_steps_are_those_of_resident_data(poisoning, tmp_path, devices):
    mesh = make_mesh(jax.devices()[:devices])
    ours = losses(tmp_path / "streamed", StreamedData(poisoning, mesh), mesh)
    theirs = losses(tmp_path / "resident", resident(poisoning, mesh), mesh)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert ours.std() > 0.1


_X64 = """
import sys, jax, numpy as np
from pathlib import Path
from badloss_jax.core.mesh import make_mesh
from badloss_jax.training.streamed import StreamedData
from tests.data.test_streamed import DOUBLE, losses, make_poisoning, resident
poisoning, mesh = make_poisoning(), make_mesh()
ours = losses(Path(sys.argv[1]) / "streamed", StreamedData(poisoning, mesh), mesh, DOUBLE)
theirs = losses(Path(sys.argv[1]) / "resident", resident(poisoning, mesh), mesh, DOUBLE)
print(np.abs(ours - theirs).max())
"""


@pytest.mark.slow
def test_a_whole_run_in_float64_is_that_of_resident_data(tmp_path):
    environment = ENVIRONMENT | {"JAX_ENABLE_X64": "1", "PYTHONPATH": "."}
    run = subprocess.run(
        [sys.executable, "-c", _X64, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 1e-6


_WORKERS = """
if __name__ == "__main__":  # all of it, as the workers import this module, too, and need nothing of it
    import multiprocessing
    import jax
    import numpy as np
    from badloss_jax.core.mesh import make_mesh
    from badloss_jax.training.streamed import StreamedData
    from tests.data.test_streamed import make_poisoning, passes_of
    poisoning, mesh, passes = make_poisoning(), make_mesh(), passes_of()
    def batches(workers):
        for batch in StreamedData(poisoning, mesh, workers).stream(passes, 0, 3):
            yield [np.asarray(part) for part in (batch.images, batch.labels, batch.ids)]
    count, started = 0, set()
    for ours, theirs in zip(batches(2), batches(0), strict=True):
        assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))
        started |= {child.pid for child in multiprocessing.active_children()}
        count += 1
    print(count, len(started))
"""


@pytest.mark.slow
def test_worker_processes_decode_the_same_and_start_once(tmp_path):
    """Three epochs with their sweeps, in a program of its own, as workers import its main module."""
    (tmp_path / "program.py").write_text(_WORKERS)
    environment = ENVIRONMENT | {"PYTHONPATH": "."}
    run = subprocess.run([sys.executable, str(tmp_path / "program.py")], env=environment, capture_output=True,
                         text=True, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(3 * (25 + 13) - 3), "2"]


def test_room_for_poison_is_enough_takes_few_sizes_and_is_the_same_everywhere(poisoning):
    mesh = make_mesh(jax.devices()[:4])
    data = StreamedData(poisoning, mesh)
    order = epoch_batches(np.arange(COUNT), 32, 800, seed=0, phase="p", epoch=0)
    poisoned = np.append(poisoning.attack_of >= 0, False)[np.minimum(order, COUNT)]
    rooms = np.array([data._room(ids) for ids in order])
    assert (rooms >= poisoned.reshape(25, 4, 8).sum(2).max(1)).all()
    assert set(rooms) <= {4, 8}
    assert (rooms == rooms[0]).mean() > 0.9
    assert data._room(np.resize(poisoning.ids, 32)) == 8  # of every share all
    assert StreamedData(unpoisoned(poisoning.images, poisoning.labels), mesh)._room(order[0]) == 1


class Counted:
    """Images that know how many of them were read."""

    def __init__(self, images):
        self.images, self.read = images, 0
        self.shape, self.dtype, self.ndim = images.shape, images.dtype, images.ndim

    def __getitem__(self, rows):
        self.read += len(rows)
        return self.images[rows]


@pytest.mark.parametrize("devices", [1, 4])
def test_only_a_few_batches_are_read_ahead(poisoning, mesh, monkeypatch, devices):
    """And in pieces, some of them smaller, whose images are in their order all the same."""
    monkeypatch.setattr("badloss_jax.training.streamed._PIECE", 3 * math.prod(poisoning.images.shape[1:]))
    images = Counted(poisoning.images)
    mesh = make_mesh(jax.devices()[:devices])
    data = StreamedData(replace(poisoning, images=images), mesh, threads=2)
    order = np.arange(800, dtype=np.int32).reshape(50, 16)
    with closing(data.batches(order)) as batches:
        for ids in order[:20]:
            np.testing.assert_array_equal(next(batches).ids, ids)
        time.sleep(0.5)  # they would go on reading
        # Two batches on the devices, one that is put together, four pieces in threads and one in each of them.
        assert 20 * 16 <= images.read <= (20 + 3) * 16 + 6 * 3


def passes_of(**changed):
    """Three epochs of 25 steps and a sweep of 13."""
    return TrainingPasses(**{
        "example_ids": np.arange(COUNT), "batch_size": 32, "padding_id": 800, "seed": 0, "phase": "p", "epochs": 3,
        "swept": COUNT, "sweep_batch": 64,
    } | changed)  # fmt: skip


@pytest.mark.parametrize("resident_too", [False, True])
@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (1, 24), (1, 25)])
def test_a_stream_goes_through_all_passes_from_where_it_is_begun(poisoning, mesh, resident_too, epoch, step):
    passes = passes_of()
    assert passes.shapes == [(25, 32), (13, 64)] * 3
    data = resident(poisoning, mesh) if resident_too else StreamedData(poisoning, mesh)
    given = [np.asarray(batch.ids) for batch in data.stream(passes, passes.number_of(epoch), step)]

    expected = []
    for later in range(epoch, 3):
        expected += [*epoch_batches(np.arange(COUNT), 32, 800, seed=0, phase="p", epoch=later)]
        expected += [*cut_batches(np.arange(COUNT), 64, 800)]
    assert len(given) == len(expected) - step
    for ours, theirs in zip(given, expected[step:], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_training_without_sweeps_has_no_passes_for_them(poisoning, mesh):
    passes = passes_of(swept=0)
    assert passes.shapes == [(25, 32)] * 3
    np.testing.assert_array_equal(passes.order(2), passes_of().order(4))
    # Stopped after the very last step.
    assert not list(StreamedData(poisoning, mesh).stream(passes, 2, 25))


def test_few_orders_are_kept_and_workers_get_none(monkeypatch):
    counted = []
    usual = orders.epoch_batches
    monkeypatch.setattr(orders, "epoch_batches", lambda *given, **named: counted.append(0) or usual(*given, **named))
    passes = passes_of()
    for number in (0, 1, 2, 0, 1, 2):
        passes.order(number)
    assert len(counted) == 2
    passes.order(4)
    assert sorted(passes._known) == [2, 4]
    copy = pickle.loads(pickle.dumps(passes))  # noqa: S301
    assert not copy._known
    np.testing.assert_array_equal(copy.order(4), passes.order(4))


def test_what_cannot_be_read_stops_the_run_and_is_named(poisoning):
    class Damaged:
        shape, dtype, ndim = poisoning.images.shape, poisoning.images.dtype, 4

        def __getitem__(self, rows):
            raise DataError("record 7 of shard 3 cannot be read")

    mesh = make_mesh(jax.devices()[:1])
    order = epoch_batches(np.arange(COUNT), 32, 800, seed=0, phase="p", epoch=0)
    with pytest.raises(DataError, match="record 7 of shard 3"):
        list(StreamedData(replace(poisoning, images=Damaged()), mesh).batches(order))


@pytest.mark.slow
@pytest.mark.usefixtures("unrendered")
def test_runs_are_the_same_either_way(tmp_path, tiny, mesh):
    said = io.StringIO()
    changed = {"controls": "()", "retraining__augment": "crop_flip", "retraining__variants": "('loss/fraction',)"}
    config = tiny(data__input="streamed", **changed)
    ours = run_experiment(config, tmp_path / "streamed", Progress(said, 0), mesh=mesh)
    assert re.search(r"epoch \d/3 .* input \d+ %", said.getvalue())
    lines = [json.loads(line) for line in (tmp_path / "streamed" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["input_wait"] < 1 for line in lines)
    theirs = run_experiment(tiny(**changed), tmp_path / "resident", Progress(said_there := io.StringIO(), 0), mesh=mesh)
    assert "  input " not in said_there.getvalue()
    assert ours["variants"].keys() == theirs["variants"].keys()
    one, other = (TrajectoryStore.open(tmp_path / name / "trajectories") for name in ("streamed", "resident"))
    np.testing.assert_allclose(one.read("loss"), other.read("loss"), rtol=0, atol=1e-5)
    assert one.recording_hash == other.recording_hash  # so that a run may go on either way
