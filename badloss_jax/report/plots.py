"""The two plots of a run. Colours are Okabe and Ito's, which colour-blind people can tell apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from badloss_jax.defenses.badloss import Detection
from badloss_jax.files import write_atomically

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-")
_LOW_LOSS = 1e-4  # below this a loss is drawn as this, on the logarithmic axis


def plot_trajectories(
    path: Path, losses: Float[np.ndarray, "N T"], attack_of: np.ndarray, is_probe: Bool[np.ndarray, "N"]
) -> None:
    """Draws one panel an attack: its losses (median, 16th to 84th percentile) against the clean and the probes."""
    attacks = sorted(set(attack_of) - {""})
    figure, axes = _panels(attacks, height=2.9)
    groups = {"clean": ((attack_of == "") & ~is_probe, "#888888", "-"), "probes": (is_probe, "#000000", "--")}
    epochs = np.arange(1, losses.shape[1] + 1)
    for axis, name in zip(axes, attacks, strict=True):
        for label, (rows, colour, dash) in (groups | {name: (attack_of == name, "#D55E00", "-")}).items():
            low, median, high = np.percentile(np.maximum(losses[rows], _LOW_LOSS), [16, 50, 84], axis=0)
            axis.plot(epochs, median, color=colour, linestyle=dash, label=f"{label} ({rows.sum():,})")
            if label != "probes":
                axis.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set(yscale="log")
        axis.legend(fontsize=8)
    figure.supxlabel("epoch")
    figure.supylabel("loss: median, 16th to 84th percentile")
    _save(figure, path)


def plot_roc(
    path: Path, detections: Mapping[str, Detection], attack_of: np.ndarray, is_probe: Bool[np.ndarray, "N"]
) -> None:
    """Draws one panel a kind of trajectory: the ROC of each attack against the clean examples, probes left out."""
    attacks = sorted(set(attack_of) - {""})
    figure, axes = _panels(list(detections), height=3.9)
    clean = (attack_of == "") & ~is_probe
    for axis, detection in zip(axes, detections.values(), strict=True):
        for i, name in enumerate(attacks):
            chosen = clean | (attack_of == name)
            false_positives, true_positives, _ = roc_curve((attack_of == name)[chosen], detection.distances[chosen])
            axis.plot(false_positives, true_positives, label=name, color=_COLOURS[i % 7], linestyle=_DASHES[i % 7])
        axis.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8)
        axis.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(attacks), fontsize=9)
    figure.supxlabel("clean examples flagged")
    figure.supylabel("poison flagged")
    _save(figure, path)


def _panels(titles: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """Returns a figure with one titled panel each, three in a row; no pyplot, so nobody's backend is touched."""
    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(4.2 * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title)
        axis.tick_params(labelbottom=True)
    for axis in axes[len(titles) :]:
        axis.set_visible(False)
    return figure, axes[: len(titles)]


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda aside: figure.savefig(aside, dpi=110))
