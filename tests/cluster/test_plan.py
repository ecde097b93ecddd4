"""Plans that are compiled for machines that are not there, where their compilers are installed."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from badloss_jax.core.topology import parse, why_not_compiled
from tests.conftest import ENVIRONMENT

tpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed (the extra 'tpu')")
gpu = pytest.mark.skipif(
    bool(why_not_compiled(parse("h100:1x8"))), reason="the CUDA plugin is not installed (the extra 'cuda')"
)

# What a process runs that plans the programs of some names alone: what is compiled, of the largest ones, takes minutes.
_SOME = """
import dataclasses
import json
import sys
from badloss_jax.core import topology

names, config, examples, machine = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
overrides = sys.argv[5:]
parsed = topology.parse(machine)
topology.prepare(parsed)

from badloss_jax.config import load_config
from badloss_jax.core.progress import Progress
from badloss_jax.runs.compiling import take
from badloss_jax.runs.images import Sizes, images_of
from badloss_jax.runs.programs import Machine, Programs

loaded = load_config(config, overrides)
images = images_of(loaded, "imagenet", Sizes(examples))
on = Machine.of(parsed)
for program in Programs(loaded, images, on).all(1):
    if program.name in names:
        taken = take(program, on, Progress(None))
        figures = {
            "beside": program.beside,
            "gathers": program.gathers,
            "in_place": taken.in_place,
            "compiled": dataclasses.asdict(taken.compiled),
        }
        print(json.dumps(figures))
"""


def compiled(names, config, examples, machine, *overrides):
    command = [sys.executable, "-c", _SOME, json.dumps(names), config, str(examples), machine, *overrides]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check_write(write, column):
    """What is written is a batch, in place: nothing is as large as the column, which is `column` bytes on a device."""
    figures = write["compiled"]
    assert write["in_place"]
    assert figures["copies"][0] == 0
    assert figures["moves"][0] == 0
    assert column < figures["arguments"] < 1.2 * column  # TPUs pad what they store
    assert figures["temporaries"] < column / 10
    assert figures["aliased"] >= column
    sent = sum(size for _, size in figures["collectives"].values())
    assert 0 < sent < 2 * write["gathers"]


@tpu
@pytest.mark.slow
def test_a_billion_images_are_written_in_place_on_64_chips():
    (write,) = compiled(["write of a sweep"], "configs/imagenet.py:large_batch", 1_000_000_000, "v5p:4x4x4")
    check_write(write, 1_000_000_000 // 64 * 80)
    assert write["compiled"]["temporaries"] < 10e6


@tpu
@pytest.mark.slow
@pytest.mark.parametrize(("images", "part"), [(64, 1 / 4), (16, 1 / 10)])
def test_a_sweep_takes_what_the_images_of_a_chip_take_and_nothing_of_a_billion(images, part):
    """Where memory is short, a smaller batch spares it, and takes a quarter longer by the compiler's cycles."""
    (sweep,) = compiled(
        ["sweep step"], "configs/imagenet.py:large_batch", 1_000_000_000, "v5p:4x4x4",
        f"--config.evaluation.batch_size={images}",
    )  # fmt: skip
    figures = sweep["compiled"]
    assert sweep["beside"] == 1_000_000_000 // 64 * 80  # the column, which the sweep does not see
    assert figures["temporaries"] < part * (figures["arguments"] + sweep["beside"])
    assert figures["collectives"] == {}


@tpu
@pytest.mark.slow
def test_ten_million_images_are_written_in_place_on_eight_chips():
    """Where the share of a chip is small, the compiler may move the whole of it into faster memory, and back."""
    (write,) = compiled(["write of a sweep"], "configs/imagenet.py", 10_000_000, "v5e:2x4")
    check_write(write, 10_000_000 // 8 * 80)


@tpu
@pytest.mark.slow
def test_a_resnet50_trains_on_eight_chips_at_14000_images_a_second_by_its_cycles():
    """As the compiler estimates them, without waiting for other chips: in float32 it was 27 ms a step of 256 images."""
    (step,) = compiled(["training step"], "configs/imagenet.py", 1_281_167, "v5e:2x4")
    assert step["in_place"]
    assert step["compiled"]["copies"][0] == 0
    chip = parse("v5e:2x4").chip
    assert chip is not None
    assert step["compiled"]["cycles"] / chip.clock <= 0.018


@tpu
@pytest.mark.slow
@pytest.mark.parametrize("machine", ["v5e:1x1", "v5e:2x4"])
def test_a_small_run_is_compiled_for_chips_that_are_not_there(tmp_path, machine):
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "badloss_jax", "plan", "--config", "configs/digits.py"]
    environment = ENVIRONMENT | {"HOME": str(tmp_path)}  # where nothing is kept yet
    progress = []
    for damage in (False, False, True):
        for file in tmp_path.rglob("plans/*.json") if damage else ():
            file.write_text("{")
        done = subprocess.run(
            [*command, "--topology", machine, "--out", str(out)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        progress.append(done.stderr)

        plan = json.loads(out.read_text())
        assert plan["source"] == "compiled"
        for program in plan["programs"]:
            assert program["source"] == "compiled", program["name"]
            assert program["seconds"]["expected"] > program["seconds"]["at_least"] > 0, program["name"]
            assert program["in_place"] in (True, None), program["name"]
            assert program["copies"]["count"] == 0, program["name"]
        assert plan["programs"][0]["in_place"]

    # The second time nothing is compiled, but what is damaged is once more.
    assert ["compiling" in lines for lines in progress] == [True, False, True]


@tpu
@pytest.mark.slow
def test_what_the_compiler_refuses_is_cut_to_what_it_takes(tmp_path):
    command = [
        sys.executable, "-m", "badloss_jax", "plan", "--config", "configs/digits.py", "--topology", "v5e:1x1",
        "--image_size", "224", "--examples", "1000000", "--out", str(tmp_path / "plan.json"),
        "--config.data.input=streamed", "--config.recording.capture=step", "--config.recording.kinds=()",
        "--config.scoring.kinds=('loss',)", "--config.retraining.enabled=False", "--config.retraining.variants=()",
    ]  # fmt: skip
    images = "16384"
    for code in (2, 0):
        done = subprocess.run(
            [*command, f"--config.recording.batch_size={images}"],
            env=ENVIRONMENT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        plan = json.loads((tmp_path / "plan.json").read_text())
        assert plan["fits"] == (code == 0)
        if plan["fits"]:
            assert set(plan["input"]["images_a_second"]) == {"training step"}
            break

        assert re.search(r"the compiler refuses the training step: [\d.]+ GiB of 15.75 GiB; what helps:", done.stdout)
        assert plan["input"]["images_a_second"] == {}
        images = re.search(r"batch_size=(\d+) or less, in place of 16384", done.stdout)[1]
        assert 200 < int(images) < 2000


@gpu
@pytest.mark.slow
def test_a_billion_images_are_written_in_place_on_64_gpus():
    (write,) = compiled(["write of a sweep"], "configs/imagenet.py:large_batch", 1_000_000_000, "h100:8x8")
    check_write(write, 1_000_000_000 // 64 * 80)
