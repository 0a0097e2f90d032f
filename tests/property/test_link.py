"""Whatever connections do, a link's messages arrive once and in order."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from aseer.transport.link import Link
from aseer.transport.memory import Faults, Wire

KINDS = ["put", "pump", "connect", "cut", "settle"]


class Ends:
    """Two links over wires with faults; `came` is what each has taken."""

    def __init__(self, seed: int, faults: Faults | None) -> None:
        self._rng = random.Random(seed)
        self._faults = faults
        window = self._rng.choice([40, 100, 10_000])
        self.links = [Link(3, window_bytes=window) for _ in range(2)]
        self.put: list[list[bytes]] = [[], []]
        self.came: list[list[bytes]] = [[], []]
        self._arrived: list[list[list[bytes]]] = [[], []]
        self._wires: list[Wire] = []
        self._make_wires()

    def do(self, kind: str, end: int) -> None:
        link = self.links[end]
        match kind:
            case "put":
                self.put[end].append(self._rng.randbytes(self._rng.randrange(30)))
                link.put(self.put[end][-1])
            case "pump":
                self._take(end)
                link.pump(lambda frames: self._send(end, frames))
            case "connect":
                self.connect(keeps=self._rng.random() < 0.5)
            case "cut":
                self._make_wires()
                for link in self.links:
                    link.close()
            case "settle":
                self._wires[end].settle()
        self.check()

    def connect(self, *, keeps: bool) -> None:
        """Anew; `keeps` lets what is on its way come later."""
        if not keeps:
            self._make_wires()
        self._send(0, self.links[0].hello(), always=True)

    def finish(self) -> None:
        """Over a connection without faults."""
        self._faults = None
        self.connect(keeps=False)
        for _ in range(4 + sum(map(len, self.put))):
            for end in range(2):
                self._take(end)
                self.links[end].pump(lambda f, e=end: self._send(e, f, always=True))  # type: ignore[misc]
        self.check()

    def check(self) -> None:
        for end in range(2):
            came, put = self.came[end], self.put[1 - end]
            assert came == put[: len(came)]

    def _make_wires(self) -> None:
        self._arrived = [[], []]
        self._wires = [Wire(self._arrived[1 - end].append) for end in range(2)]
        for wire in self._wires:
            wire.faults = self._faults

    def _send(self, end: int, frames: list[bytes], *, always: bool = False) -> bool:
        if not always and self._rng.random() < 0.2:
            return False
        self._wires[end].carry(frames)
        return True

    def _take(self, end: int) -> None:
        arrived, self._arrived[end][:] = list(self._arrived[end]), []
        for frames in arrived:
            message = self.links[end].take(frames)
            if message is not None:
                self.came[end].append(message)


@given(
    seed=st.integers(0, 2**32),
    chances=st.tuples(*[st.sampled_from([0.0, 0.1, 0.4])] * 3),
    steps=st.lists(
        st.tuples(st.sampled_from([*KINDS, "put", "pump", "pump"]), st.integers(0, 1)),
        max_size=80,
    ),
)
def test_all_arrives_once_and_in_order(
    seed: int, chances: tuple[float, ...], steps: list[tuple[str, int]]
) -> None:
    drop, repeat, delay = chances
    faults = Faults(random.Random(seed), drop=drop, repeat=repeat, delay=delay)
    ends = Ends(seed, faults)
    for kind, end in steps:
        ends.do(kind, end)
    ends.finish()
    assert [ends.came[1], ends.came[0]] == ends.put
    assert [link.num_waiting for link in ends.links] == [0, 0]
    assert not any(link.is_broken for link in ends.links)
