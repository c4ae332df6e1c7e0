"""`ziggurat app`: the app in a browser."""

from __future__ import annotations

import os
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .console import Debug, note, quiet_libraries, warn


def app(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="What pages may choose: embedded, a folder, a Hub id. May be repeated.", show_default="shapes"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where everything that is made is kept.")] = Path("outputs/app"),
    host: Annotated[str, typer.Option(help="The address to serve on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to serve on.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Also through Gradio's public tunnel: an address on the internet.")
    ] = False,
    auth: Annotated[
        list[str] | None,
        typer.Option(
            metavar="USER:PASSWORD", help="Ask for a name and a password. May be repeated.", show_default=False
        ),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="cpu, cuda, cuda:1, ... May be repeated: one job runs on each.", show_default="a GPU if any"),
    ] = None,
    waiting: Annotated[int, typer.Option(min=1, help="The most jobs that may wait.")] = 16,
    dtype: Annotated[str, typer.Option(help="auto (fastest on this chip), fp32, bf16 or fp16.")] = "auto",
    offload: Annotated[
        str | None, typer.Option(help="model, sequential or group: for weights larger than the GPU.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Open the app in a browser: generate, look into plans, search for one, find what was made.

    Example: ziggurat app --port 8000
    """
    users = [_user(text) for text in auth or ()]
    if find_spec("gradio") is None:
        raise ValueError("the app needs Gradio, which is not installed: pip install 'ziggurat[app]'")
    # Read by Gradio when it is imported: no telemetry, and uploads stay in the output folder.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(out.expanduser().resolve() / "uploads")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    quiet_libraries()
    from ..pipelines.loading import default_device, dtype_of
    from .studio.pages.site import serve
    from .studio.studio import Studio

    devices = device or [default_device()]
    dtype_of(dtype, devices[0])
    studio = Studio(out, model or ["shapes"], devices, dtype=dtype, offload=offload, most=waiting)
    page, address = serve(studio, host=host, port=port, share=share, auth=users or None)
    if not users and (share or host not in ("127.0.0.1", "localhost", "::1")):
        warn("others can reach this app and no password is asked for: --auth USER:PASSWORD asks for one")
    print(f"Ziggurat is at {address} (Ctrl-C ends it); what it makes is kept in {studio.store.folder}", flush=True)
    try:
        threading.Event().wait()
    finally:
        note("ending: what runs is stopped, what waits is kept for the next start")
        studio.queue.close()
        page.close(verbose=False)


def _user(text: str) -> tuple[str, str]:
    name, found, password = text.partition(":")
    if not found or not name or not password:
        raise typer.BadParameter("give a name and a password as USER:PASSWORD", param_hint="--auth")
    return name, password
