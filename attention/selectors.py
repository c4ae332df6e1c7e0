"""Every selector that a plan can name: a new one is a file of its own and a name here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .dense import Dense
from .skip import Skip
from .stripe import Stripe
from .window import Window

SELECTORS = {"dense": Dense, "window": Window, "stripe": Stripe, "skip": Skip}

AnySelector = Annotated[Dense | Window | Stripe | Skip, Field(discriminator="name")]
