"""How well a score tells poison from clean, and what a removal list costs and catches."""

import numpy as np
from jaxtyping import Bool, Float
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve


def detection_metrics(
    scores: Float[np.ndarray, "N"], attack_of: np.ndarray, is_probe: Bool[np.ndarray, "N"]
) -> dict[str, dict[str, float | None]]:
    """Measures AUROC, average precision and the true positive rate at 1 % false positives, overall and per attack.

    Probes are known to be clean and are left out. An attack is measured against the clean examples alone. Without any
    poison "overall" is None.

    Args:
      scores: [N], higher is more suspicious.
      attack_of: str [N], the example's attack or "".
      is_probe: [N].
    """
    clean = (attack_of == "") & ~is_probe
    metrics: dict[str, dict[str, float | None]] = {"auroc": {}, "average_precision": {}, "tpr_at_1_fpr": {}}
    if not (attack_of != "").any():
        return {metric: {"overall": None} for metric in metrics}
    for name in ("overall", *_attacks(attack_of)):
        poisoned = attack_of != "" if name == "overall" else attack_of == name
        chosen = clean | poisoned
        truth, values = poisoned[chosen], scores[chosen]
        metrics["auroc"][name] = float(roc_auc_score(truth, values))
        metrics["average_precision"][name] = float(average_precision_score(truth, values))
        false_positives, true_positives, _ = roc_curve(truth, values, drop_intermediate=False)
        metrics["tpr_at_1_fpr"][name] = float(true_positives[false_positives <= 0.01].max())
    return metrics


def removal_metrics(removed: Bool[np.ndarray, "N"], attack_of: np.ndarray) -> dict[str, object]:
    """Returns the share removed of all examples, of the clean ones, and of each attack's ("recall")."""
    return {
        "removed_share": float(removed.mean()),
        "clean_removed_share": float(removed[attack_of == ""].mean()),
        "recall": {name: float(removed[attack_of == name].mean()) for name in _attacks(attack_of)},
    }


def _attacks(attack_of: np.ndarray) -> list[str]:
    return sorted(set(attack_of) - {""})
