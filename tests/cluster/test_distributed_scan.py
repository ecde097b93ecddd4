"""`badloss scan --distributed`: two processes that decode what is theirs come to the verdict of one."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from badloss_jax.config import default_config
from badloss_jax.core.progress import Progress
from badloss_jax.data import tfds
from badloss_jax.data.prepare import prepare
from badloss_jax.trajectories.store import TrajectoryStore
from tests.cluster.test_processes import finish, free_address, python
from tests.runs.test_scan import SMALL, write_digits


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
    """The folder of digits with noise in class 4, as a prepared data set, and clean probes; and the rows of noise."""
    folder = tmp_path_factory.mktemp("distributed")
    write_digits(folder / "images" / "train")
    write_digits(folder / "images" / "test", count=20, noise=0)
    prepare("image_folder", folder / "images", folder / "data", 0, Progress(None))

    settings = default_config().data
    settings.dir = str(folder / "data")
    settings.cache_dir = str(folder / "cache")
    images = tfds.load_training(settings)[0].materialised().images
    is_noise = images[:, :, 0].mean((1, 2)) > 40  # digits leave their first column empty
    assert is_noise.sum() == 20
    probes = np.flatnonzero(~is_noise)[::6]
    (folder / "probes.txt").write_text("\n".join(map(str, probes)))
    return folder, set(np.flatnonzero(is_noise).tolist())


@pytest.mark.slow
def test_two_processes_come_to_the_verdict_of_one(data):
    data, noise = data
    for out, count in (("one", 1), ("two", 2)):
        ends = scan(data, out, count, *SMALL)
        assert [code for code, *_ in ends] == [0] * count, ends
    (_, said, progress), (_, silent, nothing) = ends
    assert "Report:" in said
    assert "recording  2,000 examples in" in progress
    assert json.loads((data / "two" / "config.json").read_text())["data"]["input"] == "streamed"
    assert "Report:" not in silent
    assert "recording" not in nothing

    one, two = (json.loads((data / out / "scan.json").read_text()) for out in ("one", "two"))
    assert (one["num_examples"], one["probe_rows"]) == (two["num_examples"], two["probe_rows"])
    assert one["stands_out"]
    assert one["verdict"] == two["verdict"]
    stores = [TrajectoryStore.open(data / out / "trajectories") for out in ("one", "two")]
    ours, theirs = (store.read("loss") for store in stores)
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=0, atol=1e-3)
    tables = [pq.read_table(data / out / "scores.parquet").to_pydict() for out in ("one", "two")]
    assert spearmanr(tables[0]["score"], tables[1]["score"])[0] > 0.98
    removed = [(data / out / "remove.txt").read_text() for out in ("one", "two")]
    assert removed[0] == removed[1]
    assert {int(row) for row in removed[0].split()} == noise
    assert len(list((data / "two" / "trajectories" / "loss").glob("*-of-00002.npy"))) == 8
