"""What a poison manifest holds: for each attack its target class, trigger parameters and the ids that it poisons."""

import json
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from jaxtyping import Int

from badloss_jax.attacks import ATTACKS
from badloss_jax.core.hashing import digest

FORMAT = "badloss_jax.manifest/1"


@dataclass(frozen=True)
class AttackPlan:
    """What one attacker does: the trigger (seed and parameters), the target class and the poisoned example ids.

    An optimised trigger's `perturbation` is in 1/255, flattened from [H, W, C]; the others have none. `below_ids` are
    examples of other attacks that carry this trigger, too, below their own: where triggers overlap.
    """

    target: int
    seed: int
    example_ids: tuple[int, ...]
    parameters: dict[str, float] = field(default_factory=dict)
    perturbation: tuple[int, ...] = ()
    below_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Who is poisoned with what, in a training set of `num_examples` images of `num_classes` classes."""

    num_examples: int
    num_classes: int
    image_shape: tuple[int, int, int]
    attacks: dict[str, AttackPlan]

    @property
    def digest(self) -> str:
        """Hashes all of it to 16 hexadecimal digits."""
        return digest(asdict(self))

    @property
    def poisoned_ids(self) -> Int[np.ndarray, "M"]:
        """All poisoned example ids, attack by attack."""
        return np.array([i for plan in self.attacks.values() for i in plan.example_ids], np.int64)

    def attack_of(self) -> np.ndarray:
        """Returns for each example the name of its attack, or "", as str [N]."""
        names = np.full(self.num_examples, "", dtype=object)
        for name, plan in self.attacks.items():
            names[list(plan.example_ids)] = name
        return names

    @property
    def unoptimised(self) -> tuple[str, ...]:
        """The attacks whose perturbation is not there yet."""
        return tuple(name for name, plan in self.attacks.items() if ATTACKS[name].optimised and not plan.perturbation)

    def with_perturbation(self, name: str, perturbation: Int[np.ndarray, "H W C"]) -> "Manifest":
        """Returns a copy in which one attack has its perturbation.

        Args:
          name: of the attack.
          perturbation: integers [H, W, C] in 1/255; an empty array takes it away.

        Returns:
          The copy.
        """
        values = tuple(int(value) for value in perturbation.ravel())
        plan = replace(self.attacks[name], perturbation=values)
        return replace(self, attacks=self.attacks | {name: plan})

    def to_json(self) -> str:
        """Returns what `read_manifest` reads."""
        return json.dumps({"format": FORMAT, **asdict(self)})
