"""`treadle serve`: a model behind an HTTP server."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treadle.cli._options import RUNS, Device, Imports, Model, Root, Template, chat_template, dtype_named
from treadle.errors import ConfigError

if TYPE_CHECKING:
    from treadle.inference.engine import Engine


def serve(
    model: Model = "latest",
    overrides: Annotated[list[str] | None, typer.Argument(help="Keys of the engine: slots=512 policy=latency")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: its folder's name.")] = None,
    key: Annotated[
        str | None, typer.Option("--api-key", envvar="TREADLE_API_KEY", help="Clients have to send it.")
    ] = None,
    template: Template = None,
    waiting: Annotated[int, typer.Option(min=1, help="Requests at the same time; more are answered 429.")] = 4096,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32; auto: bf16 on a GPU, else fp32.")] = "auto",
    imports: Imports = None,
    root: Root = RUNS,
) -> None:
    """Serve a model over HTTP, as OpenAI's API: completions, chats, models.

    Ctrl-C or SIGTERM: no further requests are taken, those that run are finished. See docs/serving.md.

    Examples:

        treadle serve latest --port 8000

        treadle serve models/Qwen3-0.6B policy=latency cache_tokens=200000 --api-key secret
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"treadle serve needs {error.name}; install it: pip install 'treadle[serve]'") from None
    from treadle.api import find_folder
    from treadle.config import resolve
    from treadle.data.tokenizer import Tokenizer
    from treadle.inference.engine import EngineConfig
    from treadle.inference.load import tokenizer_folder
    from treadle.inference.process import EngineProcess

    folder = find_folder(model, root)
    config = resolve(EngineConfig, {}, overrides or [])
    place = tokenizer_folder(folder)
    tokenizer = Tokenizer.load(place) if (place / "tokenizer.json").is_file() else None
    chat = chat_template(template, folder)
    engine = EngineProcess(partial(make_engine, folder, config, device, dtype, list(imports or [])))
    try:
        _listen(engine, name or folder.resolve().name, tokenizer, chat, (host, port), key, waiting)
    finally:
        engine.stop()


def make_engine(folder: Path, config: Any, device: str, dtype: str, imports: list[str]) -> "Engine":
    """The engine of a model folder; in its own process."""
    import treadle
    from treadle.inference.engine import Engine

    loaded, tokenizer = treadle.load(folder, device=device, dtype=dtype_named(dtype), imports=imports)
    return Engine(loaded, config, eos=None if tokenizer is None else tokenizer.eos_id)


def _listen(
    engine: Any, name: str, tokenizer: Any, chat: Any, address: tuple[str, int], key: str | None, waiting: int
) -> None:
    import asyncio

    import uvicorn

    from treadle.inference.server import Serving, make_app

    class Server(uvicorn.Server):
        """Takes no further requests once it is told to stop, and waits for those that run."""

        serving: Serving

        def handle_exit(self, sig: int, frame: Any) -> None:
            # Unlike uvicorn's own, it does not die of the signal in the end: it has done what it was asked to.
            self.serving.draining = True
            self.force_exit = self.should_exit
            self.should_exit = True

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            where = "http://{}:{}".format(*self.servers[0].sockets[0].getsockname()[:2])
            told = f"serving {name} at {where}/v1 ({self.serving.max_length:,} tokens a request); Ctrl-C to stop"
            typer.echo(told)

    async def run() -> None:
        typer.echo(f"loading {name} ...")
        length = await engine.start()
        serving = Serving(name, engine, tokenizer, chat, length, key, waiting)
        options: dict[str, Any] = {"log_level": "warning", "timeout_graceful_shutdown": 600}
        server = Server(uvicorn.Config(make_app(serving), *address, **options))
        server.serving = serving
        await server.serve()

    asyncio.run(run())
