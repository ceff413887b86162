"""The rotary embedding in a `config.json`: `rope_parameters` (transformers 5), or `rope_theta`, `rope_scaling` and
`partial_rotary_factor` (before)."""

from collections.abc import Callable, Mapping
from typing import Any

from treadle.config.base import nearest
from treadle.errors import ConfigError
from treadle.families.rules import Document, Mismatch, Rule

# type there: (kind here, {key there: key here})
ORIGINAL = "original_max_position_embeddings"
SCALINGS: dict[str, tuple[str, dict[str, str]]] = {
    "linear": ("linear", {"factor": "factor"}),
    "dynamic": ("dynamic_ntk", {"factor": "factor"}),
    "llama3": (
        "llama3",
        {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            ORIGINAL: "original_length",
        },
    ),
    "yarn": (
        "yarn",
        {
            "factor": "factor",
            ORIGINAL: "original_length",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "truncate": "truncate",
            "attention_factor": "attention_factor",
            "mscale": "mscale",
            "mscale_all_dim": "mscale_all_dim",
        },
    ),
    "longrope": (
        "longrope",
        {
            "short_factor": "short_factor",
            "long_factor": "long_factor",
            "factor": "factor",
            ORIGINAL: "original_length",
            "attention_factor": "attention_factor",
        },
    ),
}


class Rope(Rule):
    """The rotary positions of every layer that has them, or of those that `where` picks.

    theta, partial: where the config.json says nothing; partial None: the family has no such key.
    layer_type: the parameters of these layers, where rope_parameters has several sets by type of layer.
    renamed: another name of a type (Phi-3 wrote `su` for longrope).
    legacy: the names of theta and partial before rope_parameters.
    default: the rope_parameters of a config.json that has none.
    """

    def __init__(
        self,
        *,
        theta: float = 10_000.0,
        partial: float | None = None,
        where: Callable[[Document], bool] = lambda layer: True,
        layer_type: str | None = None,
        renamed: Mapping[str, str] | None = None,
        legacy: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
        default: Mapping[str, Any] | None = None,
    ):
        self.theta, self.partial, self.where, self.layer_type = theta, partial, where, layer_type
        self.renamed, self.legacy, self.default = dict(renamed or {}), legacy, dict(default or {})
        self.names = ("rope_parameters", "rope_scaling", ORIGINAL, *legacy)

    def read(self, config: Mapping[str, Any], document: Document) -> None:
        parameters = self._parameters(config) or dict(self.default)
        name = str(parameters.pop("rope_type", None) or parameters.pop("type", None) or "default")
        parameters.pop("type", None)
        theta_name, partial_name = self.legacy
        position: dict[str, Any] = {"theta": parameters.pop("rope_theta", config.get(theta_name) or self.theta)}
        partial = parameters.pop("partial_rotary_factor", config.get(partial_name))
        if self.partial is not None:
            position["partial"] = self.partial if partial is None else partial
        elif partial not in (None, 1.0):
            raise ConfigError(f"config.json: {partial_name}: {partial}; this family rotates whole heads only")
        position["scaling"] = self._scaling(self.renamed.get(name, name), parameters, config)
        for layer in document["layers"]:
            if self.where(layer) and (layer["mixer"].get("position") or {}).get("kind") == "rope":
                layer["mixer"]["position"].update(position)

    def _parameters(self, config: Mapping[str, Any]) -> dict[str, Any]:
        parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if self.layer_type is not None:
            parameters = parameters.get(self.layer_type) or {}
        return dict(parameters)

    def _scaling(self, name: str, parameters: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
        if name == "default":
            return None
        if name not in SCALINGS:
            raise ConfigError(
                f"config.json: rope_parameters.rope_type: unknown type '{name}'.{nearest(name, SCALINGS)}"
            )
        kind, keys = SCALINGS[name]
        unknown = [
            key for key, value in parameters.items() if key not in keys and key != ORIGINAL and value is not None
        ]
        if unknown:
            raise ConfigError(
                f"config.json: rope_parameters: type '{name}' has no '{unknown[0]}'.{nearest(unknown[0], keys)}"
            )
        if ORIGINAL in keys:  # Phi-3's stands beside, and counts more
            beside = config.get(ORIGINAL)
            inside = parameters.get(ORIGINAL, config.get("max_position_embeddings"))
            parameters[ORIGINAL] = inside if beside is None else beside
        values = {keys[key]: value for key, value in parameters.items() if key in keys and value is not None}
        return {"kind": kind, **values}

    def write(self, document: Document, config: dict[str, Any]) -> None:
        positions = [layer["mixer"].get("position") for layer in document["layers"] if self.where(layer)]
        position = next((p for p in positions if p is not None), None)
        if position is None:
            return
        if position["kind"] != "rope":
            raise Mismatch(f"its positions are of the kind '{position['kind']}', not rope")
        parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": position["theta"]}
        if self.partial is not None:
            parameters["partial_rotary_factor"] = position["partial"]
        if (scaling := position["scaling"]) is not None:
            parameters |= self._their_scaling(scaling)
        if self.layer_type is not None:
            config.setdefault("rope_parameters", {})[self.layer_type] = parameters
            return
        config["rope_parameters"] = parameters
        self._write_legacy(parameters, config)

    def _their_scaling(self, scaling: dict[str, Any]) -> dict[str, Any]:
        name = next((name for name, (kind, _) in SCALINGS.items() if kind == scaling["kind"]), None)
        if name is None:
            raise Mismatch(f"transformers has no rope scaling of the kind '{scaling['kind']}'")
        keys = SCALINGS[name][1]
        values = {theirs: scaling[ours] for theirs, ours in keys.items() if scaling.get(ours) is not None}
        return {"rope_type": name, **values}

    def _write_legacy(self, parameters: dict[str, Any], config: dict[str, Any]) -> None:
        """The same once more in the words of transformers 4, for the readers that know no others."""
        theta_name, partial_name = self.legacy
        config[theta_name] = parameters["rope_theta"]
        if self.partial is not None:
            config[partial_name] = parameters["partial_rotary_factor"]
        rest = {k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}
        config["rope_scaling"] = None if rest == {"rope_type": "default"} else rest
        if ORIGINAL in rest:
            config[ORIGINAL] = rest[ORIGINAL]
