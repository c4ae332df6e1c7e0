"""Who makes a batch's items: this process, others of this machine, those of a launcher, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

from ..loading import default_device, dtype_of
from .items import Item
from .make import Job, Maker, Outcome


class Engine(Protocol):
    """Makes items in any order."""

    workers: int

    def dtype(self, asked: str | None) -> str:
        """The dtype that the workers will run in, by torch's name. Raises ValueError for one that does not exist."""
        ...

    def follow(self) -> bool:
        """Whether another process leads; then this one has now done its part."""
        ...

    def run(self, job: Job, items: Sequence[Item]) -> Generator[Outcome, None, None]:
        """The outcome of each item, as it comes; raises what keeps workers from starting at all.

        Closing it early ends every worker that it started.
        """
        ...

    def dismiss(self) -> None:
        """Nothing will be run."""
        ...


class Alone:
    """What an engine does that has neither leader nor followers."""

    def follow(self) -> bool:
        return False

    def dismiss(self) -> None:
        pass


class Inline(Alone):
    """One device, in this process."""

    workers = 1

    def __init__(self, device: str | None = None):
        self.device = device

    def dtype(self, asked: str | None) -> str:
        return dtype_name(asked, self.device)

    def run(self, job: Job, items: Sequence[Item]) -> Generator[Outcome, None, None]:
        if not items:
            return
        maker = Maker(job, self.device)
        try:
            for item in items:
                yield maker.make(item)
        finally:
            maker.close()


def dtype_name(asked: str | None, device: str | None) -> str:
    """The dtype for a device, by torch's name.

    Raises ValueError for one that does not exist.
    """
    return str(dtype_of(asked, device or default_device())).removeprefix("torch.")


def choose_engine(device: str | None, devices: Sequence[str], ray: str | None, workers: int | None) -> Engine:
    """The engine that a batch's options ask for.

    Raises ValueError for options that do not go together, ImportError where Ray is not installed.
    """
    from .launched import Launched, is_launched

    given = [name for name, value in (("device", device), ("devices", devices), ("ray", ray)) if value]
    if len(given) > 1 and given != ["device", "ray"]:
        raise ValueError(f"{' and '.join(given)} can't be given together: take one")
    if workers is not None and (ray is None or workers < 1):
        raise ValueError("workers is the number of Ray's actors, at least 1: give it with ray")
    if ray is not None:
        from .cluster import Cluster

        return Cluster(ray, workers=workers, device=device)
    if devices:
        from .processes import Processes

        return Processes([f"cuda:{name}" if name.isdigit() else name for name in devices])
    return Launched(device) if is_launched() else Inline(device)
