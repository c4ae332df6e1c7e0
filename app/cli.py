"""The command line: one verb, one function; torch is imported when a verb runs, so that help is quick."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .app_verb import app as app_verb
from .batch import batch
from .bench import app as bench
from .console import Debug, told
from .doctor import doctor
from .evaluate import evaluate
from .generate import generate
from .kernels import kernels
from .models import models
from .plan import app as plan
from .search import search
from .train import app as train

VERBS: dict[str, tuple[Any, str]] = {
    "generate": (generate, "Make a video, or an image, from a sentence."),
    "app": (app_verb, "All of it in a browser."),
    "batch": (batch, "Make a video or image of every row of a file."),
    "search": (search, "Find a plan for a model, and prove it."),
    "plan": (plan, "Look into plan files: show, validate, diff."),
    "evaluate": (evaluate, "Score the embedded model, dense and under a plan."),
    "bench": (bench, "Measure what methods and kernels are worth."),
    "train": (train, "Train the embedded model."),
    "models": (models, "List the transformers that a plan can run on."),
    "kernels": (kernels, "Show what the compiled GPU kernels use."),
    "doctor": (doctor, "Say what works on this machine, and what is missing."),
}
"""In the order of use; the lines fit a terminal of 80 columns."""


class InOrder(TyperGroup):
    """Verbs in the order of `VERBS`, whichever of them have verbs of their own."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)


app = typer.Typer(
    name="ziggurat", cls=InOrder, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich"
)
for name, (verb, line) in VERBS.items():
    if isinstance(verb, typer.Typer):
        app.add_typer(verb, name=name, short_help=line)
    else:
        app.command(name, short_help=line)(verb)


def _show_version(value: bool) -> None:
    if value:
        from .machine import version_lines

        for line in version_lines():
            print(line)
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Versions, devices and the kernel backend of each."
    ),
]


@app.callback(epilog="Example: ziggurat generate 'a large red circle moving left'")
def ziggurat(version: Version = False, debug: Debug = False) -> None:
    """Sparse attention plans for Hugging Face diffusers: video and image diffusion, faster, checked against dense."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 an error (one sentence on stderr), 2 wrong usage, 130 Ctrl-C."""
    with told():
        app(None if arguments is None else list(arguments), prog_name="ziggurat")
