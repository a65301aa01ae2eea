"""`openmoe dashboard`: look at runs and jobs in a browser."""

from typing import Annotated

import typer

DEFAULT_PORT = 8421
DEFAULT_FOLDER = "openmoe-runs"


def dashboard(
    folders: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN_DIR_OR_FOLDER",
            help=f"Run directories, or folders of them, local or gs://; {DEFAULT_FOLDER} if not given. "
            "The runs of this machine's jobs are shown in any case.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = DEFAULT_PORT,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine only with the token.")
    ] = "127.0.0.1",
    no_token: Annotated[bool, typer.Option("--no-token", help="Let in everybody on this machine.")] = False,
) -> None:
    """Show runs and jobs in a browser, live."""
    from openmoe.platform import home
    from openmoe.platform.dashboard import server

    server.serve(
        folders or [DEFAULT_FOLDER],
        home=home.home(),
        host=host,
        port=port,
        with_token=not no_token,
        say=lambda line: print(line, flush=True),
    )
