"""The page of memory between the main process and its workers."""

import os
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.gateway.board import PAGE, Board


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board()
    yield made
    made.close()


@given(st.dictionaries(st.text(max_size=20), st.integers(0, 2**63 - 1), max_size=50))
def test_another_descriptor_reads_what_was_written_last(facts: dict[str, int]) -> None:
    board = Board()
    other = Board(os.dup(board.fileno()))
    try:
        board.write({"before": "x" * 3000})
        board.write(facts)
        assert other.read() == facts
    finally:
        board.close()
        other.close()


def test_before_the_first_word_it_is_empty(board: Board) -> None:
    assert board.read() == {}


def test_half_a_page_is_read_as_nothing(board: Board) -> None:
    board.write({"requests": 1})
    os.pwrite(board.fileno(), b'{"requests": 2', PAGE // 2)
    assert board.read() == {}
    board.write({"requests": 3})
    assert board.read() == {"requests": 3}


def test_too_much_is_refused_and_leaves_what_stands(board: Board) -> None:
    board.write({"requests": 1})
    with pytest.raises(ValueError, match="do not fit"):
        board.write({"x": "x" * PAGE})
    assert board.read() == {"requests": 1}


def test_a_reader_beside_the_writer_sees_whole_pages(board: Board) -> None:
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            board.write({"left": number, "filling": "x" * (number % 3000), "right": number})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [facts for _ in range(20_000) if (facts := board.read())]
    finally:
        stop.set()
        writer.join()
    assert len(seen) > 1000
    assert all(facts["left"] == facts["right"] for facts in seen)
