"""Conversations as text: the chat template that a tokenizer's folder carries, as transformers renders it."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from treadle.data.tokenizer import CONFIG_FILE, Tokenizer, declared
from treadle.errors import DataError

FILE = "chat_template.jinja"


class ChatTemplate:
    """A Jinja template from messages to the text that the model continues. It cannot reach files or code."""

    def __init__(self, source: str, special: Mapping[str, str] | None = None):
        """special: names and texts of special tokens that the template may use (`bos_token`)."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        self.source, self.special = source, dict(special or {})
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise DataError(f"{FILE}: not a template: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None, **options: Any
    ) -> str:
        """The text of the messages and the beginning of an answer. Raises DataError for what the template refuses."""
        from jinja2 import TemplateError

        values = {**self.special, "tools": tools, "add_generation_prompt": True, **options}
        try:
            return self._template.render(messages=list(messages), **values)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(f"messages: the chat template refuses them: {error}") from error

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The same as token ids. Names of special tokens become those tokens, as the template means them."""
        text = self.render(messages, **options)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError("messages: half of a surrogate pair is no text; send UTF-8") from None
        return tokenizer.encode(text, special=True)

    @classmethod
    def load(cls, folder: Path | str) -> "ChatTemplate | None":
        """Of a Hugging Face folder; None if it has none. Raises DataError for one that cannot be read."""
        folder = Path(folder)
        special = {key: token for key in ("bos_token", "eos_token") if (token := declared(folder, key)) is not None}
        if (file := folder / FILE).is_file():
            return cls(file.read_text(), special)
        config = folder / CONFIG_FILE
        source = json.loads(config.read_text()).get("chat_template") if config.is_file() else None
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        return None if source is None else cls(source, special)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
