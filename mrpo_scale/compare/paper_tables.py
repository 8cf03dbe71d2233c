"""What the paper's Tables 1, 2 and 5 are made of: their methods, as settings of runs, and their layout.

Table 1 has methods x sets x directions, Table 2 the accuracy and the margin of two of them, Table 5 one method at several sizes of
the trust region. A direction L <- M: the policy is L and starts as the first reference, M is the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.compare.plan import Arm, make_arm
from mrpo_scale.models.plan import ANCHOR

#: Weights of the first reference that the paper tried for Multi-DPO, RLHF and KD.
FIXED_WEIGHTS = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Args:
        name: as the paper has it.
        settings: keys that it sets beside ``objective``; all others are the recipe's.
        weighed: its references have fixed weights, chosen beforehand; the anchor's is given, the second reference has the rest.
        virtual: its rewards are against its virtual reference. Those of all others are against the anchor, as in the paper.
    """

    name: str
    objective: str
    settings: Mapping[str, str] = field(default_factory=dict)
    weighed: bool = False
    virtual: bool = False

    @property
    def needs_reward_model(self) -> bool:
        return self.objective == "rlhf"

    def arm(self, weight: float | None = None) -> Arm:
        """Its runs; ``weight``: of the first of two references."""
        settings = dict(self.settings)
        if weight is not None:
            settings["ref_weights"] = f"{weight:g} {1 - weight:g}"
        reference = ANCHOR if self.objective == "dpo" else None
        return make_arm(self.objective, self.objective, settings, {}, reference=reference)


DPO = Method("DPO", "dpo")
MRPO = Method("MRPO", "mrpo", virtual=True)


def _size(label: str, epsilon_max: str) -> Method:
    return Method(label, "mrpo", {"epsilon_max": epsilon_max}, virtual=True)


@dataclass(frozen=True)
class Block:
    """One measure of all cells. ``name`` is a field of :class:`mrpo_scale.compare.paper_results.Measured`."""

    name: Literal["reward_accuracy", "reward_margin", "accuracy"]
    short: str
    title: str
    percent: bool  #: shown x 100


REWARD_ACCURACY = Block(
    "reward_accuracy", "preference accuracy", "Preference accuracy, as the paper measures it (x 100)", True
)
MARGIN = Block("reward_margin", "reward margin", "Reward margin, as the paper measures it", False)
ACCURACY = Block("accuracy", "reference-free accuracy", "Reference-free accuracy (x 100)", True)


@dataclass(frozen=True)
class PaperTable:
    """
    Args:
        both_ways: columns are the two directions of policy and first further reference; otherwise the policy with each of its
            further references.
        marked: bold and italic, as the paper's caption has them.
        methods_across: methods are the groups of columns, and there is one row.
    """

    number: int
    methods: tuple[Method, ...]
    blocks: tuple[Block, ...]
    both_ways: bool = True
    marked: bool = True
    methods_across: bool = False


TABLES = {
    "paper1": PaperTable(
        1,
        (
            DPO,
            Method("RLHF", "rlhf", weighed=True),
            Method("KD", "kd", weighed=True),
            Method("Multi-DPO", "multi_dpo", weighed=True),
            # Not defined in the paper; docs/paper.md says why this.
            Method("Mean Ref", "mrpo", {"aggregate": "geometric", "ref_weights": "uniform"}),
            MRPO,
        ),
        (REWARD_ACCURACY, ACCURACY),
    ),
    "paper2": PaperTable(2, (DPO, MRPO), (REWARD_ACCURACY, MARGIN, ACCURACY)),
    "paper5": PaperTable(
        5,
        (
            _size("eps 0 (DPO)", "0"),
            _size("eps 1e6 (no clip)", "1e6"),
            _size("eps 1", "1"),
            _size("eps 0.1", "0.1"),
            _size("eps 0.01", "0.01"),
        ),
        (REWARD_ACCURACY, ACCURACY),
        both_ways=False,
        marked=False,
        methods_across=True,
    ),
}


def methods_of(table: PaperTable, wanted: Sequence[str]) -> list[Method]:
    """The methods of a table, or those ``wanted`` by name, in the table's order.

    Raises:
        ConfigError: the table has none of that name.
    """
    known = {method.name: method for method in table.methods}
    for name in wanted:
        if name not in known:
            raise ConfigError(
                f"`--methods {name}` is not in the paper's Table {table.number}; it has {', '.join(known)}."
            )
    return [method for method in table.methods if not wanted or method.name in wanted]
