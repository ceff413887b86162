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
    draft: Annotated[
        str | None,
        typer.Option(help="A smaller run or model of the same tokenizer, which guesses tokens; with speculate=4."),
    ] = None,
    quantise: Annotated[
        str | None, typer.Option(help="fp8: weights of 8 bits, half the memory of bf16 (Hopper, Ada or later).")
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(help="Serve embeddings: the mean of the hidden states, or the last one (mean, last).")
    ] = None,
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

        treadle serve models/Qwen3-8B speculate=4 --draft models/Qwen3-0.6B
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"treadle serve needs {error.name}; install it: pip install 'treadle[serve]'") from None
    from treadle.api import find_model
    from treadle.config import resolve
    from treadle.data.tokenizer import Tokenizer
    from treadle.inference.engine import EngineConfig
    from treadle.inference.load import tokenizer_folder
    from treadle.inference.process import EngineProcess

    if pooling not in (None, "mean", "last"):
        raise ConfigError(f"--pooling: '{pooling}' is unknown; try mean or last")
    if quantise not in (None, "fp8"):
        raise ConfigError(f"--quantise: '{quantise}' is unknown; try fp8")
    folder = find_model(model, root)
    config = resolve(EngineConfig, {}, overrides or [])
    place = tokenizer_folder(folder)
    tokenizer = Tokenizer.load(place) if (place / "tokenizer.json").is_file() else None
    chat = chat_template(template, folder)
    guesses = None if draft is None else find_model(draft, root)
    engine = EngineProcess(partial(make_engine, folder, config, device, dtype, list(imports or []), guesses, quantise))
    try:
        _listen(engine, name or folder.resolve().name, tokenizer, chat, (host, port), key, waiting, pooling)
    finally:
        engine.stop()


def make_engine(
    folder: Path,
    config: Any,
    device: str,
    dtype: str,
    imports: list[str],
    draft: Path | None = None,
    quantise: str | None = None,
) -> "Engine":
    """The engine of a model folder, and of the folder of a model that guesses; in its own process."""
    from treadle.api import load
    from treadle.inference import quantised
    from treadle.inference.engine import Engine

    options: dict[str, Any] = {"device": device, "dtype": dtype_named(dtype), "imports": imports}
    loaded, tokenizer = load(folder, **options)
    if quantise is not None:
        quantised.quantise(loaded)
    if draft is None:
        return Engine(loaded, config, tokenizer=tokenizer)
    guesses, other = load(draft, **options)
    if tokenizer is not None and (other is None or other.fingerprint != tokenizer.fingerprint):
        raise ConfigError(f"--draft: {draft} has another tokenizer than {folder}; take a model of the same one")
    return Engine(loaded, config, tokenizer=tokenizer, draft=guesses)


def _listen(engine: Any, name: str, tokenizer: Any, chat: Any, address: tuple[str, int], *limits: Any) -> None:
    """limits: the rest of `Serving`, in its order."""
    import asyncio

    import uvicorn

    from treadle.inference.answer import Serving
    from treadle.inference.server import make_app

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
        serving = Serving(name, engine, tokenizer, chat, length, *limits)
        options: dict[str, Any] = {"log_level": "warning", "timeout_graceful_shutdown": 600}
        server = Server(uvicorn.Config(make_app(serving), *address, **options))
        server.serving = serving
        await server.serve()

    asyncio.run(run())
