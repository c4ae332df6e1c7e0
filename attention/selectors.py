"""Every selector that a plan can name: a new one is a file of its own and a name here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .dense import Dense
from .loglinear import LogLinear
from .precise import Precise
from .pyramid import Pyramid
from .skip import Skip
from .stripe import Stripe
from .topk import TopK
from .window import Window

SELECTORS = {
    "dense": Dense,
    "window": Window,
    "stripe": Stripe,
    "skip": Skip,
    "topk": TopK,
    "precise": Precise,
    "loglinear": LogLinear,
    "pyramid": Pyramid,
}

AnySelector = Annotated[
    Dense | Window | Stripe | Skip | TopK | Precise | LogLinear | Pyramid, Field(discriminator="name")
]
