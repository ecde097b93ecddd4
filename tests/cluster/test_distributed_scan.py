"""`badloss scan --distributed`: two processes that decode what is theirs come to the verdict of one."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from badloss_jax.core.progress import Progress
from badloss_jax.data.prepare import prepare
from badloss_jax.trajectories.store import TrajectoryStore
from tests.cluster.test_processes import finish, free_address, python
from tests.runs.test_scan import write_digits

NETWORK = ["--config.model.stages=(16,)", "--config.recording.epochs=8"]


def scan(folder, out, count, *extra):
    """Returns (exit code, stdout, stderr) of each process."""
    arguments = ["-m", "badloss_jax", "scan", "--data", f"tfds:{folder / 'data'}"]
    arguments += ["--probes", str(folder / "probes.txt"), "--workdir", str(folder / out)]
    arguments += ["--config.data.input=streamed", f"--config.data.cache_dir={folder / 'cache'}", *extra]
    address = free_address()
    joining = ["--distributed", "--coordinator", address, "--num_processes", str(count), "--process_id"]
    return finish([python(*arguments, *([*joining, str(i)] if count > 1 else [])) for i in range(count)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Digits with noise in class 4, as a prepared data set, whose rows are in the order of its records."""
    folder = tmp_path_factory.mktemp("distributed")
    write_digits(folder / "images" / "train", count=400)
    write_digits(folder / "images" / "test", count=20, noise=0)
    prepare("image_folder", folder / "images", folder / "data", 0, Progress(None))
    return folder


@pytest.mark.slow
def test_two_processes_come_to_the_verdict_of_one(data):
    (data / "probes.txt").write_text("\n".join(map(str, range(0, 400, 5))))
    for out, count in (("one", 1), ("two", 2)):
        ends = scan(data, out, count, *NETWORK)
        assert [code for code, *_ in ends] == [0] * count, ends
    (_, said, progress), (_, silent, nothing) = ends
    assert "Report:" in said
    assert "recording  3,200 examples in" in progress
    assert json.loads((data / "two" / "config.json").read_text())["data"]["input"] == "streamed"
    assert "Report:" not in silent
    assert "recording" not in nothing

    one, two = (json.loads((data / out / "scan.json").read_text()) for out in ("one", "two"))
    assert (one["num_examples"], one["probe_rows"]) == (two["num_examples"], two["probe_rows"])
    assert one["verdict"] == two["verdict"]
    stores = [TrajectoryStore.open(data / out / "trajectories") for out in ("one", "two")]
    ours, theirs = (store.read("loss") for store in stores)
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=0, atol=1e-3)
    tables = [pq.read_table(data / out / "scores.parquet").to_pydict() for out in ("one", "two")]
    assert spearmanr(tables[0]["score"], tables[1]["score"])[0] > 0.98
    assert (data / "one" / "remove.txt").read_text() == (data / "two" / "remove.txt").read_text()
    assert len(list((data / "two" / "trajectories" / "loss").glob("*-of-00002.npy"))) == 16
