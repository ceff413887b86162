"""The two base classes of every configuration: `Config`, and `Kind` for families told apart by their `kind`."""

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, model_validator
from pydantic_core import PydanticCustomError


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the closest known name, else ' Known: a, b, c.'; empty if nothing is known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(names)}." if names else ""


class Config(BaseModel):
    """A frozen, typed part of a recipe. Unknown keys are refused with the nearest known name."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, serialize_by_alias=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    hint = nearest(str(key), cls.model_fields)
                    raise PydanticCustomError("unknown_key", "unknown key '{key}'.{hint}", {"key": key, "hint": hint})
        return data


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
        if "kind" in cls.model_fields:
            (name,) = get_args(cls.model_fields["kind"].annotation)
            cls._family[name] = cls

    @classmethod
    def kinds(cls) -> dict[str, type["Kind"]]:
        """Every registered member of this family, by name."""
        return dict(cls._family)

    @model_validator(mode="wrap")
    @classmethod
    def _dispatch_on_kind(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if "kind" in cls.model_fields or isinstance(data, Kind):
            return handler({"kind": data} if isinstance(data, str) else data)
        if isinstance(data, str):
            data = {"kind": data}
        if not isinstance(data, dict) or "kind" not in data:
            known = ", ".join(sorted(cls._family))
            raise PydanticCustomError("missing_kind", "needs a `kind`, one of: {known}", {"known": known})
        chosen = cls._family.get(data["kind"])
        if chosen is None:
            hint = nearest(str(data["kind"]), cls._family)
            raise PydanticCustomError("unknown_kind", "unknown kind '{kind}'.{hint}", {"kind": data["kind"], "hint": hint})
        return chosen.model_validate(data)  # type: ignore[return-value]
