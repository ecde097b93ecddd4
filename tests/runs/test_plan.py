"""Plans by arithmetic, of any machine, and compiled for the one that is here; tests/cluster/test_plan.py has others."""

import json
import os
import re

import jax
import numpy as np
import pytest

from badloss_jax.cli import main
from badloss_jax.config import load_config
from badloss_jax.core.errors import UsageError
from badloss_jax.core.mesh import make_mesh
from badloss_jax.core.progress import Progress
from badloss_jax.core.topology import parse
from badloss_jax.report.plan import as_lines
from badloss_jax.runs.images import DATA_SETS, Images, Sizes, images_of
from badloss_jax.runs.plan import make_plan
from badloss_jax.runs.programs import Machine, Programs
from badloss_jax.training.state import AdamW, create_state
from badloss_jax.trajectories.kinds import Kinds
from badloss_jax.trajectories.store import TrajectoryStore

QUIET = Progress(None)


def planned(config="configs/digits.py", topology="v5e:2x4", overrides=(), images=None, **how):
    config = load_config(config, overrides)
    images = images or DATA_SETS["digits"]
    return make_plan(config, images, Machine.of(parse(topology), quick=True), QUIET, **how)


@pytest.fixture
def environment(monkeypatch):
    """What a command sets of the environment is gone after the test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_arithmetic_is_that_of_the_run():
    """By formulas of its own: float32 state of three arrays a parameter, 72 bytes an image, batches cut in eight."""
    plan = planned()
    assert plan["source"] == "arithmetic"
    training, sweep, write = plan["programs"][:3]
    assert [training["name"], sweep["name"], write["name"]] == ["training step", "sweep step", "write of a sweep"]

    config = load_config("configs/digits.py")
    spec = Programs(config, DATA_SETS["digits"], Machine.of(parse("v5e:2x4"), quick=True)).recording.spec
    state = create_state(spec, AdamW(), 0, make_mesh(jax.devices()[:1]))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    image = 4 * 8 * 8 + 4 + 4 + 1  # float32 pixels, id, label, real
    assert training["memory"]["arguments"] == held + 32 // 8 * image + 12
    assert training["collectives"] == {
        "all-reduce": {"count": 1, "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))}
    }

    assert sweep["rows"] == 512  # 64 for each device
    assert sweep["calls"] == 30 * 3
    assert write["collectives"] == {"all-gather": {"count": 1, "bytes": 512 * (4 + 72)}}
    assert training["calls"] == 30 * 43
    assert plan["storage"]["trajectories"] == 1347 * 30 * 72
    assert plan["storage"]["checkpoint"] == held
    assert plan["fits"]
    assert plan["advice"] == []


def test_trajectories_are_as_large_as_a_store(tmp_path):
    kinds = Kinds(("prob", "logits", "ranked", "features"), 10, 8)
    store = TrajectoryStore.create(tmp_path / "s", "h", np.zeros(24, np.int32), np.zeros(24, bool), 2, kinds.layout())
    for epoch in range(2):
        columns = {kind: [np.zeros((24, *shape), dtype)] for kind, (shape, dtype) in kinds.layout().items()}
        store.write_epoch(epoch, {kind: column[0] for kind, column in columns.items()}, 0, 1)
    written = sum(np.load(path).nbytes for path in (tmp_path / "s").glob("*/epoch*.npy"))
    overrides = ["--config.recording.epochs=3", "--config.recording.kinds=('prob','logits','ranked','features')"]
    plan = planned(overrides=[*overrides, "--config.recording.feature_dim=64"], images=Images(24, 10, (12, 12, 1)))
    assert plan["storage"]["trajectories"] == written / 2 * 3


def test_step_capture_has_no_sweep_and_keeps_its_column_in_checkpoints():
    plan = planned("configs/digits.py:step")
    names = [program["name"] for program in plan["programs"]]
    assert "write of a step" in names
    assert "sweep step" not in names
    widths = plan["recording"]["bytes_an_example_and_epoch"]
    column = -(-1347 // 8) * 8 * sum(widths.values())
    assert plan["storage"]["checkpoint"] == planned()["storage"]["checkpoint"] + column


def test_every_training_of_a_run_is_counted():
    alone = planned(overrides=["--config.retraining.variants=()", "--config.controls=()"])
    assert alone["trainings"] == {"recording": 1, "others": 1}
    assert planned(overrides=["--config.retraining.variants=()"])["trainings"]["others"] == 3
    none = planned(overrides=["--config.retraining.variants=()", "--config.retraining.enabled=False"])
    assert none["trainings"]["others"] == 0
    assert "retraining step" not in [program["name"] for program in none["programs"]]
    hours = {phase["name"]: phase["at_least"] for phase in alone["phases"]}
    assert hours["the whole run"] == pytest.approx(sum(hours.values()) / 2)


def test_twice_the_chips_take_half_the_operations():
    one, two = planned(topology="v5e:2x2"), planned(topology="v5e:2x4")
    for a, b in zip(one["programs"], two["programs"], strict=True):
        if a["name"].endswith("training step"):
            assert a["flops"] == 2 * b["flops"] > 0
            assert a["seconds"]["compute"] == pytest.approx(a["flops"] / 197e12)


def test_a_rate_that_is_assumed_gives_hours_and_cores():
    plan = planned(rate=10.0, images=Images(2**22, 10, (32, 32, 3)))
    hours = {phase["name"]: phase["at_rate"] for phase in plan["phases"]}
    epoch = 2**22 / 80 / 3600
    assert hours["recording: training"] == pytest.approx(30 * epoch)
    assert hours["recording: sweeps"] == pytest.approx(10 * epoch)
    assert plan["input"]["images_a_second"] == {"training": 80}
    assert plan["input"]["cores"] == {"JPEG files": 1, "prepared": 1}


def test_what_does_not_fit_says_what_would():
    config = ["--config.recording.kinds=('logits','features')", "--config.scoring.kinds=('loss',)",
              "--config.retraining.variants=()"]  # fmt: skip
    plan = planned(overrides=config, images=Images(2_000_000_000, 1000, (12, 12, 1)))
    assert not plan["fits"]
    said = "\n".join(as_lines(plan))
    assert "the sweep step needs" in said
    assert "of the 14.90 GiB of a device" in said
    assert "bytes an example: loss 4, logits 2000, features" in said
    assert "batch_size=" not in said

    # As many devices as it says suffice, and half of them do not.
    number = int(re.search(r"([\d,]+) devices in place of 8", said)[1].replace(",", ""))
    width = sum(plan["recording"]["bytes_an_example_and_epoch"].values())
    assert 2_000_000_000 / number * width < 16e9 < 2_000_000_000 / (number / 2) * width


def test_a_batch_that_does_not_fit_is_cut_to_what_does():
    images = Images(2**24, 10, (128, 128, 3))
    overrides = ["--config.data.input=streamed", "--config.recording.batch_size=262144",
                 "--config.retraining.batch_size=256"]  # fmt: skip
    plan = planned(overrides=overrides, images=images)
    said = "\n".join(as_lines(plan))
    assert "the training step needs" in said
    assert "--config.model.dtype=bfloat16 (halves" in said
    assert "fewer --config.recording.kinds" not in said

    fewer = re.search(r"--config\.recording\.batch_size=(\S+) or less, in place of 262144", said)[1]
    assert int(fewer) % 8 == 0
    assert planned(overrides=[*overrides, f"--config.recording.batch_size={fewer}"], images=images)["fits"]

    number = int(re.search(r"([\d,]+) devices in place of 8", said)[1].replace(",", ""))
    wide = {16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
    assert planned(overrides=overrides, images=images, topology=f"v5e:{wide[number]}")["fits"]
    assert not planned(overrides=overrides, images=images, topology=f"v5e:{wide.get(number // 2, '2x4')}")["fits"]


def test_a_sweep_that_does_not_fit_is_cut_by_the_images_of_a_device():
    """Its batch grows with the devices: more of them would not help."""
    images = Images(2**22, 10, (2048, 2048, 3))
    overrides = ["--config.data.input=streamed", "--config.recording.batch_size=8", "--config.retraining.batch_size=8"]
    plan = planned(overrides=overrides, images=images)
    said = "\n".join(as_lines(plan))
    assert "the sweep step needs" in said
    assert "devices in place" not in said

    fewer = re.search(r"(--config\.evaluation\.batch_size=\d+) \(images of a device\) or less", said)[1]
    assert planned(overrides=[*overrides, fewer], images=images)["fits"]


def test_a_precision_that_the_units_do_not_know_has_no_bound():
    with jax.enable_x64(True):
        plan = planned(overrides=["--config.model.dtype=float64"])
    assert plan["programs"][0]["seconds"]["compute"] is None
    assert plan["programs"][0]["seconds"]["at_least"] > 0


def test_devices_have_to_share_a_batch():
    with pytest.raises(UsageError, match=r"recording.batch_size = 30 is not divisible by the 8 devices"):
        planned(overrides=["--config.recording.batch_size=30"])


def test_what_is_said_of_the_images_comes_first():
    config = load_config("configs/imagenet.py")
    assert images_of(config, "imagenet", Sizes()) == Images(1_281_167, 1000, (224, 224, 3))
    assert images_of(config, "imagenet", Sizes(5, 6, 7)) == Images(5, 6, (7, 7, 3))
    assert images_of(config, "mine", Sizes(5, 6)).shape == (224, 224, 3)
    with pytest.raises(UsageError, match=r"what mine trains on is not known: expected --examples N"):
        images_of(config, "mine", Sizes(5))
    with pytest.raises(UsageError, match=r"--examples 3000000000: expected at most 2,147,483,647"):
        images_of(config, "imagenet", Sizes(examples=3_000_000_000))


def test_shipped_digits_are_as_large_as_they_are_known(tiny):
    from badloss_jax.data import load_dataset

    config = load_config("configs/digits.py")
    dataset = load_dataset(config.data, config.seed)
    assert images_of(config, "digits", Sizes()) == Images(len(dataset.train.labels), 10, dataset.image_shape)


def test_data_that_is_there_is_looked_at(prepared):
    config = load_config("configs/imagenet.py", [f"--config.data.dir={prepared / 'out'}", "--config.data.image_size=8"])
    assert images_of(config, "imagenet", Sizes()) == Images(12, 2, (8, 8, 3))


@pytest.mark.usefixtures("environment")
def test_the_command_prints_and_writes_a_plan(tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = ["plan", "--config", "configs/digits.py", "--topology", "v5p:4x4x4", "--quick"]
    arguments += ["--config.recording.batch_size=64", "--config.retraining.batch_size=64"]
    assert main([*arguments, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "64 x TPU v5p in 16 hosts, 95 GB each; 1,347 images of 12 x 12 px in 10 classes" in shown
    assert "All is arithmetic, nothing compiled: --quick" in shown
    assert "It fits." in shown
    assert max(map(len, shown.splitlines())) <= 140
    plan = json.loads(out.read_text())
    assert plan["command"][:3] == ["badloss", "plan", "--config"]
    assert plan["schema_version"] == 1
    assert {program["source"] for program in plan["programs"]} == {"arithmetic"}


@pytest.mark.usefixtures("environment")
def test_the_command_ends_with_2_where_it_does_not_fit(capsys):
    arguments = ["plan", "--config", "configs/digits.py", "--topology", "v5e:2x4", "--quick"]
    assert main([*arguments, "--examples", "2000000000"]) == 2
    assert "It does not fit:\n  the sweep step needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5ee:2x4"], "did you mean 'v5e'?"),
        (["--examples", "0"], "--examples 0: expected a positive number"),
        (["--rate", "nan"], "--rate nan: expected a positive number"),
        (["--steps", "3", "--quick"], "--steps times what runs on this machine"),
        (["--out", "plan.txt"], "expected a file name that ends in .json"),
        (["--out", "/proc/plan.json"], "--out /proc/plan.json: nothing can be written there"),
        (["--config.sed=1", "--quick"], "did you mean 'seed'?"),
    ],
)
@pytest.mark.usefixtures("environment")
def test_wrong_options_are_refused(arguments, message, capsys):
    assert main(["plan", "--config", "configs/digits.py", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert not shown.out


def test_the_machine_that_is_here_is_compiled_for_and_timed():
    config = load_config(
        "configs/digits.py",
        ["--config.model.stages=(8,)", "--config.retraining.enabled=False", "--config.retraining.variants=()"],
    )
    plan = make_plan(config, Images(1000, 10, (12, 12, 1)), Machine.of(None), QUIET, steps=1)
    assert plan["topology"]["devices"] == 8
    programs = {program["name"]: program for program in plan["programs"]}
    assert list(programs) == ["training step", "sweep step", "write of a sweep"]  # another kernel scores on CPUs
    for program in programs.values():
        assert program["source"] == "compiled"
        assert program["seconds"]["measured"] > 0
        assert program["copies"]["count"] == 0
    assert programs["training step"]["in_place"]
    assert programs["write of a sweep"]["in_place"]
    assert set(programs["training step"]["collectives"]) == {"all-reduce"}
    # Gradients, and what batch norm and the loss add up.
    state_bytes = 4 * plan["network"]["parameters"]
    assert state_bytes <= programs["training step"]["collectives"]["all-reduce"]["bytes"] < 3 * state_bytes
    assert set(programs["write of a sweep"]["collectives"]) == {"all-gather"}
    assert plan["phases"][-1]["expected"] > 0
