"""Functions that report their progress, run in a thread step by step."""

import pytest
import torch
from playing import count_threads

from lib.explore import live


def test_a_function_in_a_thread_gives_its_result_and_reports():
    reported = []
    items = list(live.run_in_thread(lambda progress: sum(progress(range(5), 5)), reported))
    assert items[-1] == 10
    assert set(items[:-1]) == {None}
    assert reported == [0, 20, 40, 60, 80, 100]


def test_a_run_has_one_thread_from_its_first_step_on():
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)

    def work(progress):
        for _ in progress(range(3), 3):
            seen.append(torch.get_num_threads())

    try:
        running = live.Live(lambda: None, lambda: None, lambda sentence: None)
        running.begin(lambda: live.Run(live.run_in_thread(work, [0.0])))
        while running.advance(1.0):
            pass
        assert (seen, torch.get_num_threads()) == ([1, 1, 1], 2)
    finally:
        torch.set_num_threads(before)


def test_a_function_in_a_thread_waits_and_ends_when_it_is_closed():
    steps = []

    def work(progress):
        for number in progress(range(1000), 1000):
            steps.append(number)

    running = live.run_in_thread(work, [0.0])
    while len(steps) < 2:
        next(running)
    assert count_threads() == 1
    running.close()
    assert count_threads() == 0
    assert len(steps) < 10


def test_an_error_in_a_thread_is_raised_in_place_of_the_result():
    def work(progress):
        raise ValueError("depth is 0")

    with pytest.raises(ValueError, match="depth is 0"):
        list(live.run_in_thread(work, [0.0]))
