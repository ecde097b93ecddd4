"""`badloss score --trajectories`: the same answers as in memory, in parts, interrupted, from files of any origin."""

import json
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from badloss_jax.cli import main
from badloss_jax.config import default_config, override
from badloss_jax.defenses.badloss import detect
from badloss_jax.runs import score_stored
from badloss_jax.scoring import benjamini_hochberg, benjamini_hochberg_threshold, conformal_p_values, largest_threshold
from badloss_jax.trajectories.store import TrajectoryStore

N, T = 1000, 6
LAYOUT = {"loss": ((), "float32"), "ranked": ((4,), "float16"), "features": ((5,), "float16")}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(score_stored, "_PART", 300)
    monkeypatch.setattr("badloss_jax.scoring.rows.CHUNK_VALUES", 97 * T)


@pytest.fixture
def store(tmp_path, rng):
    is_probe = np.isin(np.arange(N), rng.choice(N, 60, replace=False))
    made = TrajectoryStore.create(tmp_path / "store", "h", np.arange(N) % 7, is_probe, T, LAYOUT)
    odd = np.where(np.arange(N) % 11 == 0, 3.0, 1.0)
    for epoch in range(T):
        columns = {}
        for kind, (shape, dtype) in LAYOUT.items():
            noise = rng.random((N, *shape)) * odd.reshape(-1, *(1 for _ in shape))
            columns[kind] = np.round(noise, 1 if kind == "loss" else 9).astype(dtype)  # with ties
        for shard, begin in enumerate((0, 450)):
            made.write_epoch(epoch, {k: v[begin : (450, N)[shard]] for k, v in columns.items()}, shard, 2)
    return made


def table(folder):
    paths = sorted((folder / "scores").glob("part-*.parquet"))
    return {name: np.concatenate([pq.read_table(path)[name].to_numpy() for path in paths])
            for name in pq.read_table(paths[0]).column_names}  # fmt: skip


def test_the_first_epochs_alone(tmp_path, store, capsys):
    first = TrajectoryStore.create(tmp_path / "first", "h", store.labels(), np.isin(np.arange(N), store.probe_ids()), 4,
                                   LAYOUT)  # fmt: skip
    for epoch in range(4):
        first.write_epoch(epoch, {kind: store.read(kind, np.array([epoch]))[:, 0] for kind in LAYOUT})
    given = ["--config.scoring.loss.k=7", "--config.scoring.epochs=4"]
    for trajectories, chosen in ((store, given), (first, given[:1])):
        arguments = [
            "score",
            "--trajectories",
            str(trajectories.folder),
            "--workdir",
            str(tmp_path / str(chosen[1:])),
        ]
        assert main([*arguments, *chosen]) == 0
    ours, theirs = table(tmp_path / str(given[1:])), table(tmp_path / "[]")
    assert ours.keys() == theirs.keys()
    for name, column in ours.items():
        np.testing.assert_array_equal(column, theirs[name], err_msg=name)
    config = override(default_config(), ["--config.probes.count=60", "--config.scoring.kinds=('loss','ranked')",
                                         "--config.retraining.variants=()", *given])  # fmt: skip
    detections, epochs = detect(store, store.probe_ids(), config.scoring, config.rejection)
    assert set(epochs) <= set(range(4))
    for kind, detection in detections.items():
        np.testing.assert_allclose(ours[f"distance_{kind}"], detection.distances, rtol=1e-6)
        np.testing.assert_array_equal(ours[f"removed_{kind}_fraction"], detection.removed["fraction"])
    np.save(tmp_path / "features.npy", store.read("features"))
    np.save(tmp_path / "probes.npy", store.probe_ids())
    arguments = ["score", "--trajectories", str(tmp_path / "features.npy"), "--probes", str(tmp_path / "probes.npy")]
    assert main([*arguments, "--workdir", str(tmp_path / "a"), "--config.scoring.epochs=4"]) == 0
    np.save(tmp_path / "features.npy", store.read("features", np.arange(4)))
    assert main([*arguments, "--workdir", str(tmp_path / "b")]) == 0
    np.testing.assert_array_equal(
        table(tmp_path / "a")["distance_features"], table(tmp_path / "b")["distance_features"]
    )
    capsys.readouterr()
    assert main([*arguments, "--workdir", str(tmp_path / "c"), "--config.scoring.epochs=5"]) == 2
    assert "scoring.epochs = 5: expected 0, or 3 to recording.epochs = 4" in capsys.readouterr().err


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("rules", ["('fraction','alpha','fdr')", "('fraction@0.013','fraction@0.99','alpha@0.2')"])
def test_the_answers_are_those_of_a_run(tmp_path, store, rules, by_class, capsys):
    out = tmp_path / "out"
    given = [f"--config.rejection.rules={rules}", "--config.rejection.fdr=0.6", "--config.scoring.loss.k=7",
             f"--config.scoring.by_class={by_class}"]  # fmt: skip
    assert main(["score", "--trajectories", str(store.folder), "--workdir", str(out), *given]) == 0
    config = override(default_config(), ["--config.probes.count=60", *given, "--config.retraining.variants=()",
                                         "--config.scoring.kinds=('loss','ranked','features','combined')"])  # fmt: skip
    detections, epochs = detect(store, store.probe_ids(), config.scoring, config.rejection)
    said, found = table(out), json.loads((out / "scoring.json").read_text("utf-8"))
    assert found["epochs_kept"] == epochs.tolist()
    assert (found["num_examples"], found["probe_count"], found["parts"]) == (N, 60, 4)
    np.testing.assert_array_equal(said["example_id"], np.arange(N))
    np.testing.assert_array_equal(said["label"], store.labels())
    np.testing.assert_array_equal(np.flatnonzero(said["probe"]), store.probe_ids())
    assert list(found["kinds"]) == ["loss", "ranked", "features", "combined"]
    for kind, detection in detections.items():
        np.testing.assert_array_equal(said[f"distance_{kind}"], detection.distances)
        np.testing.assert_array_equal(said[f"p_value_{kind}"], detection.p_values)
        assert said[f"score_{kind}"].min() == 0
        assert said[f"score_{kind}"].max() == 1
        for rule, removed in detection.removed.items():
            np.testing.assert_array_equal(said[f"removed_{kind}_{rule}"], removed, err_msg=f"{kind} {rule}")
            assert found["kinds"][kind]["rules"][rule]["removed"] == removed.sum()
    assert "combined/" in capsys.readouterr().out
    assert not (out / "distances").exists()


@pytest.mark.parametrize("form", ["ids.txt", "ids.npy", "own.npy"])
@pytest.mark.parametrize("width", [(), (3,)])
def test_files_of_any_origin(tmp_path, rng, form, width):
    rows, ids = rng.random((N, T, *width)).astype(np.float32), np.array([5, 3, 999, 640, 17])
    np.save(tmp_path / "rows.npy", rows)
    probes = tmp_path / form
    if form == "ids.txt":
        probes.write_text("\n".join(map(str, ids)) + "\n")
    else:
        np.save(probes, ids if form == "ids.npy" else rows[ids])
    kind = "features" if width else "loss"
    given = ["--trajectories", str(tmp_path / "rows.npy"), "--probes", str(probes), f"--config.scoring.{kind}.k=2"]
    assert main(["score", *given, "--workdir", str(tmp_path / "out")]) == 0
    said = table(tmp_path / "out")
    assert "label" not in said
    pairs = np.sqrt(((rows[:, None] - rows[None, ids]).reshape(N, 5, -1).astype(np.float64) ** 2).sum(-1))
    expected = np.sort(pairs, 1)[:, :2].mean(1)
    np.testing.assert_allclose(said[f"distance_{kind}"], expected, rtol=1e-5)
    assert said["probe"].sum() == (0 if form == "own.npy" else 5)
    assert not (said[f"removed_{kind}_fraction"] & said["probe"]).any()
    assert said[f"removed_{kind}_fraction"].sum() == 400


def test_a_killed_scoring_goes_on(tmp_path, store, monkeypatch):
    """Parts that are finished are not computed again, a torn one is; the end is that of an unbroken scoring."""
    command = ["score", "--trajectories", str(store.folder), "--workdir"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    real, calls = score_stored.knn_distances, []

    def fails(rows, *rest, **named):
        calls.append(rows.begin)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(rows, *rest, **named)

    monkeypatch.setattr(score_stored, "knn_distances", fails)
    assert main([*command, str(tmp_path / "broken")]) == 130
    assert calls == [0, 300, 600]
    torn = tmp_path / "broken" / "distances" / "loss-50" / "part-00001.npy"
    torn.write_bytes(torn.read_bytes()[:-7])
    assert main([*command, str(tmp_path / "broken")]) == 0
    assert calls[3:6] == [300, 600, 900]
    for name, column in table(tmp_path / "whole").items():
        np.testing.assert_array_equal(table(tmp_path / "broken")[name], column)
    done = len(calls)
    assert main([*command, str(tmp_path / "broken")]) == 0
    assert len(calls) == done


def test_a_scoring_killed_by_the_system_goes_on(tmp_path, rng):
    np.save(tmp_path / "rows.npy", rng.random((2_200_000, 3), np.float32).astype(np.float16))
    (tmp_path / "probes.txt").write_text("\n".join(map(str, range(250))))
    command = [sys.executable, "-m", "badloss_jax", "score", "--trajectories", str(tmp_path / "rows.npy"), "--probes",
               str(tmp_path / "probes.txt"), "--workdir"]  # fmt: skip
    first = tmp_path / "killed" / "distances" / "loss-50" / "part-00000.npy"
    with subprocess.Popen([*command, str(tmp_path / "killed")]) as process:
        while process.poll() is None and not first.is_file():
            time.sleep(0.001)
        process.kill()
    assert first.is_file()
    assert not (tmp_path / "killed" / "scores").exists()
    for folder in ("killed", "whole"):
        done = subprocess.run([*command, str(tmp_path / folder)], check=True, text=True, stderr=subprocess.PIPE)
        assert ("2,200,000 examples" in done.stderr) == (folder == "whole")
    ours, theirs = (pq.read_table(tmp_path / folder / "scores") for folder in ("killed", "whole"))
    assert ours.num_rows == 2_200_000
    assert ours.equals(theirs)


def test_not_finite_rows(tmp_path, rng, capsys):
    rows = rng.random((N, T)).astype(np.float16)
    rows[[2, 700], 1], rows[701] = np.nan, np.inf
    np.save(tmp_path / "rows.npy", rows)
    (tmp_path / "probes.txt").write_text("1 3 5 7 9")
    command = ["score", "--trajectories", str(tmp_path / "rows.npy"), "--probes", str(tmp_path / "probes.txt"),
               "--config.scoring.loss.k=2", "--workdir"]  # fmt: skip
    assert main([*command, str(tmp_path / "out")]) == 2
    assert ("the losses of epoch 0 are not all finite: 3 examples, rows 2, 700, 701; exclude_non_finite leaves such"
            " examples out") in capsys.readouterr().err  # fmt: skip
    assert main([*command, str(tmp_path / "out"), "--exclude_non_finite"]) == 0  # nothing was computed there before
    assert main([*command, str(tmp_path / "out")]) == 2
    assert "holds scores with other exclude_non_finite" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "left"), "--exclude_non_finite"]) == 0
    said = table(tmp_path / "left")
    assert np.flatnonzero(np.isnan(said["distance_loss"])).tolist() == [2, 700, 701]
    assert np.flatnonzero(np.isnan(said["p_value_loss"])).tolist() == [2, 700, 701]
    assert said["removed_loss_fraction"].sum() == int(0.4 * 997)
    assert not said["removed_loss_fraction"][[2, 700, 701]].any()
    assert json.loads((tmp_path / "left" / "scoring.json").read_text())["kinds"]["loss"]["excluded"] == 3
    rows[2] = 1  # the first part has none now
    np.save(tmp_path / "rows.npy", rows[:, :, None])
    command[-2:-2] = ["--config.scoring.features.k=2"]
    assert main([*command, str(tmp_path / "wide")]) == 1
    assert "are NaN or infinite, ids 700, 701: mend them, or leave them out" in capsys.readouterr().err
    assert len(list((tmp_path / "wide" / "distances").rglob("part-*"))) == 2
    assert main([*command, str(tmp_path / "wide"), "--config.scoring.features.k=3", "--exclude_non_finite"]) == 2
    assert main([*command, str(tmp_path / "wide"), "--exclude_non_finite"]) == 0  # goes on
    assert np.flatnonzero(np.isnan(table(tmp_path / "wide")["distance_features"])).tolist() == [700, 701]


@pytest.mark.parametrize(
    ("probes", "message"),
    [
        ("1 2 x", "probes.txt is missing or damaged"),
        ("1 2 2", "names 2 twice"),
        ("1 2 1000", "names 1000: expected ids from 0 to 999"),
        ("-1 2", "names -1"),
        ("", "expected ids, or trajectories"),
        ("4", "k = 50 with probes.count = 1"),
        (np.zeros((3, T + 1)), r"is (3, 7), and the trajectories are (1000, 6)"),
        (np.array([{}]), "missing or damaged"),
        (None, "--probes FILE is needed"),
    ],
)
def test_probes_that_do_not_fit(tmp_path, rng, capsys, probes, message):
    np.save(tmp_path / "rows.npy", rng.random((N, T)))
    given = ["score", "--trajectories", str(tmp_path / "rows.npy"), "--workdir", str(tmp_path / "out")]
    if isinstance(probes, str):
        (tmp_path / "probes.txt").write_text(probes)
        given += ["--probes", str(tmp_path / "probes.txt")]
    elif probes is not None:
        np.save(tmp_path / "probes.npy", probes, allow_pickle=True)
        given += ["--probes", str(tmp_path / "probes.npy")]
    assert main(given) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((5, 3), int), "expected floats [N, T] or [N, T, width]"),
        (np.zeros(5), "expected floats"),
        (np.zeros((5, 0)), "expected floats"),
        (np.array([{}]), "missing or damaged"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (10**15, 3)}\n", "damaged"),
        (b"", "missing or damaged"),
        ("archive", "it is an archive, not one array"),
        (np.zeros((5, 2)), "expected [N, T] with at least 3 epochs"),
    ],
)
def test_trajectories_that_are_none(tmp_path, capsys, content, message):
    path = tmp_path / "rows.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        with open(path, "wb") as file:
            np.savez(file, a=np.zeros(5))
    else:
        np.save(path, content, allow_pickle=True)
    (tmp_path / "probes.txt").write_text("0 1 2")
    given = ["--probes", str(tmp_path / "probes.txt"), "--config.scoring.loss.k=1"]
    assert main(["score", "--trajectories", str(path), *given, "--workdir", str(tmp_path / "out")]) in (1, 2)
    assert message in capsys.readouterr().err


def test_folders_and_settings_that_are_refused(tmp_path, store, capsys):
    command = ["score", "--trajectories", str(store.folder), "--workdir", str(tmp_path / "out")]
    assert main([*command, "--config.recording.epochs=4"]) == 2
    assert "changes scoring.* and rejection.* only, not recording" in capsys.readouterr().err
    assert main([*command, "--config.scoring.kinds=('logits',)"]) == 2
    assert "needs 'logits'" in capsys.readouterr().err
    assert main(command) == 0
    assert main([*command, "--config.scoring.loss.k=3"]) == 2
    assert "holds scores with other settings" in capsys.readouterr().err
    assert main(["score", "--trajectories", str(store.folder), "--workdir", str(tmp_path / "store")]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert main(["score", "--trajectories", str(tmp_path / "none"), "--workdir", str(tmp_path / "new")]) == 2
    assert "expected a folder of recorded trajectories, or a .npy file" in capsys.readouterr().err
    assert main(["score", "--workdir", str(tmp_path / "out"), "--exclude_non_finite"]) == 2
    next((store.folder / "ranked").glob("epoch_0002-00001*")).unlink()
    assert main(["score", "--trajectories", str(store.folder), "--workdir", str(tmp_path / "new")]) == 1
    assert "is not complete" in capsys.readouterr().err


@settings(deadline=None, max_examples=100)
@given(hnp.arrays(st.sampled_from([np.float32, np.float64]), st.integers(1, 60),
                  elements=st.floats(-9, 9, width=32).map(lambda x: round(x, 1))), st.data())  # fmt: skip
def test_largest_threshold(values, data):
    count, size = data.draw(st.integers(0, len(values))), data.draw(st.integers(1, 20))
    threshold, ties = largest_threshold(lambda: (values[i : i + size] for i in range(0, len(values), size)), count)
    expected = np.zeros(len(values), bool)
    expected[np.argsort(-values, kind="stable")[:count]] = True
    chosen = values > threshold
    chosen[np.flatnonzero(values == threshold)[:ties]] = True
    np.testing.assert_array_equal(chosen, expected)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 30), st.integers(1, 80), st.floats(0, 1), st.integers(0, 10**6))
def test_benjamini_hochberg_of_counts(num_probes, count, q, seed):
    draw = np.random.default_rng(seed)
    p_values = conformal_p_values(draw.normal(size=count) + draw.integers(0, 4), draw.normal(size=num_probes))
    counts = np.bincount(np.rint(p_values * (num_probes + 1)).astype(int) - 1, minlength=num_probes + 1)
    rejected = np.rint(p_values * (num_probes + 1)) <= benjamini_hochberg_threshold(counts, q)
    np.testing.assert_array_equal(rejected, benjamini_hochberg(p_values, q))
