"""Define `s4g serve`: answer where photos were taken, over HTTP and on a page."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s4g_ray.cli.console import make_reporter
from s4g_ray.errors import InputError

if TYPE_CHECKING:
    from s4g_ray.serving.config import ServeConfig

LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    gallery: Annotated[str, typer.Argument(help="A gallery: a folder or s3://...")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="e.g. max_queue=128 max_photo_mb=10"),
    ] = None,
    port: Annotated[int, typer.Option(help="The port; 0: a free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0: reachable from elsewhere.")
    ] = "127.0.0.1",
    replicas: Annotated[
        str, typer.Option(metavar="N|MIN,MAX", help="Replicas; MIN,MAX: as many as needed.")
    ] = "1",
    token_env: Annotated[
        str | None,
        typer.Option(help="The environment variable with the token that requests must send."),
    ] = None,
) -> None:
    """Answer where photos were taken: POST /locate, and a page for people at /.

    Runs until Ctrl-C. Starts Ray on this machine, or uses the cluster of RAY_ADDRESS. Photos are
    held in memory until they are answered, and are never stored.
    """
    check_libraries()
    from s4g_ray.serving.config import make_config

    values: dict[str, Any] = {
        "gallery": gallery,
        "host": host,
        "port": port,
        "replicas": parse_replicas(replicas),
        "token_env": token_env,
    }
    config = make_config(values, settings or [])
    serve_as_configured(config)


def serve_as_configured(config: ServeConfig) -> None:
    """Serve until interrupted; show where."""
    from s4g_ray.serving.server import check_gallery, run_service

    reporter = make_reporter(as_json=False)

    def announce() -> None:
        reporter.line(f"opening {check_gallery(config.gallery)}")
        if config.host not in LOCAL and config.token_env is None:
            reporter.line(
                f"anyone who reaches port {config.port} may ask; --token-env NAME asks for a token"
            )

    run_service(
        config,
        on_open=announce,
        on_start=lambda address: reporter.line(f"serving at {address} (Ctrl-C stops)"),
    )
    reporter.line("stopped")


def check_libraries() -> None:
    """Raise InputError when a library of the service is not installed."""
    names = ("fastapi", "uvicorn", "python_multipart")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"serving needs {', '.join(missing)}: pip install 's4g-ray[serve]'")


def parse_replicas(text: str) -> int | tuple[int, int]:
    """Read N or MIN,MAX. Raises InputError."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    raise InputError(f"--replicas {text} is neither a number nor MIN,MAX, such as 1,4")
