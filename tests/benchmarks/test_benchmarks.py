"""Structure and arithmetic of the benchmarks at tiny sizes; never how fast anything is."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from badloss_jax.benchmarks import (
    BENCHMARKS,
    Benchmark,
    Pictured,
    Resumable,
    SetsUpDevices,
    find_benchmark,
    scan_findings,
)
from badloss_jax.benchmarks.buffer_memory import measure_buffer
from badloss_jax.benchmarks.rounding import RESULTS, relative_error
from badloss_jax.benchmarks.timing import overhead, summary
from badloss_jax.cli import main
from badloss_jax.cli.start import without_paths
from badloss_jax.core.errors import NonFiniteLossError
from badloss_jax.core.mesh import make_mesh
from badloss_jax.report.results import read_results
from badloss_jax.runs.experiment import run_experiment
from badloss_jax.training import loop
from badloss_jax.trajectories.buffer import column_bytes
from badloss_jax.trajectories.kinds import Kinds

SMALL = ["--examples", "40", "--image_size", "8", "--seconds", "0.01", "--config.recording.batch_size=16",
         "--config.evaluation.batch_size=16", "--config.model.stages=(4,)"]  # fmt: skip

HELPS = """
from badloss_jax.cli import main
import sys
try:
    main([*sys.argv[1:], "--help"])
finally:
    loaded = {"jax", "matplotlib", "sklearn", "scipy", "pyarrow", "PIL"} & sys.modules.keys()
    assert not loaded, loaded
"""


def test_helps_and_guides_name_every_benchmark(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    shown = capsys.readouterr().out
    assert re.findall(r"^ {4}(\w+)", shown, re.MULTILINE) == list(BENCHMARKS)
    assert all(summary in " ".join(shown.split()) for summary in BENCHMARKS.values())

    guides = [*Path("configs").rglob("README.md"), *Path("badloss_jax").rglob("README.md"), Path("README.md")]
    text = "\n".join(guide.read_text("utf-8") for guide in guides)
    assert set(re.findall(r"badloss\s+bench\s+(\w+)", text)) == set(BENCHMARKS)


@pytest.mark.parametrize("name", ["", *BENCHMARKS])
def test_no_help_waits_for_jax(name):
    done = subprocess.run([sys.executable, "-c", HELPS, "bench", *name.split()], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: badloss bench {name}".rstrip())


def test_a_benchmark_holds_what_is_asked_of_it():
    benchmarks = {name: find_benchmark(name) for name in BENCHMARKS}
    assert all(isinstance(benchmark, Benchmark) for benchmark in benchmarks.values())
    for hook, names in ((SetsUpDevices, {"buffer", "train"}), (Resumable, {"scan"}), (Pictured, {"scorer"})):
        assert {name for name, benchmark in benchmarks.items() if isinstance(benchmark, hook)} == names

    commands = re.findall(r"^  badloss bench (\w+)", "".join(b.EXAMPLES for b in benchmarks.values()), re.MULTILINE)
    assert set(commands) <= set(BENCHMARKS)


def test_an_overhead_is_found_on_a_machine_that_slows_down(rng):
    drift = np.linspace(1, 3, 400) * rng.lognormal(0, 0.05, 400)
    plain = drift * rng.lognormal(0, 0.02, 400)
    changed = 1.01 * drift * rng.lognormal(0, 0.02, 400)
    changed[:40] *= 5  # an outburst of other work in one half of a tenth of the pairs
    cost = overhead(plain, changed)
    low, high = cost["interval"]
    assert low < cost["percent"] < high
    assert cost["percent"] == pytest.approx(1, abs=0.6)
    assert 0 < high - low < 1.5
    assert cost["count"] == 400
    same = overhead(plain, plain)
    assert (same["percent"], same["interval"]) == (0, [0, 0])


def test_a_summary_is_median_and_quartiles():
    assert summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "quartiles": [2.0, 4.0], "count": 5}


@pytest.fixture
def on_one_device(mesh, monkeypatch):
    """Measures on the first device alone, as there is one in most machines."""
    monkeypatch.setattr("badloss_jax.core.mesh.make_mesh", lambda: mesh)


@pytest.mark.usefixtures("on_one_device")
def test_float32_is_near_float64(tmp_path, capsys):
    out = tmp_path / "out.json"
    sizes = ["--image_size", "8", "--batch_size", "8"]
    assert main(["bench", "numerics", "--models", "resnet_small", *sizes, "--out", str(out)]) == 0
    assert "resnet_small   8      8" in capsys.readouterr().out
    (figure,) = json.loads(out.read_text())["figures"]
    assert list(figure["errors"]) == list(RESULTS)
    assert all(1e-9 < error < 1e-3 for error in figure["errors"].values())
    assert "--xla_cpu_experimental_ynn_fusion_type=" in figure["xla_flags"]

    assert main(["bench", "numerics", "--models", "resnet_large"]) == 2
    assert "--models has 'resnet_large'" in capsys.readouterr().err


def test_an_error_is_relative_to_all_arrays_together():
    exact = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    assert relative_error(exact, exact) == 0
    assert relative_error({"a": np.array([3.0, 1.0], np.float32), "b": exact["b"]}, exact) == pytest.approx(0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("on_one_device")
def test_training_on_synthetic_images(tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["bench", "train", "--models", "resnet_small,resnet_small", *SMALL, "--scan", "--out", str(out)]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "can take far longer than a looped one" in shown.err
    written = json.loads(out.read_text("utf-8"))
    assert written["benchmark"] == "train"
    assert written["command"].startswith("badloss bench train --models resnet_small,resnet_small --examples 40")
    assert "out" not in written["command"]
    assert written["environment"]["devices"]
    assert len(written["load_average"]) == 3
    assert [figure["model"]["name"] for figure in written["figures"]] == ["resnet_small", "resnet_small"]
    for figure in written["figures"]:
        assert figure["model"]["image_shape"] == [8, 8, 3]
        assert (figure["steps_per_epoch"], figure["batch_size"], figure["examples"]) == (3, 16, 40)
        assert figure["kinds"] == ["loss", "prob", "logits", "ranked", "features"]
        assert list(figure["step_seconds"]) == ["off", "sweep", "step"]
        for mode, rate in figure["examples_per_second"].items():
            assert rate == pytest.approx(16 / figure["step_seconds"][mode]["median"])
        for mode, cost in figure["epoch_overhead_percent"].items():
            end = figure["epoch_end_seconds"][mode]["median"] / (3 * figure["step_seconds"]["off"]["median"])
            assert cost == pytest.approx(figure["step_overhead"][mode]["percent"] + 100 * end)
            low, high = figure["step_overhead"][mode]["interval"]
            assert low <= figure["step_overhead"][mode]["percent"] <= high
        assert figure["scan"]["overhead"]["count"] == figure["scan"]["loop_seconds"]["count"] == 5
        assert all(seconds > 0 for seconds in figure["first_call_seconds"].values())
    assert len([line for line in shown.out.splitlines() if line.startswith("resnet")]) == 2 * 4
    assert max(map(len, shown.out.splitlines()[:-1])) <= 120


def test_training_on_the_images_of_a_config(tmp_path):
    out = tmp_path / "out.json"
    given = ["--config", "configs/digits.py", "--config.model.stages=(4,)", "--config.data.train_examples=70",
             "--config.recording.batch_size=32", "--config.recording.kinds=()", "--seconds", "0.01"]  # fmt: skip
    scored = ["--config.scoring.kinds=('loss',)", "--config.retraining.variants=()"]
    assert main(["bench", "train", *given, *scored, "--out", str(out)]) == 0
    (figure,) = json.loads(out.read_text("utf-8"))["figures"]
    assert figure["model"]["image_shape"] == [12, 12, 1]
    assert (figure["steps_per_epoch"], figure["kinds"], figure["scan"]) == (3, ["loss"], None)


@pytest.mark.usefixtures("on_one_device")
def test_a_training_that_diverges_gives_no_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop.Recipe, "learning_rate_at", lambda self, epoch: math.inf)
    assert main(["bench", "train", *SMALL, "--out", str(tmp_path / "out.json")]) == NonFiniteLossError.exit_code
    assert "NaN or infinite" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("devices", [1, 8])
def test_bytes_per_device_are_those_of_the_arithmetic(devices):
    mesh, kinds = make_mesh(jax.devices()[:devices]), Kinds(("ranked", "features"), 10, 1, feature_dim=4)
    figure = measure_buffer(kinds, 1003, 3, mesh, batch_size=64, num_probes=20, k=5)
    rows = {1: 1003, 8: 126}[devices]
    assert figure["bytes_per_device"]["expected"] == rows * (4 + 2 * 6 + 2 * 4)
    assert figure["bytes_per_device"]["measured"] == [figure["bytes_per_device"]["expected"]] * devices
    assert figure["layout"]["features"] == [[rows * devices, 4], "float16"]
    # Nothing of the column's size: it is written where it is.
    assert figure["write_temporary_bytes"] < 64 * (4 + 2 * 6 + 2 * 4 + 8) * 4
    assert list(figure["peak_rss_bytes"].values()) == sorted(figure["peak_rss_bytes"].values())
    assert figure["seconds"]["write_batch"]["count"] == 15
    assert figure["rows_per_second"] == 1003 / figure["seconds"]["score"]["median"]


def test_the_shape_of_imagenet():
    """What the README says of memory, without allocating it."""
    mesh = make_mesh()
    assert mesh.size == 8
    assert column_bytes(Kinds((), 1000, 1), 1_281_167, mesh) == 160_146 * 4 == 640_584


def test_the_buffer_by_its_command(tmp_path, capsys):
    out = tmp_path / "out.json"
    sizes = ["--examples", "200", "--epochs", "2", "--batch_size", "64", "--probes", "10", "--k", "3"]
    assert main(["bench", "buffer", *sizes, "--kinds", "prob", "--out", str(out)]) == 0
    (figure,) = json.loads(out.read_text("utf-8"))["figures"]
    assert figure["devices"] == 8
    assert list(figure["layout"]) == ["loss", "prob"]
    shown = capsys.readouterr().out
    assert f"bytes expected {figure['bytes_per_device']['expected']:,}" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--seconds", "0"], "--seconds 0.0: expected a positive number"),
        (["train", "--out", "out.txt"], "expected a file name that ends in .json"),
        (["train", "--models", "resnet19"], "expected one of"),
        (["train", "--config.recording.batch_size=30"], "recording.batch_size = 30 is not divisible by the 8 devices"),
        (["train", "--config", "configs/digits.py", "--config.data.input=streamed"], "--image_size PX"),
        (["buffer", "--kinds", "logit"], "--kinds has 'logit'"),
        (["buffer", "--examples", "100", "--probes", "101"], "expected 1 <= k <= P <= N"),
        (["buffer", "--batch_size", "30"], "--batch_size 30 is not divisible by the 8 devices"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_buffer_has_no_settings(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "buffer", "--config.seed=1"])
    assert "unknown argument '--config.seed=1'" in capsys.readouterr().err


@pytest.mark.parametrize("own", [True, False])
def test_input(tmp_path, capsys, rng, own):
    out = tmp_path / "out.json"
    given = ["--from", str(tmp_path / "images")] if own else []
    for number in range(3):
        path = tmp_path / "images" / "n1" / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path, "jpeg")
    sizes = ["--examples", "5", "--image_size", "16", "--batch_size", "8", "--seconds", "0.05"]
    assert main(["bench", "input", *given, *sizes, "--out", str(out)]) == 0
    files, pixels = json.loads(out.read_text("utf-8"))["figures"]
    assert (files["form"], pixels["form"]) == ("files", "pixels")
    assert pixels["bytes_per_image"] >= 16 * 16 * 3
    for figure in (files, pixels):
        assert figure["images"] == (3 if own else 5)
        rates = figure["images_per_core_second"]
        assert 0 < rates["read_and_cropped"] < np.inf
        assert 0 < rates["read"] < np.inf
        assert figure["streamed_per_second"] > 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith(("files", "pixels"))]) == 2


def test_input_from_an_empty_folder(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["bench", "input", "--from", str(tmp_path / "empty")]) == 2
    assert "has no files that end in .jpg" in capsys.readouterr().err


def test_scorer(tmp_path, capsys):
    out = tmp_path / "out.json"
    sizes = ["--sizes", "30,2100", "--epochs", "5", "--probes", "20", "--k", "4", "--repeats", "2"]
    assert main(["bench", "scorer", *sizes, "--dtypes", "float32,float16", "--out", str(out)]) == 0
    figures = json.loads(out.read_text("utf-8"))["figures"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert len(figures) == 2 * (8 + 2)
    assert {figure["method"] for figure in figures if figure["dtype"] == "float16"} == {"numba", "xla"}
    for figure in figures:
        assert figure["seconds"]["count"] == 2
        median = figure["seconds"]["median"]
        assert figure["examples_per_second"] == pytest.approx(figure["examples"] / median)
        assert figure["flops_per_second"] == pytest.approx(3 * figure["examples"] * 5 * 20 / median)
        assert figure["bytes_per_second"] * median == pytest.approx(
            figure["examples"] * 5 * (4 if figure["dtype"] == "float32" else 2)
        )
        assert figure["error"] < 1e-5  # all peers are asked the same question
        if figure["method"] in ("numba", "xla"):
            assert figure["offset_error"] < 1e-5
        assert figure["limits"]["matmul_flops_per_second"] > 1e8
    said = capsys.readouterr().out
    assert "limit: copy, matmul" in said
    assert max(map(len, said.splitlines()[:-2])) <= 120


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--sizes", "10,x"], "--sizes '10,x': expected numbers"),
        (["--methods", "numba,scann"], "--methods has 'scann': expected some of numba, xla, sklearn brute"),
        (["--dtypes", "int8"], "--dtypes has 'int8'"),
        (["--k", "9", "--probes", "8"], "--k 9 with --probes 8"),
        (["--repeats", "0"], "--repeats 0: expected a positive number"),
    ],
)
def test_scorer_refuses(capsys, given, message):
    assert main(["bench", "scorer", *given]) == 2
    assert message in capsys.readouterr().err


def test_detectors(tmp_path, tiny, mesh, capsys):
    kinds = "('loss','combined')"
    run_experiment(tiny(scoring__kinds=kinds, controls="()", retraining__variants="()"), tmp_path / "run", mesh=mesh)
    assert main(["bench", "detectors", "--workdir", str(tmp_path / "run"), "--repeats", "2",
                 "--out", str(tmp_path / "out.json")]) == 0  # fmt: skip
    written = json.loads((tmp_path / "out.json").read_text("utf-8"))
    figures = written["figures"]
    assert written["command"] == "badloss bench detectors --workdir OUT --repeats 2"
    assert [(figure["detector"], figure["examples"]) for figure in figures] == [("badloss loss", 300),
                                                                               ("badloss combined", 300)]  # fmt: skip
    results = read_results(tmp_path / "run" / "results.json")
    for figure, variant in zip(figures, ("loss/fraction", "combined/fraction"), strict=True):
        assert figure["auroc"] == results["variants"][variant]["detection"]["auroc"]["overall"]
    assert 0.999 < figures[0]["float16"]["rank_correlation"] < 1
    assert abs(figures[0]["float16"]["auroc"] - figures[0]["auroc"]) < 0.01
    assert figures[1]["float16"] is None  # its trajectories are stored as float16 already
    assert "badloss combined" in capsys.readouterr().out
    assert main(["bench", "detectors", "--workdir", str(tmp_path / "none")]) == 2


def test_store(tmp_path, capsys):
    out = tmp_path / "out.json"
    given = ["--sizes", "600,1200", "--epochs", "4", "--probes", "60", "--dtypes", "float16"]
    assert main(["bench", "store", *given, "--out", str(out)]) == 0
    figures = json.loads(out.read_text("utf-8"))["figures"]
    assert [figure["stored_bytes"] for figure in figures] == [600 * 4 * 2, 1200 * 4 * 2]
    for figure in figures:
        assert figure["anonymous_bytes"] > 2**20
        assert figure["examples_per_second"] == pytest.approx(figure["examples"] / figure["seconds"]["all"])
        assert figure["seconds"]["distances"] < figure["seconds"]["all"]
    assert "anonymous memory" in capsys.readouterr().out

    assert main(["bench", "store", "--sizes", "600", *given[2:6], "--classes", "4", "--out", str(out)]) == 0
    (figure,) = json.loads(out.read_text("utf-8"))["figures"]
    assert figure["stored_bytes"] == 600 * 4 * (4 + 2 * 64 + 2 * 6)
    assert 0 < figure["seconds"]["clusters"] < figure["seconds"]["all"]


def test_a_command_is_written_down_without_the_paths_of_this_machine():
    command = [
        "badloss",
        "bench",
        "scan",
        "--config.data.dir=/here/x",
        "--out",
        "/a.json",
        "--workdir",
        "/w",
        "--from=/f",
    ]
    assert without_paths(command) == [
        "badloss", "bench", "scan", "--config.data.dir=DIR", "--workdir", "OUT", "--from=DIR"
    ]  # fmt: skip
    assert without_paths(["bench", "--out=/a.json", "--seeds", "1"]) == ["bench", "--seeds", "1"]


def scans(out, seeds):
    """The command for a scan of each seed in each regime, of a small set by a small network."""
    small = "--config.model.stages=(8,) --config.recording.epochs=3"
    settings = ["--config.data.train_examples=300", "--config.probes.count=40"]
    return ["bench", "scan", "--config", "configs/digits.py", "--seeds", seeds, "--scan", small, "--out", str(out),
            *settings]  # fmt: skip


@pytest.mark.slow  # several scans, each in a process of its own
def test_scans_in_regimes_go_on_where_they_were_stopped(tmp_path, monkeypatch, capfd):
    out = tmp_path / "out.json"
    given = scans(out, "0,1")

    def stopped(*arguments):
        if out.exists():  # with what the first scan has found
            raise KeyboardInterrupt
        return scanned(*arguments)

    scanned = scan_findings._scan
    with monkeypatch.context() as patch:
        patch.setattr(scan_findings, "_scan", stopped)
        assert main([*given, "--regimes", "one"]) == 130
    written = json.loads(out.read_text("utf-8"))
    (one,) = written["figures"]
    assert (one["regime"], one["seed"]) == ("one", 0)
    assert one["images"] == 300
    assert one["probes"] == 40
    assert one["poisoned_share"] == pytest.approx(0.01)
    assert len(one["recall"]) == one["attacks"] == 1
    assert 0 <= one["found_at"]["0.01"] <= one["found_at"]["0.05"] <= 1
    assert one["network"] == {"name": "resnet_small", "stages": [8], "stem_stride": 1, "epochs": 3}

    assert main([*given, "--regimes", "one"]) == 0
    first, second = json.loads(out.read_text("utf-8"))["figures"]
    assert first == one  # not scanned again, seconds and all
    assert second["seed"] == 1
    assert re.search(r"^one +2 +1.0 %", capfd.readouterr().out, re.MULTILINE)

    assert main([*given, "--regimes", "two"]) == 2
    assert "--regimes has 'two': expected some of distinct, drawn" in capfd.readouterr().err


@pytest.mark.slow  # several scans, each in a process of its own
def test_a_recording_is_scored_again_with_other_probes(tmp_path, capfd):
    out = tmp_path / "out.json"
    assert main([*scans(out, "3"), "--regimes", "distinct,probes-50"]) == 0
    figures = json.loads(out.read_text("utf-8"))["figures"]
    assert [(figure["probes"], figure["seed"]) for figure in figures] == [(40, 3), (50, 3)]
    assert figures[1]["poisoned_share"] == figures[0]["poisoned_share"]
    assert capfd.readouterr().err.count("recording  done before") == 1
