"""The plots of a run, as PNG files for report.md and as SVG panels for report.html.

Colours are Okabe and Ito's, which colour-blind people can tell apart; lines differ in their dashes, too. Each plot is a
function of an axis (`Draw`): `save_png` and `svg_uri` make the figure, and import Matplotlib.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from badloss_jax.core.files import write_atomically
from badloss_jax.evaluation.detection import attack_names, recall_at_clean_loss
from badloss_jax.report.gallery import difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import LogFormatter

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-")
_POISON = "#D55E00"
_CLEAN = "#888888"
_PROBES = "#000000"
_SIZE = (4.4, 3.3)  # of a panel, inches
LOW_LOSS = 1e-4  # below this a loss is drawn as this, on the logarithmic axis
CLEAN_LOSS = np.arange(1, 41) / 100
_CURVE_POINTS = 300

Draw = Callable[["Axes"], None]


def trajectories_of(name: str, losses: Float[np.ndarray, "N T"], attack_of: np.ndarray, is_probe: np.ndarray) -> Draw:
    """Draws an attack's losses (median, 16th to 84th percentile) against those of the clean examples and the probes.

    Args:
      name: of the attack.
      losses: [N, T], in nats.
      attack_of: str [N], the example's attack or "".
      is_probe: bool [N].

    Returns:
      What draws it.
    """
    groups = {
        "clean": ((attack_of == "") & ~is_probe, _CLEAN, "-"),
        "probes": (is_probe, _PROBES, "--"),
        name: (attack_of == name, _POISON, "-"),
    }

    def draw(axis: "Axes") -> None:
        epochs = np.arange(1, losses.shape[1] + 1)
        for label, (rows, colour, dash) in groups.items():
            low, median, high = np.percentile(np.maximum(losses[rows], LOW_LOSS), [16, 50, 84], axis=0)
            axis.plot(epochs, median, color=colour, linestyle=dash, label=f"{label} ({rows.sum():,})")
            # Three bands over one another could not be told apart.
            if label != "probes":
                axis.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)

        axis.set(yscale="log", title=name, xlabel="epoch", ylabel="loss")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(_plain_formatter())
        axis.legend(fontsize=8)

    return draw


def roc_of(kind: str, distances: Float[np.ndarray, "N"], attack_of: np.ndarray, is_probe: np.ndarray) -> Draw:
    """Draws the ROC of each attack against the clean examples, probes left out.

    Args:
      kind: of trajectory, or a defence's name: the title.
      distances: [N], higher is more suspicious.
      attack_of: str [N], the example's attack or "".
      is_probe: bool [N].

    Returns:
      What draws it.
    """
    clean = (attack_of == "") & ~is_probe
    poison = np.where(is_probe, "", attack_of)

    def draw(axis: "Axes") -> None:
        from sklearn.metrics import roc_curve

        for i, name in enumerate(attack_names(poison)):
            chosen = clean | (poison == name)
            false_positives, true_positives, _ = roc_curve((poison == name)[chosen], distances[chosen])
            # So many points draw the same line as one an example, in a far smaller page.
            thin = np.unique(np.linspace(0, len(false_positives) - 1, _CURVE_POINTS).astype(int))
            axis.plot(false_positives[thin], true_positives[thin], label=name, **line_of(i))

        # What guessing would draw.
        axis.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8)
        axis.set(xlim=(0, 1), ylim=(0, 1.01), title=kind, xlabel="clean examples flagged", ylabel="poison flagged")
        axis.legend(fontsize=7, loc="lower right")

    return draw


def histogram_of(
    kind: str,
    scores: Float[np.ndarray, "N"],
    removed: Bool[np.ndarray, "N"],
    attack_of: np.ndarray,
    is_probe: np.ndarray,
) -> Draw:
    """Draws how the scores of clean and of poisoned examples are spread, and from where on a rule removes.

    Args:
      kind: of trajectory, or a defence's name: the title.
      scores: [N], in [0, 1].
      removed: [N], by a rule that is a threshold on the scores; none removed draws no threshold.
      attack_of: str [N], the example's attack or "".
      is_probe: bool [N].

    Returns:
      What draws it.
    """
    groups = (
        ("clean", (attack_of == "") & ~is_probe, _CLEAN),
        ("poison", (attack_of != "") & ~is_probe, _POISON),
    )

    def draw(axis: "Axes") -> None:
        bins = np.linspace(0, 1, 61).tolist()
        for label, rows, colour in groups:
            if not rows.any():
                continue
            # In percent of each group: poison is so rare that its counts would not be seen.
            weights = np.full(rows.sum(), 100 / rows.sum())
            axis.hist(scores[rows], bins, weights=weights, color=colour, alpha=0.35, histtype="stepfilled")
            axis.hist(scores[rows], bins, weights=weights, color=colour, histtype="step", label=label)

        if removed.any():
            threshold = scores[removed].min()
            axis.axvline(threshold, color="#000000", linestyle="--", linewidth=1, label="removed from here on")

        axis.set(xlim=(0, 1), title=kind, xlabel="score", ylabel="% of the group")
        axis.legend(fontsize=8)

    return draw


def recall_by_kind(distances: Mapping[str, np.ndarray], attack_of: np.ndarray, is_probe: np.ndarray) -> Draw:
    """Draws for each kind the mean recall over attacks against the share of clean examples lost.

    Args:
      distances: kind -> [N], higher is more suspicious.
      attack_of: str [N], the example's attack or "".
      is_probe: bool [N].

    Returns:
      What draws it.
    """

    def draw(axis: "Axes") -> None:
        for i, (kind, values) in enumerate(distances.items()):
            recalls = recall_at_clean_loss(values, attack_of, is_probe, CLEAN_LOSS)
            _recall_line(axis, np.mean(list(recalls.values()), axis=0), kind, i)
        _recall_axis(axis, "all kinds, mean over attacks")

    return draw


def recall_curves(curves: Mapping[str, Float[np.ndarray, "L"]], label: str) -> Draw:
    """Draws given recalls at `CLEAN_LOSS`, a line each, best first.

    Args:
      curves: name of the line -> recall [L], in [0, 1], at the L shares of `CLEAN_LOSS`.
      label: of the attacks, for the title.

    Returns:
      What draws it; its legend lies beside the panel, see `save_png`.
    """

    def draw(axis: "Axes") -> None:
        for i, (name, recall) in enumerate(curves.items()):
            _recall_line(axis, recall, name, i)
        _recall_axis(axis, f"attacks: {label}, mean over attacks and seeds")
        # In place of the legend inside, which would cover the lines of so many detectors.
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.02))

    return draw


def recall_by_attack(kind: str, distances: np.ndarray, attack_of: np.ndarray, is_probe: np.ndarray) -> Draw:
    """Draws for each attack its recall against the share of clean examples lost.

    Args:
      kind: of trajectory, or a defence's name, for the title.
      distances: [N], higher is more suspicious.
      attack_of: str [N], the example's attack or "".
      is_probe: bool [N].

    Returns:
      What draws it.
    """

    def draw(axis: "Axes") -> None:
        recalls = recall_at_clean_loss(distances, attack_of, is_probe, CLEAN_LOSS)
        for i, (name, recall) in enumerate(recalls.items()):
            _recall_line(axis, recall, name, i)
        _recall_axis(axis, f"{kind}, per attack")

    return draw


def save_png(path: Path, draws: Sequence[Draw], legend: float = 0.0) -> None:
    """Draws panels three in a row; no pyplot, so nobody's backend is touched.

    Args:
      path: of the PNG file.
      draws: one or more.
      legend: inches that are left beside a single panel for its legend.

    Raises:
      DataError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    columns = min(3, len(draws))
    rows = -(-len(draws) // columns)
    figure = Figure(figsize=(_SIZE[0] * columns + legend, _SIZE[1] * rows))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.subplots_adjust(**_margins(rows, columns, legend))

    for axis, draw in zip(axes, draws, strict=False):
        draw(axis)
    # The last row may have places to spare.
    for axis in axes[len(draws) :]:
        axis.set_visible(False)

    write_atomically(path, lambda aside: figure.savefig(aside, dpi=110))


def svg_uri(draw: Draw, legend: float = 0.0) -> str:
    """Draws one panel as SVG in a data: address, for a page; the same data give the same bytes.

    Args:
      draw: the panel.
      legend: inches that are left beside it for its legend.

    Returns:
      The address.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIZE[0] + legend, _SIZE[1]))
    draw(figure.subplots())
    figure.subplots_adjust(**_margins(1, 1, legend))

    # Without these, ids in the file and its date would differ from one rendering to the next.
    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "badloss", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def save_triggers(
    path: Path, names: Sequence[str], before: UInt8[np.ndarray, "A M H W C"], after: UInt8[np.ndarray, "A M H W C"]
) -> None:
    """Draws one row an attack: of each of M images the image, the triggered image, and the difference times ten.

    Args:
      path: of the PNG file.
      names: A, of the attacks.
      before: [A, M, H, W, C], M images for each attack.
      after: [A, M, H, W, C], the same, triggered.

    Raises:
      DataError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    attacks, images = before.shape[:2]
    figure = Figure(figsize=(1.4 + 3.3 * images, 0.45 + 1.2 * attacks), layout="constrained")
    axes = figure.subplots(attacks, 3 * images, squeeze=False)

    titles = ("image", "triggered", "difference x 10")
    for row, name in enumerate(names):
        # A dollar in a name begins no mathematics.
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", parse_math=False)
        for image in range(images):
            original = before[row, image]
            triggered = after[row, image]
            pictures = (original, triggered, difference(original, triggered))
            for column, picture in enumerate(pictures):
                axis = axes[row, 3 * image + column]
                _show(axis, picture)
                if row == 0:
                    axis.set_title(titles[column], fontsize=9)

    write_atomically(path, lambda aside: figure.savefig(aside, dpi=110, format="png"))


def _show(axis: "Axes", picture: UInt8[np.ndarray, "H W C"]) -> None:
    """Shows a picture without ticks; a grey one on the whole scale, whatever its own darkest and lightest values."""
    if picture.shape[-1] == 1:
        axis.imshow(picture[..., 0], interpolation="nearest", cmap="gray", vmin=0, vmax=255)
    else:
        axis.imshow(picture, interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def _margins(rows: int, columns: int, legend: float) -> dict[str, float]:
    """Returns fixed margins of 0.84, 0.12, 0.5 and 0.32 inches around each panel: measuring texts takes far longer."""
    width, height = _SIZE
    width += legend

    # As shares of a panel; Matplotlib wants the outer ones as shares of the figure.
    left = 0.84 / width
    right = (0.12 + legend) / width
    bottom = 0.5 / height
    top = 0.32 / height
    return {
        "left": left / columns,
        "right": 1 - right / columns,
        "bottom": bottom / rows,
        "top": 1 - top / rows,
        "wspace": (left + right) / (1 - left - right),
        "hspace": (bottom + top) / (1 - bottom - top),
    }


def _plain_formatter() -> "LogFormatter":
    """Returns what writes 0.01 at a logarithmic axis; Matplotlib parses a formula for each power of ten otherwise."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            if super().__call__(x, pos):
                return f"{x:g}"
            return ""  # too close to others

    return Plain()


def _recall_line(axis: "Axes", recall: np.ndarray, label: str, i: int) -> None:
    axis.plot(100 * CLEAN_LOSS, 100 * recall, label=label, **line_of(i))


def _recall_axis(axis: "Axes", title: str) -> None:
    axis.set(xlim=(1, 40), ylim=(0, 101), title=title, xlabel="clean examples lost, %", ylabel="poison found, %")
    axis.legend(fontsize=7, loc="lower right")


def line_of(i: int) -> dict[str, Any]:
    """Returns colour and dashes of the i-th line of a plot; the first 49 all differ."""
    # Each time the seven colours begin anew, the dashes are one further on.
    return {"color": _COLOURS[i % 7], "linestyle": _DASHES[(i + i // 7) % 7]}
