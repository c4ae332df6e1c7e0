"""The command line: one verb, one function; torch is imported when a verb runs, so that help is quick."""

from __future__ import annotations

from collections.abc import Sequence

import typer

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

app = typer.Typer(
    name="ziggurat", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
)
app.command()(generate)
app.command("app")(app_verb)
app.command()(batch)
app.command()(search)
app.command()(evaluate)
app.command()(models)
app.command()(kernels)
app.command()(doctor)
app.add_typer(plan, name="plan")
app.add_typer(train, name="train")
app.add_typer(bench, name="bench")


@app.callback()
def ziggurat(debug: Debug = False) -> None:
    """Sparse attention plans for Hugging Face diffusers: video and image diffusion, faster, checked against dense."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 an error (one sentence on stderr), 2 wrong usage, 130 Ctrl-C."""
    with told():
        app(None if arguments is None else list(arguments), prog_name="ziggurat")
