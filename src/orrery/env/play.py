"""The server of `orrery play`: a local page and one websocket a tab, each with a game of its own.

What the page says is JSON text (`Begin`, `Act`, `Goal`, `Save`), or the bytes of a picture to begin with. What it is
told: JSON text (`hello`, `error`), and pieces of the world as binary: the length of a JSON header (4 bytes, little
endian), the header, and the frames' RGB bytes, world after world in the header's order. The page asks for each step, so
that an action is read as late as it can be.
"""

import asyncio
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from orrery.env.cells import SIZE, SUCCESS
from orrery.env.game import HIGHEST_SEED, Game, Piece, shorten
from orrery.env.optional import check_packages
from orrery.errors import InputError, OrreryError, note, one_line
from orrery.sim.render import import_mujoco
from orrery.sim.simulate import FPS
from orrery.sim.tabletop import HELD
from orrery.world import World

if TYPE_CHECKING:
    from fastapi import FastAPI, WebSocket

PAGE = Path(__file__).with_name("page")
MOST_GAMES = 8
FILM_SCALE = 4
LARGEST = 16 * 2**20  # bytes of a picture
POLICY = "default-src 'self'; img-src 'self' blob: data:; connect-src 'self' ws: wss:"
Number = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Result = TypeVar("Result")


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Begin(_Message):
    """Begin anew."""

    type: Literal["begin"]
    seed: int = Field(ge=0, le=HIGHEST_SEED)


class Act(_Message):
    """One step. velocity: of the peg; or `to`: a place (x, y) in the picture of `world`, to which the peg goes no
    faster than `limit`."""

    type: Literal["act"]
    velocity: tuple[Number, Number] = (0.0, 0.0)
    to: tuple[Share, Share] | None = None
    world: str = "model"
    limit: Share = 1.0


class Goal(_Message):
    """Another goal from the next step on."""

    type: Literal["goal"]


class Save(_Message):
    """The video of what was seen."""

    type: Literal["save"]


MESSAGES: TypeAdapter[Begin | Act | Goal | Save] = TypeAdapter(
    Annotated[Begin | Act | Goal | Save, Field(discriminator="type")]
)


class Table:
    """What all games of a server share: the model, and the one thread in which everything is computed (an OpenGL
    context belongs to one thread, and one game is enough for two cores).

    Args:
        world: the model. truth: whether MuJoCo plays beside it, where it can. steps: of the model's solver. seed: what
            a page begins with.

    Raises:
        InputError: the model is no world of the tabletop.
    """

    def __init__(self, world: World, truth: bool = True, steps: int | None = None, seed: int = 0) -> None:
        self.world, self.steps, self.seed, self.games, self.notes = world, steps, seed, 0, ""
        Game(world, False, steps)  # refuses a wrong model before anything is drawn
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="orrery-play")
        self.truth = self.drawn = True
        try:
            self.thread.submit(self._try_mujoco).result()
        except Exception as error:  # OpenGL fails in as many ways as there are drivers
            self.truth = self.drawn = False
            self.notes = f"without MuJoCo: {one_line(error)}"
            note(self.notes)
        self.truth = self.truth and truth
        self.pace = self.thread.submit(self._warm_up).result()

    def _try_mujoco(self) -> None:
        """Draws one picture, in the thread that will draw all others."""
        import numpy as np

        from orrery.sim.tabletop import Tabletop, draw_layout

        import_mujoco()
        Tabletop(SIZE).reset(draw_layout(np.random.default_rng(0)))

    def _warm_up(self) -> float:
        """Seconds that one step takes when the first, slower ones are over."""
        game = self.game()
        game.begin(self.seed)
        return min(sum(game.step((0.0, 0.0)).header["seconds"].values()) for _ in range(3))

    def game(self) -> Game:
        """A new game."""
        return Game(self.world, self.truth, self.steps, self.drawn)

    def hello(self) -> dict[str, Any]:
        """What a page is told first."""
        return dict(
            type="hello", model=self.world.name, worlds=["model", "truth"] if self.truth else ["model"],
            note=self.notes, seed=self.seed, fps=FPS, held=HELD, size=SIZE, success=SUCCESS,
        )  # fmt: skip

    async def compute(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call in the thread; the server goes on meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, partial(function, *arguments))


def pack(header: dict[str, Any], *parts: bytes) -> bytes:
    """A binary message (see above)."""
    text = json.dumps(header, allow_nan=False).encode()
    return b"".join([len(text).to_bytes(4, "little"), text, *parts])


def pack_piece(piece: Piece) -> bytes:
    """A piece of the world as a binary message."""
    return pack(piece.header, *(frames.tobytes() for frames in piece.frames.values()))


class Session:
    """One tab: answers what its page says, in order; only a video is made beside the game."""

    def __init__(self, table: Table, connection: "WebSocket") -> None:
        self.table, self.connection, self.game = table, connection, table.game()
        self.saving: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until the page goes."""
        await self.connection.send_text(json.dumps(self.table.hello()))
        while True:
            message = await self.connection.receive()
            if message["type"] == "websocket.disconnect":
                break
            try:
                await self.answer(message.get("text"), message.get("bytes"))
            except OrreryError as error:
                await self.tell_error(str(error))

    async def answer(self, text: str | None, content: bytes | None) -> None:
        """One message.

        Raises:
            InputError: it cannot be obeyed.
        """
        if content is not None:
            if len(content) > LARGEST:
                raise InputError(f"the picture has {len(content)} bytes; allowed are {LARGEST}")
            return await self._send(self.game.begin, self.game.seed, content)
        said = parse(text or "")
        if isinstance(said, Begin):
            await self._send(self.game.begin, said.seed)
        elif isinstance(said, Act):
            await self._send(self._act, said)
        elif isinstance(said, Goal):
            await self.table.compute(self.game.another_goal)
        elif self.saving is None or self.saving.done():
            video = await self.table.compute(self.game.video)
            self.saving = asyncio.create_task(self._save(video))

    def _act(self, said: Act) -> Piece:
        velocity = said.velocity if said.to is None else self.game.velocity_to(said.to, said.world)
        return self.game.step(shorten(velocity, said.limit))

    async def _send(self, function: Callable[..., Piece], *arguments: Any) -> None:
        await self.connection.send_bytes(pack_piece(await self.table.compute(function, *arguments)))

    async def _save(self, video: Any) -> None:
        def encode() -> bytes:
            with tempfile.TemporaryDirectory() as folder:
                return Path(video.save(Path(folder) / "play.mp4", scale=FILM_SCALE)).read_bytes()

        try:
            content = await asyncio.to_thread(encode)
        except (OrreryError, OSError) as error:
            return await self.tell_error(f"the video could not be made: {error}")
        name = f"orrery-seed{self.game.seed}.mp4"
        await self.connection.send_bytes(pack({"type": "film", "name": name}, content))

    async def tell_error(self, message: str) -> None:
        """One line for the person."""
        await self.connection.send_text(json.dumps({"type": "error", "message": message}))


def parse(text: str) -> Begin | Act | Goal | Save:
    """What a page says.

    Raises:
        InputError: it is nothing that it may say.
    """
    try:
        return MESSAGES.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"message: {where + ': ' if where else ''}{first['msg']}") from None


def same_origin(origin: str | None, host: str | None) -> bool:
    """Whether a websocket comes from our own page: another site's page in the same browser may not drive."""
    return origin is None or urlsplit(origin).netloc == host


def make_app(table: Table) -> "FastAPI":
    """The page and its websocket, as an ASGI application."""
    check_packages()
    from fastapi import FastAPI, WebSocket
    from fastapi.responses import FileResponse
    from fastapi.staticfiles import StaticFiles
    from starlette.websockets import WebSocketDisconnect

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        table.thread.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="orrery play", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.get("/")
    async def page() -> FileResponse:
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        return FileResponse(PAGE / "index.html", headers=headers)

    @app.websocket("/game")
    async def game(connection: WebSocket) -> None:
        if not same_origin(connection.headers.get("origin"), connection.headers.get("host")):
            await connection.close(1008, "another site's page may not drive")
            return
        await connection.accept()
        if table.games >= MOST_GAMES:
            await connection.close(1013, f"{MOST_GAMES} pages play already; close one")
            return
        table.games += 1
        session = None
        try:
            session = Session(table, connection)
            await session.run()
        except WebSocketDisconnect:
            pass
        finally:
            table.games -= 1
            if session is not None and session.saving is not None:
                session.saving.cancel()

    app.mount("/page", StaticFiles(directory=PAGE))
    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: the port is taken or out of range, or the host is none of this machine's.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"port is {port}; allowed is 0 (any that is free) to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        why = error.strerror or str(error)
        raise InputError(f"cannot listen on {host} port {port}: {why.lower()}; choose another with --port") from error


def address_of(listening: socket.socket) -> str:
    """The page's address."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def make_server(table: Table) -> Any:
    """A uvicorn server of the page; `run(sockets=[...])` serves until Ctrl-C or `should_exit`."""
    app = make_app(table)
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, ws_per_message_deflate=False, ws_max_size=LARGEST + 1024,
        timeout_graceful_shutdown=1, lifespan="on",
    )  # fmt: skip
    return uvicorn.Server(config)
