"""The board that the ranks of a host share: two mappings of one file in this process, as two ranks have them."""

import pytest

from mrpo_scale.base.host_board import NOTICE, SLOT, HostBoard, Seat


@pytest.fixture
def boards():
    first = HostBoard.create(3)
    second = HostBoard(3, first.path)
    yield first, second
    first.unlink()


def test_what_one_rank_writes_another_reads(boards):
    first, second = boards
    first.write(0, [1, "computing step 3"])
    second.write(2, [7, "saving"])
    first.write_notice({"text": "é" * 100})
    assert [second.read(slot) for slot in range(3)] == [[1, "computing step 3"], None, [7, "saving"]]
    assert first.read(2) == [7, "saving"] and second.read_notice() == {"text": "é" * 100}
    first.write(0, [2, "x"])
    assert second.read(0) == [2, "x"], "nothing of a longer beat is left"
    first.write(0, None)
    assert second.read(0) is None


def test_without_its_name_the_board_goes_on(boards):
    """The name goes when all ranks have mapped the file, so that a kill leaves nothing behind."""
    first, second = boards
    path = first.path
    assert path.stat().st_mode & 0o777 == 0o600
    first.unlink()
    assert not path.exists()
    first.write(1, [1, "still here"])
    assert second.read(1) == [1, "still here"]
    first.unlink()


def test_half_a_beat_is_none(boards):
    first, second = boards
    first.write(0, [1, "computing"])
    first._map[5] = 0
    assert second.read(0) is None


def test_what_does_not_fit_is_an_error_and_its_neighbours_stay(boards):
    first, second = boards
    second.write(1, [1, "beside"])
    with pytest.raises(ValueError, match=f"do not fit into {SLOT}"):
        first.write(0, "x" * SLOT)
    with pytest.raises(ValueError, match=f"do not fit into {NOTICE}"):
        first.write_notice("x" * NOTICE)
    assert second.read(1) == [1, "beside"]


@pytest.mark.parametrize("content", [None, b"too short"])
def test_a_file_that_is_no_board_is_refused(tmp_path, content):
    if content:
        (tmp_path / "board").write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        HostBoard(2, tmp_path / "board")


def test_seats():
    seat = Seat(rank=13, world_size=24, local_rank=5, ranks_on_host=8, host="b")
    assert (seat.first, list(seat.ranks)) == (8, list(range(8, 16)))
