from __future__ import annotations

from aseer.watch import WakingClock


class Source:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_between_readings_counts_up_to_the_longest_step():
    source = Source()
    clock = WakingClock(1.0, source)
    read = []
    for now in (100.5, 101.5, 500.0, 500.25):
        source.now = now
        read.append(clock.read())
    assert read == [0.5, 1.5, 2.5, 2.75]


def test_a_process_that_is_always_late_still_comes_to_an_end():
    source = Source()
    clock = WakingClock(1.0, source)
    for _ in range(60):
        source.now += 30.0
        clock.read()
    assert clock.read() == 60.0
