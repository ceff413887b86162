"""Rules that tie keys of a `config.json` to places of a model spec, each in both directions.

A *document* is a spec as plain data, its layers unrolled. `read` goes from config.json to the document, `write` back.
A path names places in it: `layers.*.mixer.heads` is in every layer, `layers.*.feedforward[moe].dim` in those whose
feed-forward is of the kind `moe`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from treadle.config.base import nearest
from treadle.errors import ConfigError

Document = dict[str, Any]
REQUIRED: Any = object()  # stands for a key without default
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


class Mismatch(Exception):
    """A spec has something that this family cannot say; the message says what."""


def places(document: Document, path: str) -> Iterator[tuple[Document, str]]:
    """(mapping, key) for each place that a path names; parts that are absent or of another kind are passed by."""
    *parents, key = path.split(".")
    found: list[Any] = [document]
    for parent in parents:
        if parent == "*":
            found = [item for items in found for item in items]
            continue
        name, _, kind = parent.removesuffix("]").partition("[")
        parts = [item.get(name) for item in found]
        found = [part for part in parts if part is not None and (not kind or part["kind"] == kind)]
    return ((mapping, key) for mapping in found)


class Rule:
    """`names`: the keys of config.json that the rule answers for."""

    names: tuple[str, ...] = ()

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        raise NotImplementedError

    def write(self, document: Document, config: dict[str, Any]) -> None:
        raise NotImplementedError


class Key(Rule):
    """One key and the places that hold the same value.

    default: of the key where a config.json leaves it out (transformers' own default); without one it must be there.
    to, back: from the key's value to the spec's, and back.
    also: other names that the key has had.
    """

    def __init__(
        self,
        name: str,
        *paths: str,
        default: Any = REQUIRED,
        to: Callable[[Any], Any] | None = None,
        back: Callable[[Any], Any] | None = None,
        also: tuple[str, ...] = (),
    ):
        self.names, self.paths, self.default, self.to, self.back = (name, *also), paths, default, to, back

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        value = next((config[name] for name in self.names if name in config), self.default)
        if value is REQUIRED:
            raise ConfigError(f"config.json: lacks the key '{self.names[0]}'.{nearest(self.names[0], config)}")
        if self.to is not None:
            value = self.to(value)
        for path in self.paths:
            for mapping, key in places(document, path):
                mapping[key] = value

    def write(self, document: Document, config: dict[str, Any]) -> None:
        found = [mapping[key] for mapping, key in places(document, self.paths[0]) if key in mapping]
        if found:
            config[self.names[0]] = found[0] if self.back is None else self.back(found[0])
        elif self.default is REQUIRED:
            raise Mismatch(f"it has no {self.paths[0]}")


class Activation(Key):
    """A key that names an activation."""

    def __init__(self, name: str, *paths: str, default: Any = REQUIRED):
        super().__init__(name, *paths, default=default, to=self._ours, back=self._theirs)
        self.name = name

    def _ours(self, value: str) -> str:
        if value not in ACTIVATIONS:
            raise ConfigError(f"config.json: {self.name}: unknown activation '{value}'.{nearest(value, ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def _theirs(self, value: str) -> str:
        names = [theirs for theirs, ours in ACTIVATIONS.items() if ours == value]
        if not names:
            raise Mismatch(f"transformers has no name for the activation '{value}'")
        return names[-1] if value == "gelu_tanh" and self.name == "hidden_activation" else names[0]


class Fixed(Rule):
    """A key that must have one value, because nothing else has been built; absent means that value."""

    def __init__(self, name: str, value: Any):
        self.names, self.value = (name,), value

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        (name,) = self.names
        if config.get(name, self.value) != self.value:
            raise ConfigError(f"config.json: {name}: {config[name]!r} is not supported, only {self.value!r}")

    def write(self, document: Document, config: dict[str, Any]) -> None:
        config[self.names[0]] = self.value


class Width(Rule):
    """The feed-forward's width, four times the model's where the key is null or absent.

    name: the key; None: there is none, and the width is always that. said: written also where it is that.
    """

    PATH = "layers.*.feedforward.dim"

    def __init__(self, name: str | None, *, said: bool = True):
        self.name, self.said = name, said
        self.names = () if name is None else (name,)

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        width = config.get(self.name) if self.name else None
        for feedforward, key in places(document, self.PATH):
            feedforward[key] = 4 * document["dim"] if width is None else width

    def write(self, document: Document, config: dict[str, Any]) -> None:
        width = next((feedforward[key] for feedforward, key in places(document, self.PATH) if key in feedforward), None)
        if width is None:
            raise Mismatch(f"it has no {self.PATH}")
        if self.name is not None:
            config[self.name] = width if self.said or width != 4 * document["dim"] else None


class Inside(Rule):
    """Rules for the mapping that stands under one key."""

    def __init__(self, name: str, *rules: Rule):
        self.names, self.rules = (name,), rules

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        (name,) = self.names
        inner = config.get(name) or {}
        known = {key for rule in self.rules for key in rule.names}
        for key, value in inner.items():
            if key not in known and value:
                raise ConfigError(f"config.json: {name}.{key}: {value!r} is not understood.{nearest(key, known)}")
        for rule in self.rules:
            rule.read(inner, document)

    def write(self, document: Document, config: dict[str, Any]) -> None:
        inner: dict[str, Any] = {}
        for rule in self.rules:
            rule.write(document, inner)
        config[self.names[0]] = inner


class Windows(Rule):
    """Which layers see a window only: `layer_types` and `sliding_window`.

    default: the type of layer i where a config.json has no `layer_types`.
    """

    LOCAL, FULL = "sliding_attention", "full_attention"

    def __init__(
        self, default: Callable[[Mapping[str, Any], int], bool], *, window: int | None, names: tuple[str, ...] = ()
    ):
        """default: (config, layer) -> whether it is local. names: further keys that `default` looks at."""
        self.default, self.window = default, window
        self.names = ("layer_types", "sliding_window", *names)

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        window, types = config.get("sliding_window", self.window), config.get("layer_types")
        if types is not None and len(types) != len(document["layers"]):
            raise ConfigError(f"config.json: layer_types has {len(types)} entries for {len(document['layers'])} layers")
        for i, layer in enumerate(document["layers"]):
            if types is not None and types[i] not in (self.LOCAL, self.FULL):
                raise ConfigError(f"config.json: layer_types[{i}]: '{types[i]}'; known: {self.LOCAL}, {self.FULL}")
            local = self.default(config, i) if types is None else types[i] == self.LOCAL
            layer["mixer"]["window"] = window if local else None

    def write(self, document: Document, config: dict[str, Any]) -> None:
        windows = [layer["mixer"].get("window") for layer in document["layers"]]
        config["layer_types"] = [self.FULL if window is None else self.LOCAL for window in windows]
        config["sliding_window"] = next((window for window in windows if window is not None), None)


class Written(Rule):
    """A key that no model depends on, written because what transformers takes without it may not fit.

    Such as the number of a padding token, which a smaller vocabulary than the published one lacks.
    """

    def __init__(self, name: str, value: Any):
        self.names, self.value = (name,), value

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        pass

    def write(self, document: Document, config: dict[str, Any]) -> None:
        config[self.names[0]] = self.value


class Ignored(Rule):
    """Keys that are published and that no implementation has ever looked at."""

    def __init__(self, *names: str):
        self.names = names

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        pass

    def write(self, document: Document, config: dict[str, Any]) -> None:
        pass
