"""The two base classes of every configuration: `Config`, and `Kind` for families told apart by their `kind`."""

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from treadle.errors import ConfigError


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the closest known name, else ' Known: a, b, c.'; empty if nothing is known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(names)}." if names else ""


def key_error(key: str, message: str) -> ValidationError:
    """An error that a `model_validator(mode="after")` raises about one of its own keys.

    `raise key_error("kv_heads", f"{self.kv_heads} does not divide heads={self.heads}; try 1, 2, 4")` is reported at
    `model.layers[0].mixer.kv_heads`, together with every other problem of the recipe. `key` may be dotted, with list
    indices as numbers: `layers.2.mixer`.
    """
    return key_errors([(key, message)])


def key_errors(problems: Iterable[tuple[str, str]]) -> ValidationError:
    """Several errors at once, as (key, message); see `key_error`."""
    details = [
        InitErrorDetails(
            type=PydanticCustomError("key_error", "{message}", {"message": message}),
            loc=tuple(int(part) if part.isdigit() else part for part in key.split(".")),
            input=None,
        )
        for key, message in problems
    ]
    return ValidationError.from_exception_data("configuration", details)


class Config(BaseModel):
    """A frozen, typed part of a recipe. Unknown keys are refused; a string below a field is its documentation."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        serialize_by_alias=True,
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",  # inf stays inf; the default would save it as null
    )


class Kind(Config):
    """Base of a family: subclasses name themselves by `kind: Literal["name"]`, and YAML picks one by that name.

    A field typed with the family (`mixer: MixerConfig`) accepts `{kind: attention, ...}`, or the bare name for all
    defaults. Defining a subclass is all it takes to register it.
    """

    _family: ClassVar[dict[str, type["Kind"]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if Kind in cls.__bases__:
            cls._family = {}  # a new family
        if "kind" not in cls.model_fields:
            return
        (name,) = get_args(cls.model_fields["kind"].annotation)
        taken = cls._family.get(name)
        # The same class may be defined again (a notebook cell, a reloaded module); another one is a clash.
        if taken and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(
                f"{cls.__module__}.{cls.__qualname__}: kind '{name}' is already taken by "
                f"{taken.__module__}.{taken.__qualname__}; give it its own `kind: Literal[...]`"
            )
        cls._family[name] = cls

    @classmethod
    def kinds(cls) -> dict[str, type["Kind"]]:
        """Every registered member of this family that is a subclass of this class, by name."""
        return {name: member for name, member in cls._family.items() if issubclass(member, cls)}

    @model_validator(mode="wrap")
    @classmethod
    def _dispatch_on_kind(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if "kind" in cls.model_fields or isinstance(data, Kind):
            return handler({"kind": data} if isinstance(data, str) else data)
        if isinstance(data, str):
            data = {"kind": data}
        kinds = cls.kinds()
        if not isinstance(data, dict) or "kind" not in data:
            known = ", ".join(sorted(kinds))
            raise PydanticCustomError("missing_kind", "needs a `kind`, one of: {known}", {"known": known})
        name = str(data["kind"])
        if name not in kinds:
            hint = nearest(name, kinds)
            raise PydanticCustomError("unknown_kind", "unknown kind '{kind}'.{hint}", {"kind": name, "hint": hint})
        return kinds[name].model_validate(data)  # type: ignore[return-value]
