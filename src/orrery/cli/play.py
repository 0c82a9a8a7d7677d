"""`orrery play`: a person drives the tabletop's robot in a page, the world model beside MuJoCo."""

from typing import Annotated

import typer

from orrery.cli.options import Device


def run(
    model: Annotated[str, typer.Option(help="a model of the tabletop: a name from `orrery models`, or its folder")] = (
        "tabletop"
    ),
    host: Annotated[str, typer.Option(help="whom to listen to; 0.0.0.0 lets the whole network in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="of the page; 0 for any that is free")] = 8008,
    seed: Annotated[int, typer.Option(help="what the page begins with")] = 0,
    steps: Annotated[int | None, typer.Option(help="of the solver", show_default="the model's")] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="open the page")] = True,
    truth: Annotated[bool, typer.Option("--truth/--no-truth", help="MuJoCo beside the model")] = True,
    device: Device = None,
) -> None:
    """Drive the tabletop's robot in a page of this machine, frame by frame: every picture on the left is drawn by the
    world model, the ones on the right by MuJoCo, told the same actions. Keys, mouse or touch; Ctrl-C ends it.

    Example: orrery play
    """
    import threading
    import webbrowser

    from orrery.cli.options import check_name, load_world
    from orrery.env.optional import check_packages
    from orrery.errors import InputError

    check_packages()
    check_name(model)
    from orrery.env.game import HIGHEST_SEED
    from orrery.env.play import Table, address_of, listen, make_server

    if not 0 <= seed <= HIGHEST_SEED:
        raise InputError(f"--seed is {seed}; allowed is 0 to {HIGHEST_SEED}")
    with listen(host, port) as listening:
        table = Table(load_world(model, device, None), truth, steps, seed)
        server, address = make_server(table), address_of(listening)
        both = "the model and MuJoCo" if table.truth else "the model"
        typer.echo(f"{table.world}\na third of a second of the world takes {both} {table.pace:.2f} s")
        typer.echo(f"\n  {address}\n\nCtrl-C ends it.")
        if browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            typer.echo("\nstopped")
