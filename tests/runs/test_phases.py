"""What defences make is kept or refused; none of these trains more than a network for an epoch."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.progress import Progress
from badloss_jax.defenses import DEFENSES, Cleansed, Defense, Suspicion
from badloss_jax.report.page import write_reports
from badloss_jax.runs.experiment import run_experiment
from badloss_jax.runs.phases import planned_trainings
from badloss_jax.runs.rescore import rescore
from badloss_jax.training.saved_model import load_model
from badloss_jax.training.state import AdamW, create_state

ALONE = {"scoring__kinds": "()", "controls": "()", "retraining__variants": "()", "retraining__enabled": False}


def by_id(context, settings):
    """Suspects the last examples, and removes the last ten."""
    return Suspicion(np.arange(300.0), removed=np.arange(300) >= 290, details={"fraction": settings["fraction"]})


@pytest.fixture
def run(tmp_path, tiny, mesh, monkeypatch, unrendered):
    """Runs a function as the defence "abl", or "cbd" if it cleanses, and nothing else."""

    def run(function, cleanses=False, folder="run", **changed):
        name = "cbd" if cleanses else "abl"
        monkeypatch.setitem(DEFENSES, name, Defense(function, own_rule=not cleanses, cleanses=cleanses))
        config = tiny(**ALONE | {"defenses__names": f"('{name}',)"} | changed)
        return run_experiment(config, tmp_path / folder, mesh=mesh)

    return run


def never(context, settings):
    raise AssertionError("it worked again")


def test_what_a_defence_found_is_kept(run, tmp_path):
    results = run(by_id)
    assert results["variants"].keys() == {"abl/own", "abl/fraction", "abl/alpha", "abl/fdr"}
    own = results["variants"]["abl/own"]
    assert own["details"] == {"fraction": 0.15}
    assert own["removed_share"] <= 10 / 300  # the probes stay
    assert "retrained" not in own
    assert "undefended" not in results
    assert own["cost"]["seconds_of"].keys() == {"abl"}
    assert own["cost"]["epochs"] is None
    assert sorted(path.name for path in (tmp_path / "run" / "defenses").iterdir()) == ["abl.npz"]
    assert not (tmp_path / "run" / "models").exists()
    assert run(never)["variants"] == json.loads(json.dumps(results["variants"]))


def test_a_run_without_a_recording_has_a_report(run, tmp_path):
    run(by_id)
    page, markdown = ((tmp_path / "run" / f"report.{end}").read_text() for end in ("html", "md"))
    assert "abl (its own rule)" in page
    assert "loss over the epochs" not in page
    assert page.count('<figure class="card') == 60
    assert "| abl/own |" in markdown
    assert "(roc.png)" in markdown
    assert "trajectories.png" not in markdown
    assert not (tmp_path / "run" / "trajectories.png").exists()
    assert write_reports(tmp_path / "run").read_text() == page
    with pytest.raises(UsageError, match=r"scoring.kinds is empty"):
        rescore(tmp_path / "run", lambda config: config)


def test_a_defence_that_fails_leaves_nothing(run, tmp_path):
    def failing(context, settings):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        run(failing)
    assert not list((tmp_path / "run").rglob("*.npz"))
    assert not (tmp_path / "run" / "results.json").exists()
    assert run(by_id)["variants"]["abl/own"]["removed_share"] > 0
    assert not list((tmp_path / "run").rglob(".*-*"))


@pytest.mark.parametrize(
    ("suspicion", "message"),
    [
        (Suspicion(np.arange(299.0)), r"'abl' returned scores, float64 \(299,\), that are not 300 finite numbers"),
        (Suspicion(np.full(300, np.nan)), "scores, .* not 300 finite numbers"),
        (Suspicion(np.full(300, "a")), "scores, .* not 300 finite numbers"),
        (Suspicion(np.arange(300.0), np.arange(29.0)), r"probe_scores, float64 \(29,\), that are not 30 finite"),
        (Suspicion(np.arange(300.0), removed=np.arange(300)), r"removed, int64 \(300,\), .* not 300 truth values"),
        (Suspicion(np.arange(300.0), removed=np.zeros(30, bool)), "removed, .* not 300 truth values"),
    ],
)
def test_what_is_no_suspicion_is_refused_and_not_kept(run, tmp_path, suspicion, message):
    with pytest.raises(DataError, match=message):
        run(lambda context, settings: suspicion)
    assert not list((tmp_path / "run").rglob("*.npz"))


def changed_arrays(path, **changed):
    with np.load(path) as file:
        arrays = dict(file)
    about = json.loads(arrays["about"].tobytes()) | changed.pop("about", {})
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    return {name: array for name, array in (arrays | changed).items() if array is not None}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scores": np.zeros(299)}, "it has scores, .* not 300 finite numbers"),
        ({"scores": np.full(300, np.inf)}, "not 300 finite numbers"),
        ({"scores": None}, "scores"),
        ({"removed": np.zeros(300)}, "not 300 truth values"),
        ({"scores": np.array([{}] * 300)}, "pickle"),
        ({"more": np.zeros(3)}, "more"),
        ({"about": {"identity": "other"}}, "other data, other settings or another version"),
        ({"about": {"seconds": {}}}, "does not say how long abl took"),
        ({"about": {"seconds": None}}, "seconds|items"),
        ({"about": {"details": 3}}, "int"),
    ],
)
def test_a_damaged_artefact_is_named(run, tmp_path, changed, message):
    run(by_id)
    path = tmp_path / "run" / "defenses" / "abl.npz"
    np.savez(path, **changed_arrays(path, **changed))
    with pytest.raises(DataError, match=rf"abl.npz cannot be used: .*({message}).*; remove it to let the defence work"):
        run(never)
    path.unlink()
    run(by_id)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x93NUMPY", b"\x80\x04."])
def test_what_is_no_archive_is_named(run, tmp_path, content):
    run(by_id)
    path = tmp_path / "run" / "defenses" / "abl.npz"
    whole = path.read_bytes()
    for damaged in (content, whole[: len(whole) // 2], content + whole[10:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"abl.npz cannot be used"):
            run(never)


def test_a_network_that_a_defence_trains_is_kept(run, tmp_path, mesh):
    def train(context, settings):
        state = context.train("few", replace(context.recipe, epochs=1), ids=np.arange(64))
        return Cleansed(context.train("more", replace(context.recipe, epochs=1), initial=state), {"of": 64})

    results = run(train, cleanses=True)
    (entry,) = results["variants"].values()
    assert entry.keys() == {"removed_share", "clean_removed_share", "retrained", "details", "cost"}
    assert (entry["details"], entry["removed_share"]) == ({"of": 64}, 0)
    assert entry["retrained"]["attack_success_rate"].keys() == {"patch", "sinusoid"}
    assert load_model(tmp_path / "run" / "models" / "cbd", mesh)[0].num_classes == 10
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert not (tmp_path / "run" / "scores.parquet").exists()
    assert run(never, cleanses=True)["variants"] == json.loads(json.dumps(results["variants"]))
    page, markdown = ((tmp_path / "run" / f"report.{end}").read_text() for end in ("html", "md"))
    for text in (page, markdown):
        assert "The network that cbd trained itself leaves" in text
        assert "undefended |" not in text
    assert write_reports(tmp_path / "run").read_text() == page


def test_a_trained_network_is_compared_with_the_undefended_one(run, tmp_path):
    def fresh(context, settings):
        return Cleansed(create_state(context.spec, AdamW(), 0, context.mesh))

    results = run(fresh, cleanses=True, retraining__enabled=True)
    entry = results["variants"]["cbd"]
    assert entry["retrained"]["defense_effectiveness"].keys() == {"patch", "sinusoid"}
    assert "details" not in entry
    assert entry["cost"]["epochs"] > 0
    assert '<tr class="control"' not in (tmp_path / "run" / "report.html").read_text()


def test_the_attacked_network_is_trained_for_a_defence_though_it_is_not_shown(run, tmp_path):
    def look(context, settings):
        observed, state = context.observed(), context.attacked()
        logits = context.map(lambda batch, state: batch.ids, state)
        np.testing.assert_array_equal(logits, np.arange(300))
        assert (observed.logits.shape, observed.features.shape) == ((300, 10), (300, 8))
        return Suspicion(np.asarray(observed.logits.max(1), np.float64))

    results = run(look)
    assert "undefended" not in results
    cost = results["variants"]["abl/fraction"]["cost"]
    assert cost["seconds_of"].keys() == {"undefended", "abl"}
    assert cost["seconds"] == pytest.approx(sum(cost["seconds_of"].values()))
    assert cost["epochs"] > 2  # that network's own two, and more
    assert "The network" not in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.usefixtures("unrendered")
def test_a_shared_network_is_tested_in_another_way_without_being_trained_again(tmp_path, tiny, mesh, monkeypatch):
    def run(folder, **changed):
        settings = {"scoring__kinds": "()", "controls": "('none',)", "retraining__variants": "()"} | changed
        return run_experiment(tiny(**settings), tmp_path / folder, mesh=mesh, shared=tmp_path / "shared")["undefended"]

    first = run("first")
    (about,) = (tmp_path / "shared" / "models").glob("*/about.json")
    weights, tested = about.parent / "weights", json.loads(about.read_text())["tested"]
    before = weights.stat().st_mtime_ns
    monkeypatch.setattr("badloss_jax.runs.trainer.train", never)
    fewer = run("second", evaluation__max_triggered=7)
    assert fewer["clean_accuracy"] == first["clean_accuracy"]
    assert json.loads(about.read_text())["tested"] != tested
    rates = np.array(list(fewer["attack_success_rate"].values()))
    np.testing.assert_allclose(rates * 7, np.round(rates * 7))
    assert weights.stat().st_mtime_ns == before
    assert run("third", evaluation__max_triggered=7) == fewer
    assert run("fourth") == first


def test_as_many_trainings_are_promised_as_a_defence_makes(tiny):
    without = tiny(**ALONE | {"defenses__names": "('neural_cleanse',)"})
    turns = tiny(**ALONE | {"defenses__names": "('neural_cleanse','pss')", "defenses__pss__epochs": 3})
    assert planned_trainings(turns) - planned_trainings(without) == 7


@pytest.mark.usefixtures("unrendered")
def test_the_last_training_is_the_last_that_was_promised(tmp_path, tiny, mesh):
    stream = io.StringIO()
    changed = {"scoring__kinds": "('loss',)", "retraining__variants": "('loss/fraction',)"}
    run_experiment(tiny(**changed), tmp_path / "run", Progress(stream), mesh)
    numbers = re.findall(r"^\[(\d+)/(\d+)\]", stream.getvalue(), re.MULTILINE)
    assert numbers
    assert {total for _, total in numbers} == {numbers[-1][0]}
