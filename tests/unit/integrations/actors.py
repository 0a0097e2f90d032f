"""Stand-ins for the Ray actors that trainers' adapters talk to."""

from __future__ import annotations

from typing import Any

from aseer.errors import WeightUpdateError


class Call:
    """A method of a Ray actor."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        return Answer(self._method(*args, **kwargs))


class Answer:
    """What a call returns: Ray gets its value, and so does who awaits it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Any:
        yield from ()
        return self.value


class Target:
    """Takes what is sent, or refuses the second tensor."""

    def __init__(self, *, refuses: bool) -> None:
        self.sent: list[str] = []
        self._refuses = refuses

    async def send_async(self, pairs: Any) -> None:
        async for name, _ in pairs:
            if self._refuses and self.sent:
                raise WeightUpdateError("no such tensor")
            self.sent.append(name)


class Actor:
    """Has an engine's weight updates, and notes other calls by their names."""

    def __init__(self, *noted: str, refuses: bool = False) -> None:
        self.told: list[Any] = []
        self.target = Target(refuses=refuses)
        self.begin_update = Call(lambda: self.target)
        for name in ("start", "finish_update", "abandon_update", *noted):
            setattr(self, name, Call(self._teller(name)))

    def _teller(self, name: str) -> Any:
        return lambda *args: self.told.append((name, *args))
