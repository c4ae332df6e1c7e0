"""Dealing items to workers that may die: one item in flight a worker, each item given out three times at most."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from .items import Item
from .make import Job, Maker, Outcome
from .rows import said

RETRIES = 2


@dataclass(frozen=True)
class Loaded:
    """A worker has its model, or an error why not."""

    error: str = ""


@dataclass(frozen=True)
class Died:
    """A worker is gone."""

    reason: str


Event = Loaded | Outcome | Died


class Seat(Protocol):
    """The place of one worker, who may be replaced."""

    def start(self) -> None:
        """Begin a worker; it will be heard to have loaded."""
        ...

    def give(self, item: Item) -> None:
        """Have the worker make an item; its outcome will be heard, or that it died."""
        ...

    def stop(self) -> None:
        """End the worker, whatever it does."""
        ...


class Worker:
    """What runs in the other process."""

    def __init__(self, job: Job, device: str, threads: int | None):
        self._arguments = (job, device, threads)
        self._maker: Maker | None = None

    def load(self) -> Loaded:
        try:
            self._maker = Maker(*self._arguments)
        except Exception as error:
            return Loaded(f"{self._arguments[1]}: {said(error)}")
        return Loaded()

    def make(self, item: Item) -> Outcome:
        assert self._maker is not None
        return self._maker.make(item)


S = TypeVar("S", bound=Seat)


def deal(
    seats: Sequence[S], hear: Callable[[list[S]], list[tuple[S, Event]]], items: Sequence[Item]
) -> Generator[Outcome, None, None]:
    """The outcome of each item; `hear` waits for what one or more of some seats has to say.

    A worker that dies is replaced, and its item given out again behind all others, up to `RETRIES` times: an item that
    kills its worker must not end the batch. Raises ValueError where a worker can't load, or dies of it each time.
    """
    waiting, attempts, deaths = deque(items), Counter[str](), Counter[int]()
    seats = seats[: len(items)]
    loading, idle = list(seats), list[S]()
    working: list[tuple[S, Item]] = []
    left = len(items)
    try:
        for seat in seats:
            seat.start()
        while left:
            for seat, event in hear([*loading, *(seat for seat, _ in working)]):
                item = next((item for place, item in working if place is seat), None)
                working = [pair for pair in working if pair[0] is not seat]
                loading = [place for place in loading if place is not seat]
                if isinstance(event, Loaded) and event.error:
                    raise ValueError(event.error)
                if isinstance(event, Outcome):
                    left -= 1
                    yield replace(event, attempts=attempts[event.name])
                if not isinstance(event, Died):
                    deaths[id(seat)] = 0
                    idle.append(seat)
                    continue
                seat.stop()
                if item is not None and attempts[item.name] <= RETRIES:
                    waiting.append(item)
                elif item is not None:
                    left -= 1
                    error = f"the worker died each time it was to make this, the last time so: {event.reason}"
                    yield Outcome(name=item.name, error=error, attempts=attempts[item.name])
                else:
                    deaths[id(seat)] += 1
                    if deaths[id(seat)] > RETRIES:
                        raise ValueError(
                            f"a worker died each time it loaded the model, the last time so: {event.reason}"
                        )
                seat.start()
                loading.append(seat)
            while waiting and idle:
                seat, item = idle.pop(), waiting.popleft()
                attempts[item.name] += 1
                working.append((seat, item))
                seat.give(item)
    finally:
        for seat in seats:
            seat.stop()
