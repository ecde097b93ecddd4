"""`badloss bench`: its arguments, its tables, its file. A new benchmark adds a parser, and a generator of figures.

Nothing here imports JAX before it is needed, so that `badloss --help` waits for nothing, and so that the number of CPU
devices can still be set.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from badloss_jax.benchmarks import tables
from badloss_jax.core.errors import UsageError

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

    from badloss_jax.training.resident import ResidentData

_ABOUT = "Measure speed and memory on this machine, on synthetic data unless a data set is named."

_TRAIN = """\
Measure the training step with recording off, "sweep" and "step", in turns: seconds a step, examples a second, what
recording costs per step and per epoch. Images are synthetic noise, unless --config names a data set.
"""

_TRAIN_EXAMPLES = """\
examples:
  badloss bench train --out OUT.json
  badloss bench train --models resnet50 --image_size 224 --classes 1000 --config.model.dtype=bfloat16
  badloss bench train --config configs/cifar10.py --config.data.dir=DIR --models resnet18,resnet50 --scan

--config.GROUP.KEY=VALUE changes a setting, such as recording.batch_size (128), recording.kinds or model.dtype.
"step" stores the training step's own outputs; "sweep" passes over the training set after each epoch, and its steps
are those without recording: what they seem to cost is the error of the measurement.
"""

_BUFFER = """\
Allocate the trajectory buffer, fill it, read it back, compare, and score it, by default in the shape of ImageNet-1k.
Bytes per device stand beside what arithmetic expects. All GPUs or TPU chips share it, or else so many CPU devices.
"""

_BUFFER_EXAMPLES = """\
examples:
  badloss bench buffer --out OUT.json
  badloss bench buffer --kinds ranked,features --feature_dim 32
  badloss bench buffer --examples 50000 --cpu_devices 1
"""

_INPUT = """\
Prepare images as `badloss prepare` does, as files and as pixels, and read both at random: images per second of one
CPU core, the same with a random resized crop by Pillow, and in a stream to the devices from all cores.
"""

_INPUT_EXAMPLES = """\
examples:
  badloss bench input --out OUT.json
  badloss bench input --from IMAGENET/train --examples 1000
"""

_SCORER = """\
Score synthetic trajectories by every kernel of badloss_jax and by scikit-learn, FAISS (if installed), NumPy and
jax.lax.top_k, in turns and with the same threads: seconds, rates beside the machine's own limits, memory, error
against float64. --out also writes a plot of seconds against N.
"""

_SCORER_EXAMPLES = """\
examples:
  badloss bench scorer --out OUT.json
  badloss bench scorer --sizes 1000000 --methods numba,xla,faiss --dtypes float32,float16
  badloss bench detectors --workdir OUT    every detector on the trajectories of a finished run
"""


_SCAN = """\
Write the training set of a config as a folder of PNG files, poisoned by its attacks, give `badloss scan` the folder and
a list of clean probes, and compare what it lists with the truth. --config.attacks.scale=0 poisons nothing. The same
command goes on after the last scan that is in FILE.json.

--regimes changes who attacks, and what the scan has to go by. The attackers, and how much each poisons, are the
config's where nothing else is said, without those whose trigger has to be optimised first:

  distinct, drawn, shared      a target each; targets drawn with replacement; three of the attackers on one class
  held-out                     a warp, a ramp, a lattice and inverted pixels: nothing was settled on them
  few, one, many               one attacker: 0.3, 1 and 6 % of all images
  quarter                      one attacker: a quarter of its class, in a set of 2,000 to 5,000 images
  all-to-all                   one attacker moves label y to y + 1: 6 % of all images
  imbalanced                   the smallest class is a tenth of the largest
  probes-50, -100, -1000       so many clean images are known; after distinct, its recording is scored again
  clean                        nobody attacks 1,000 to all images
"""

_SCAN_EXAMPLES = """\
examples:
  badloss bench scan --config configs/fashion_mnist.py:quick --out OUT.json
  badloss bench scan --config configs/digits.py --seeds 0 --scan "--config.recording.epochs=15"
  badloss bench scan --config configs/cifar10.py:quick --config.data.dir=DIR --regimes drawn,held-out --out OUT.json
"""


def add_bench(commands: Any) -> None:
    """Adds the command to the command line's parser."""
    plain: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    bench = commands.add_parser("bench", help="measure speed and memory on this machine", description=_ABOUT, **plain)
    benchmarks = bench.add_subparsers(dest="benchmark", required=True, title="benchmarks", metavar="BENCHMARK")
    train = benchmarks.add_parser("train", help="training, and what recording costs", description=_TRAIN,
                                  epilog=_TRAIN_EXAMPLES, **plain)  # fmt: skip
    train.set_defaults(configurable=True)
    train.add_argument("--config", metavar="FILE[:VARIANT]", help="take its settings, and its images; without, the"
                       " default settings, and synthetic images of 32 px")  # fmt: skip
    train.add_argument("--models", metavar="A,B", help="networks, in turn (default: the config's, or resnet_small)")
    train.add_argument("--image_size", type=int, metavar="PX", help="synthetic images, also with --config")
    train.add_argument("--examples", type=int, default=12_800, metavar="N", help="synthetic ones (default 12800)")
    train.add_argument("--classes", type=int, default=10, metavar="K", help="of synthetic images (default 10)")
    train.add_argument("--seconds", type=float, default=30, metavar="S", help="of steps, for each network (default 30)")
    train.add_argument("--scan", action="store_true", help="measure whole epochs under lax.scan, too")

    buffer = benchmarks.add_parser("buffer", help="the trajectory buffer at any size", description=_BUFFER,
                                   epilog=_BUFFER_EXAMPLES, **plain)  # fmt: skip
    for name, default, about in (
        ("examples", 1_281_167, "N, rows"),
        ("epochs", 30, "T, columns"),
        ("batch_size", 256, "written at a time"),
        ("probes", 250, "P, of the scoring"),
        ("k", 50, "nearest probes"),
        ("feature_dim", 32, "width of the features, if recorded"),
        ("cpu_devices", 8, "where there is no accelerator"),
    ):
        buffer.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{about} (default {default})")
    buffer.add_argument("--kinds", default="", metavar="A,B", help="recorded beside the loss: ranked, features, prob")

    feed = benchmarks.add_parser("input", help="decoding images on the host", description=_INPUT,
                                 epilog=_INPUT_EXAMPLES, **plain)  # fmt: skip
    feed.add_argument("--from", dest="images", type=Path, metavar="DIR", help="a folder of images, searched with its"
                      " subfolders; without, synthetic photographs of 500 x 375 px")  # fmt: skip
    for name, default, about in (
        ("examples", 250, "images, at most"),
        ("image_size", 224, "pixels a side to resize to"),
        ("batch_size", 64, "of the stream"),
    ):
        feed.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{about} (default {default})")
    feed.add_argument("--seconds", type=float, default=10, metavar="S", help="for each figure (default 10)")

    scorer = benchmarks.add_parser("scorer", help="scoring, beside scikit-learn, FAISS, NumPy and top_k",
                                   description=_SCORER, epilog=_SCORER_EXAMPLES, **plain)  # fmt: skip
    scorer.add_argument("--sizes", default="10000,50000,200000,1281167", metavar="N,N", help="trajectories, each in"
                        " turn (default 10000,50000,200000,1281167)")  # fmt: skip
    scorer.add_argument("--methods", default="", metavar="A,B", help="default: all")
    scorer.add_argument("--dtypes", default="float32", metavar="A,B", help="as stored: float32, float16 (default"
                        " float32)")  # fmt: skip
    for name, default, about in (("epochs", 30, "T"), ("probes", 250, "P"), ("k", 50, "nearest probes")):
        scorer.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{about} (default {default})")
    detectors = benchmarks.add_parser("detectors", help="every detector, on the files of a finished run",
                                      description="Time every detector from a run's stored trajectories to its removal"
                                      " lists, and say what float16 in place of float32 trajectories would change.",
                                      **plain)  # fmt: skip
    detectors.add_argument("--workdir", type=Path, required=True, metavar="OUT", help="folder of a finished run")
    store = benchmarks.add_parser("store", help="scoring trajectories from the disk, and its memory", **plain,
                                  description="Write stores of losses to the temporary folder, score each as `badloss"
                                  " score --trajectories` does, and measure seconds and anonymous memory.")  # fmt: skip
    store.add_argument("--sizes", default="1000000,10000000", metavar="N,N", help="(default 1000000,10000000)")
    store.add_argument("--dtypes", default="float32", metavar="D", help="as stored: float32 or float16")
    store.add_argument("--classes", type=int, metavar="K", help="look for attacks, too, in so many classes")
    for name, default, about in (("epochs", 30, "T"), ("probes", 250, "P")):
        store.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{about} (default {default})")
    scans = benchmarks.add_parser("scan", help="what a scan finds in a poisoned folder of images",
                                  description=_SCAN, epilog=_SCAN_EXAMPLES, **plain)  # fmt: skip
    scans.set_defaults(configurable=True)
    scans.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="of the data set and the attacks")
    scans.add_argument("--seeds", default="0,1,2", metavar="S,S", help="each in turn (default 0,1,2)")
    scans.add_argument("--regimes", default="", metavar="A,B", help="each in turn, or all (default: the config as it"
                       " is)")  # fmt: skip
    scans.add_argument("--scan", default="", metavar="'ARGS'", help="more arguments of `badloss scan`")
    for parser in (scorer, detectors):
        parser.add_argument(
            "--repeats", type=int, default=5, metavar="N", help="of which the median counts (default 5)"
        )
    for parser in (train, buffer, feed, scorer, detectors, store, scans):
        parser.add_argument("--out", type=Path, metavar="FILE.json", help="keeps all figures")


def measure(arguments: argparse.Namespace, overrides: Sequence[str], command: Sequence[str]) -> int:
    """Runs the benchmark, prints its table and writes its file, which is complete after each row of the table."""
    for name in ("examples", "classes", "image_size", "epochs", "batch_size", "cpu_devices", "feature_dim", "seconds",
                 "repeats"):  # fmt: skip
        value = getattr(arguments, name, None)
        if value is not None and not value > 0:
            raise UsageError(f"--{name} {value}: expected a positive number")
    if arguments.out and arguments.out.suffix != ".json":
        raise UsageError(f"--out {arguments.out}: expected a file name that ends in .json")
    if arguments.benchmark == "buffer":
        _set_cpu_devices(arguments.cpu_devices)
    from badloss_jax.benchmarks.timing import header
    from badloss_jax.core.files import write_text
    from badloss_jax.report.tables import as_text

    work, table = {
        "train": (_train, tables.training_table),
        "buffer": (_buffer, tables.buffer_table),
        "input": (_input, tables.input_table),
        "scorer": (_scorer, tables.scorer_table),
        "detectors": (_detectors, tables.detectors_table),
        "store": (_store, tables.store_table),
        "scan": (_scan, tables.scan_table),
    }[arguments.benchmark]
    about, figures = header(arguments.benchmark, _without_paths(command)), []
    for figure in work(arguments, overrides):
        figures.append(figure)
        if arguments.out:
            write_text(arguments.out, json.dumps(about | {"figures": figures}, indent=2, allow_nan=False) + "\n")
    devices, cores = about["environment"]["devices"], about["environment"]["cpu_count"]
    print(f"{as_text(table(figures))}\n")
    print(f"{len(devices)} x {devices[0]}, {cores} CPU cores, load average before {about['load_average'][0]:.1f}")
    if arguments.out:
        print(f"Figures: {arguments.out}")
    if arguments.out and arguments.benchmark == "scorer":
        from badloss_jax.benchmarks.scorer import save_slopes

        save_slopes(arguments.out.with_suffix(".png"), figures)
        print(f"Picture: {arguments.out.with_suffix('.png')}")
    return 0


def _without_paths(command: Sequence[str]) -> list[str]:
    """Leaves out where the file lies, and names other folders by what they are: they mean nothing elsewhere."""
    shown = {"--out": None, "--workdir": "OUT", "--from": "DIR", "--config.data.dir": "DIR"}
    plain: list[str] = []
    value_of = ""
    for text in command:
        option, equals, _ = text.partition("=")
        if value_of:  # of the option before
            name = shown[value_of]
            plain += [value_of, name] if name else []
            value_of = ""
        elif option in shown and equals:
            name = shown[option]
            plain += [f"{option}={name}"] if name else []
        elif option in shown:
            value_of = option
        else:
            plain.append(text)
    return plain


def _train(arguments: argparse.Namespace, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    from badloss_jax.benchmarks.training import measure_training
    from badloss_jax.config import default_config, load_config, override
    from badloss_jax.core.mesh import check_batch_size, make_mesh, round_up
    from badloss_jax.models import ModelSpec
    from badloss_jax.training.loop import Recipe
    from badloss_jax.training.objective import MeanLoss
    from badloss_jax.training.state import AdamW
    from badloss_jax.trajectories.kinds import Kinds

    if arguments.config:
        config = load_config(arguments.config, overrides)
    else:
        config = override(default_config(), ["--config.model.name=resnet_small", *overrides])
    names = arguments.models.split(",") if arguments.models else [config.model.name]
    for name in names:
        override(config, [f"--config.model.name={name}"])  # refuses what is none, before anything starts
    mesh = make_mesh()
    check_batch_size("recording.batch_size", config.recording.batch_size, mesh)
    data, classes = _data(arguments, config, mesh)
    if arguments.scan and mesh.devices.flat[0].platform == "cpu":
        print("badloss: warning: on CPUs a scanned epoch can take far longer than a looped one: keep --examples small",
              file=sys.stderr)  # fmt: skip
    recording, given = config.recording, config.optimizer
    adamw = AdamW(given.weight_decay, given.b1, given.b2)
    recipe = Recipe(recording.epochs, recording.schedule_epochs, recording.batch_size, given.learning_rate, adamw,
                    MeanLoss(given.loss_clamp))  # fmt: skip
    for name in names:
        height, width, channels = data.images.shape[1:]
        spec = ModelSpec(name, (height, width, channels), classes, tuple(config.model.stages), config.model.stem_stride,
                         config.model.dtype)  # fmt: skip
        kinds = Kinds(tuple(recording.kinds), classes, spec.num_features, recording.feature_dim,
                      recording.ranked_others)  # fmt: skip
        yield measure_training(spec, recipe, kinds, data, mesh, seconds=arguments.seconds, scan=arguments.scan,
                               sweep_batch=round_up(config.evaluation.batch_size, mesh))  # fmt: skip


def _data(arguments: argparse.Namespace, config: "ConfigDict", mesh: "Mesh") -> tuple["ResidentData", int]:
    """Returns the images on the devices, and the number of classes."""
    from badloss_jax.benchmarks.training import clean_data, synthetic_data
    from badloss_jax.data import is_streamed, load_dataset

    if arguments.image_size or not arguments.config:
        size = arguments.image_size or 32
        shape = (size, size, config.data.channels)
        return synthetic_data(mesh, arguments.examples, shape, arguments.classes), arguments.classes
    dataset = load_dataset(config.data, config.seed)
    if is_streamed(dataset.train, config.data.input):
        raise UsageError("these images are streamed, and badloss bench measures the devices, not the decoding: take"
                         " --image_size PX, or fewer images by --config.data.train_examples=N")  # fmt: skip
    return clean_data(mesh, dataset.train.images, dataset.train.labels), dataset.num_classes


def _buffer(arguments: argparse.Namespace, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    from badloss_jax.benchmarks.buffer import measure_buffer
    from badloss_jax.core.mesh import make_mesh
    from badloss_jax.settings import RECORDED_KINDS
    from badloss_jax.trajectories.kinds import Kinds

    kinds = Kinds(tuple(_names("kinds", arguments.kinds, RECORDED_KINDS)), 1000, 1, arguments.feature_dim)
    yield measure_buffer(kinds, arguments.examples, arguments.epochs, make_mesh(), batch_size=arguments.batch_size,
                         num_probes=arguments.probes, k=arguments.k)  # fmt: skip


def _input(arguments: argparse.Namespace, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    from badloss_jax.benchmarks.input import measure_input
    from badloss_jax.core.mesh import check_batch_size, make_mesh

    mesh = make_mesh()
    check_batch_size("--batch_size", arguments.batch_size, mesh)
    with tempfile.TemporaryDirectory(prefix="badloss-bench-") as folder:
        yield from measure_input(arguments.images, arguments.examples, arguments.image_size, arguments.batch_size,
                                 arguments.seconds, mesh, Path(folder))  # fmt: skip


def _scorer(arguments: argparse.Namespace, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    from badloss_jax.benchmarks.scorer import KERNELS, PEERS, measure_scorer

    sizes, dtypes = _sizes(arguments), _names("dtypes", arguments.dtypes, ("float32", "float16"))
    if not 1 <= arguments.k <= arguments.probes:
        raise UsageError(f"--k {arguments.k} with --probes {arguments.probes}: expected 1 <= k <= P")
    methods = _names("methods", arguments.methods, (*KERNELS, *PEERS)) or [*KERNELS, *PEERS]
    yield from measure_scorer(sizes, arguments.epochs, arguments.probes, arguments.k, dtypes, methods,
                              arguments.repeats)  # fmt: skip


def _store(arguments: argparse.Namespace, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    from badloss_jax.benchmarks.scorer import measure_store

    for dtype in _names("dtypes", arguments.dtypes, ("float32", "float16")):
        yield from measure_store(_sizes(arguments), arguments.epochs, arguments.probes, dtype,
                                 arguments.classes or 0)  # fmt: skip


def _sizes(arguments: argparse.Namespace) -> list[int]:
    try:
        sizes = [int(size) for size in arguments.sizes.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UsageError(f"--sizes {arguments.sizes!r}: expected numbers of trajectories, such as 10000,50000")
    return sizes


def _names(option: str, given: str, known: Sequence[str]) -> list[str]:
    names = [name for name in given.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"--{option} has {unknown[0]!r}: expected some of {', '.join(known)}")
    return names


def _detectors(arguments: argparse.Namespace, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    from badloss_jax.benchmarks.scorer import measure_detectors

    yield from measure_detectors(arguments.workdir, arguments.repeats)


def _scan(arguments: argparse.Namespace, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    from badloss_jax.benchmarks.gauntlet import REGIMES
    from badloss_jax.benchmarks.scan import measure_scan
    from badloss_jax.config import load_config

    config = load_config(arguments.config, overrides)
    regimes = list(REGIMES) if arguments.regimes == "all" else _names("regimes", arguments.regimes, tuple(REGIMES))
    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError as error:
        raise UsageError(f"--seeds {arguments.seeds!r}: expected numbers, such as 0,1,2") from error
    with tempfile.TemporaryDirectory(prefix="badloss-bench-") as folder:
        before = _left_by_the_same(arguments)
        yield from measure_scan(config, seeds, regimes, shlex.split(arguments.scan), Path(folder), before)


def _left_by_the_same(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the figures that this command, of this version, left in its file when it was interrupted."""
    from badloss_jax.benchmarks.timing import header
    from badloss_jax.core.files import read_json

    if not arguments.out or not arguments.out.is_file():
        return []
    ours, theirs = header(arguments.benchmark, _without_paths(arguments.argv)), read_json(arguments.out)
    keys = ("benchmark", "command", "environment")
    same = isinstance(theirs, dict) and all(theirs.get(key) == ours[key] for key in keys)
    return list(theirs["figures"]) if same else []


def _set_cpu_devices(count: int) -> None:
    """Sets how many devices a CPU is taken for, which JAX fixes when it starts."""
    import jax

    if jax.config.jax_num_cpu_devices != count:  # type: ignore[attr-defined]
        jax.config.update("jax_num_cpu_devices", count)
