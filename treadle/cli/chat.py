"""`treadle chat`: a conversation with a model, in the terminal."""

from typing import Annotated, Any

import typer

from treadle.cli._options import RUNS, Device, Imports, Model, Root, Temperature, Template, chat_template
from treadle.errors import DataError


def chat(
    model: Model = "latest",
    system: Annotated[str, typer.Option("--system", help="What the model is told before the conversation.")] = "",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Length of an answer.")] = 512,
    temperature: Temperature = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Keep the likeliest tokens of this probability.")
    ] = 0.95,
    template: Template = None,
    device: Device = "auto",
    imports: Imports = None,
    root: Root = RUNS,
) -> None:
    """Talk with a model that was trained on conversations. An empty line or Ctrl-D ends it; Ctrl-C ends an answer.

    What was said before is kept in the cache, and not computed again.
    """
    import treadle
    from treadle.api import find_model
    from treadle.inference.engine import Engine, EngineConfig
    from treadle.inference.request import Sampling

    folder = find_model(model, root)
    written = chat_template(template, folder)
    loaded, tokenizer = treadle.load(folder, device=device, imports=imports or [])
    if tokenizer is None or written is None:
        raise DataError(f"{folder}: its tokenizer has no chat template; give one with --chat-template FILE")
    engine = Engine(loaded, EngineConfig(slots=1, page=16), eos=tokenizer.eos_id)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            said = typer.prompt(">", prompt_suffix=" ", default="", show_default=False)
        except typer.Abort:
            break
        if not said:
            break
        messages.append({"role": "user", "content": said})
        prompt = written.encode(tokenizer, messages)
        room = engine.max_length - len(prompt)
        if room < 1:
            raise DataError(f"the conversation has {len(prompt)} tokens, more than max_length={engine.max_length}")
        options = {"temperature": temperature, "top_p": top_p, "max_tokens": min(max_new_tokens, room)}
        messages.append({"role": "assistant", "content": _answer(engine, tokenizer, prompt, Sampling(**options))})


def _answer(engine: Any, tokenizer: Any, prompt: list[int], sampling: Any) -> str:
    from treadle.inference.text_stream import TextStream

    stream, request = TextStream(tokenizer), engine.add(prompt, sampling)
    try:
        while engine.busy:
            for _, token in engine.step():
                if token not in request.ends:
                    typer.echo(stream.push(token), nl=False)
    except KeyboardInterrupt:
        engine.abort(request)
        while engine.busy:
            engine.step()
    typer.echo(stream.end())
    return stream.text
