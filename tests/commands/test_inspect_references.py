"""What `mrpo inspect` says of references whose worth is known beforehand."""

import json
import math

import pytest
import torch

from mrpo_scale.commands.inspect_references import plot_worth, worth_of_references, worth_table
from mrpo_scale.objective import Objective


def scores(*margins_P, level=-100.0):
    """[K, P, 2] with these margins around ``level``."""
    margins_KP = torch.tensor(margins_P)
    return torch.stack([level + margins_KP / 2, level - margins_KP / 2], dim=-1)


TOKENS = torch.full((2, 4, 2), 50)


def test_shares_by_hand():
    """Anchor margins +2 -2 +2 +2, other +1 +1 -1 +1: labels agree on 3 of 4 each, the two disagree on 2 pairs of 4."""
    logps = scores([2.0, -2.0, 2.0, 2.0], [1.0, 1.0, -1.0, 1.0])
    anchor, other = worth_of_references(logps, TOKENS, Objective(clip="none"), ["anchor", "other"])
    assert (anchor.agrees, other.agrees) == (0.75, 0.75)
    assert (anchor.weight, other.weight) == pytest.approx((2 / 3, 1 / 3)), "Eq. 10: by the size of the margins"
    assert anchor.correlation == anchor.rank_correlation == 1.0
    assert other.correlation == pytest.approx(-1 / 3)
    assert anchor.logp_per_token == other.logp_per_token == -2.0
    assert other.clipped == 0.0
    # The lowest of the two texts: pair 0 chosen -99 and -99.5 (other), rejected -101 and -100.5 (anchor); alike in pair 3. Pair 1:
    # -101 and -99.5 (anchor), -99 and -100.5 (other). Pair 2: -99 and -100.5 (other), -101 and -99.5 (anchor).
    assert (anchor.decides, other.decides) == (0.5, 0.5)
    table = worth_table([anchor, other], 4, 5, 0.5)
    assert "4 of 5 pairs" in table and "on 50.0% of pairs" in table


def test_length_is_taken_out():
    """The chosen responses are twice as long and so less likely as a whole, but likelier per token."""
    logps = torch.tensor([[[-150.0, -100.0]] * 4] * 2)
    tokens = torch.tensor([[[100, 50]] * 4] * 2)
    anchor, _ = worth_of_references(logps, tokens, Objective(), ["anchor", "other"])
    assert (anchor.agrees, anchor.agrees_per_token) == (0.0, 1.0)


def test_clipped_by_hand():
    """epsilon 0.1 around -100 allows -110 to -90: of the texts at -150 and -99 the first moves."""
    logps = torch.tensor([[[-100.0, -100.5]], [[-150.0, -99.0]]])
    _, other = worth_of_references(logps, TOKENS[:, :1], Objective(clip="fixed", epsilon_max=0.1), ["anchor", "other"])
    assert other.clipped == 0.5


@pytest.mark.parametrize(
    ("margins", "verdict"),
    [
        ([8.0, -4.0, 6.0, 5.0], "nearly the anchor again"),
        ([0.0, 0.0, 0.0, 0.0], "adds nothing: decides 0.0%"),
        ([-3.0, -2.0, -8.0, -1.0], "but ranks pairs against the labels (0%)"),
        ([3.0, 4.0, -1.0, 9.0], "adds something"),
    ],
)
def test_verdicts(margins, verdict):
    """A copy at twice the scale; one without an opinion, so without weight; one that is always wrong; and one of its own."""
    found = worth_of_references(
        scores([4.0, -2.0, 3.0, 2.5], margins), TOKENS, Objective(clip="none"), ["anchor", "other"]
    )
    assert found[0].verdict == "the anchor"
    assert verdict in found[1].verdict


def test_undefined_figures_are_null_in_json(tmp_path):
    found = worth_of_references(scores([1.0], [0.0]), TOKENS[:, :1], Objective(), ["anchor", "other"])
    assert found[1].correlation is None and found[0].moves is None
    assert json.loads(json.dumps([vars(worth) for worth in found], allow_nan=False))


def test_moves_is_what_leaving_it_out_changes():
    """Without the only other reference the virtual margin is the anchor's own."""
    logps = scores([2.0, -2.0], [6.0, 3.0])
    objective = Objective(clip="none", aggregate="arithmetic")
    _, other = worth_of_references(logps, TOKENS[:, :2], objective, ["anchor", "other"])
    virtual = []
    for anchor, second in ((2.0, 6.0), (-2.0, 3.0)):
        weight = abs(anchor) / (abs(anchor) + abs(second))
        sides = [
            math.log(weight * math.exp(sign * anchor / 2) + (1 - weight) * math.exp(sign * second / 2))
            for sign in (1, -1)
        ]
        virtual.append(sides[0] - sides[1])
    assert other.moves == pytest.approx((abs(virtual[0] - 2) + abs(virtual[1] + 2)) / 2)


def test_the_picture_is_drawn(tmp_path):
    logps = scores([2.0, -2.0, 2.0, 2.0], [1.0, 1.0, -1.0, 1.0])
    found = worth_of_references(logps, TOKENS, Objective(), ["anchor", "other"])
    plot_worth(found, logps, tmp_path / "inspect.png")
    assert (tmp_path / "inspect.png").read_bytes().startswith(b"\x89PNG")
