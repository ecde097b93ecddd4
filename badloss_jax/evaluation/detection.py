"""How well a score tells poison from clean, and what a removal list costs and catches."""

import numpy as np
from jaxtyping import Bool, Float


def detection_metrics(
    scores: Float[np.ndarray, "N"], attack_of: np.ndarray, is_probe: Bool[np.ndarray, "N"]
) -> dict[str, dict[str, float | None]]:
    """Measures AUROC, average precision and the true positive rate at 1 % false positives, overall and per attack.

    Probes are taken for clean, whatever they are, and left out. An attack is measured against the clean examples alone.
    Without any poison "overall" is None.

    Args:
      scores: [N], higher is more suspicious.
      attack_of: str [N], the example's attack or "".
      is_probe: [N].

    Returns:
      "auroc", "average_precision" and "tpr_at_1_fpr", each with "overall" and a figure for every attack, in [0, 1].
    """
    # Takes more than a second to import, which who only retrains or renders need not wait for.
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    clean = (attack_of == "") & ~is_probe
    poison = (attack_of != "") & ~is_probe
    metrics: dict[str, dict[str, float | None]] = {"auroc": {}, "average_precision": {}, "tpr_at_1_fpr": {}}
    if not poison.any():
        return {metric: {"overall": None} for metric in metrics}

    for name in ("overall", *attack_names(attack_of[poison])):
        poisoned = poison if name == "overall" else poison & (attack_of == name)
        chosen = clean | poisoned
        truth = poisoned[chosen]
        values = scores[chosen]

        metrics["auroc"][name] = float(roc_auc_score(truth, values))
        metrics["average_precision"][name] = float(average_precision_score(truth, values))
        false_positives, true_positives, _ = roc_curve(truth, values, drop_intermediate=False)
        metrics["tpr_at_1_fpr"][name] = float(true_positives[false_positives <= 0.01].max())
    return metrics


def removal_metrics(removed: Bool[np.ndarray, "N"], attack_of: np.ndarray) -> dict[str, object]:
    """Measures what a removal list costs and catches.

    Args:
      removed: [N].
      attack_of: str [N], the example's attack or "".

    Returns:
      The share removed of all examples, of the clean ones, and of each attack's ("recall").
    """
    return {
        "removed_share": float(removed.mean()),
        "clean_removed_share": float(removed[attack_of == ""].mean()),
        "recall": {name: float(removed[attack_of == name].mean()) for name in attack_names(attack_of)},
    }


def recall_at_clean_loss(
    scores: Float[np.ndarray, "N"],
    attack_of: np.ndarray,
    is_probe: Bool[np.ndarray, "N"],
    lost: Float[np.ndarray, "L"],
) -> dict[str, Float[np.ndarray, "L"]]:
    """Measures each attack's recall when the threshold costs the given shares of the clean examples.

    The threshold that costs a share c of M clean examples (probes left out) is the highest at which floor(c M) of them
    lie above it; an example at the threshold is kept.

    Args:
      scores: [N], higher is more suspicious.
      attack_of: str [N], the example's attack or "".
      is_probe: [N].
      lost: [L], shares of the clean examples in [0, 1).

    Returns:
      Attack -> [L], its recall.
    """
    clean = np.sort(scores[(attack_of == "") & ~is_probe])
    num_lost = np.floor(np.asarray(lost) * len(clean) + 1e-9).astype(int)
    thresholds = clean[len(clean) - 1 - num_lost]

    poison = np.where(is_probe, "", attack_of)
    return {name: (scores[poison == name][:, None] > thresholds).mean(0) for name in attack_names(poison)}


def attack_names(attack_of: np.ndarray) -> list[str]:
    """Returns the attacks that occur, sorted."""
    return sorted(set(attack_of) - {""})
