"""What ranks ask of each other, for a process that is alone: it answers itself."""

import pytest
import torch

from mrpo_scale.base import ranks
from mrpo_scale.base.errors import ConfigError, check_one_of, one_line


def test_a_process_that_is_alone_is_its_own_world():
    tensor = torch.tensor([1.0, 2.0])
    assert (ranks.get_rank(), ranks.get_world_size(), ranks.world_group()) == (0, 1, None)
    assert ranks.sum_over_ranks(tensor) is tensor and tensor.tolist() == [1.0, 2.0]
    assert ranks.all_gather_object("mine", None) == ["mine"] and ranks.broadcast_from_rank0("mine", None) == "mine"


def make_on_rank(broken):
    """What each rank gets of a value that only the first may make."""
    made = []

    def make():
        made.append(ranks.get_rank())
        if broken:
            raise ConfigError("no such data set")
        return {"rows": [made[0], "of the first"]}

    try:
        return ranks.share_within_node(make), made
    except ConfigError as error:
        return str(error), made


def test_one_rank_of_a_node_makes_what_all_get(pool2):
    value = {"rows": [0, "of the first"]}
    assert pool2.run(make_on_rank, False) == [(value, [0]), (value, [])]
    (first, _), (second, _) = pool2.run(make_on_rank, True)
    assert first == "no such data set" and second.startswith("rank 0 failed: ConfigError: no such data set")


def test_words_of_errors():
    assert one_line(ValueError("two\n  lines")) == "two lines"
    check_one_of("clip", "none", ("none", "fixed"))
    with pytest.raises(ConfigError, match=r"^`clip: some` is not known; choose one of none, fixed\.$"):
        check_one_of("clip", "some", ("none", "fixed"))
