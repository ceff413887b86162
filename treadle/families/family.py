"""A family of published models as data: how its `config.json` is a spec, and how its tensors are named.

One file of this package declares one family. Its rules work in both directions, so that what is written is what would
be read: `Family.config` reads its own result again and refuses a model that would come back different.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

from treadle.config import diff, resolve, to_dict
from treadle.config.base import nearest
from treadle.errors import ConfigError
from treadle.families.fold import fold
from treadle.families.layouts import Layout
from treadle.families.rules import Document, Mismatch, Rule
from treadle.nn.transformer import TransformerConfig

# Keys that say nothing about what a model computes: who wrote it, how it was trained, how it is sampled from. So do
# all that begin with an underscore and have no rule.
NEUTRAL = frozenset(
    [
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "keys_to_ignore_at_inference",
        "label2id",
        "model_type",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "quantization_config",
        "resid_pdrop",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "task_specific_params",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "use_cache",
        "attn_pdrop",
        "classifier_dropout",
        "embedding_dropout",
        "residual_dropout",
        "dropout",
        "tokenizer_class",
        "unsloth_fixed",
        "unsloth_version",
    ]
)
# What a spec says about training alone, or about how to compute; a config.json has no word for it.
UNSAID = frozenset({"init", "compute", "balance_loss", "z_loss", "repeat", "multi_token"})
# Of several families that can say a model, the first is taken: the plain ones before those that vary them.
ORDER = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "phi3",
    "smollm3",
    "granite",
    "olmo",
    "olmo2",
    "olmoe",
    "stablelm",
    "gpt2",
    "gpt_neox",
    "falcon",
    "bloom",
    "mpt",
    "opt",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
]
# What a rule may raise at a value of a form that it does not expect.
UNEXPECTED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
DEEPEST = 10_000  # layers; more is a mistake


class Watched(Mapping[str, Any]):
    """A config.json that remembers which of its keys were looked at, for the error if they do not go together."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.seen: dict[str, None] = {}

    def __getitem__(self, key: str) -> Any:
        value = self.config[key]
        self.seen[key] = None
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.config)

    def __len__(self) -> int:
        return len(self.config)


@dataclass(frozen=True, eq=False)
class Family:
    """model, layer: the parts of the spec that all members share, as plain data; the rules fill in the rest.

    depth, depth_also: the key that counts the layers, and other names that it has had.
    tensors: from our names to theirs, `*` for the layer: of a parameter with its name, or of a module, whose
        parameters then keep their last word (`weight`, `bias`). See `treadle.families.layouts`.
    prefix: that a checkpoint of the bare model, without its head, leaves out.
    optional: patterns (re.fullmatch) of tensors that are no weights of ours; `{depth}` in them is the number of layers.
    same_as: further `model_type`s that are read as this one.
    Making one registers it.
    """

    model_type: str
    architecture: str
    layer: Mapping[str, Any]
    rules: Sequence[Rule]
    tensors: Mapping[str, "str | Layout"]
    model: Mapping[str, Any] = field(default_factory=dict)
    depth: str = "num_hidden_layers"
    depth_also: Sequence[str] = ()
    prefix: str = "model."
    optional: Sequence[str] = ()
    same_as: Sequence[str] = ()

    registry: ClassVar[dict[str, "Family"]] = {}

    def __post_init__(self) -> None:
        for name in (self.model_type, *self.same_as):
            self.registry[name] = self

    def spec(self, config: Mapping[str, Any]) -> TransformerConfig:
        """The spec that a config.json describes. Raises ConfigError for what is not understood in it."""
        unknown = self.not_understood(config)
        if unknown:
            told = ", ".join(f"{key}={config[key]!r}{_near(key, self.known)}" for key in unknown)
            raise ConfigError(
                f"config.json: the family '{self.model_type}' does not understand {told}, and computing without it "
                f"could give other numbers. Add a rule for it to the family, or take the key out if it means nothing"
            )
        depth = next((config[name] for name in (self.depth, *self.depth_also) if name in config), None)
        if depth is None:
            raise ConfigError(f"config.json: lacks the number of layers, '{self.depth}'.{nearest(self.depth, config)}")
        if type(depth) is not int or not 0 < depth <= DEEPEST:
            raise ConfigError(f"config.json: {self.depth}: {depth!r} is no number of layers")
        layers = [deepcopy(dict(self.layer)) for _ in range(depth)]
        document = {**deepcopy(dict(self.model)), "layers": layers}
        for rule in self.rules:
            watched = Watched(config)
            try:
                rule.read(watched, document)
            except UNEXPECTED as error:
                told = ", ".join(f"{name}={config[name]!r}" for name in (watched.seen or rule.names) if name in config)
                raise ConfigError(
                    f"config.json: {told or 'values'} of a form that the family '{self.model_type}' does not expect "
                    f"({type(error).__name__}: {error})"
                ) from error
        return resolve(TransformerConfig, {**document, "layers": fold(document["layers"])})

    @property
    def known(self) -> set[str]:
        """The keys that are answered for."""
        return {*NEUTRAL, self.depth, *self.depth_also, *(name for rule in self.rules for name in rule.names)}

    def not_understood(self, config: Mapping[str, Any]) -> list[str]:
        """Keys that no rule answers for, unless they are switched off or say nothing about what is computed."""
        known = self.known
        off: tuple[Any, ...] = (None, False, 0, "", [], {})
        return [key for key, value in config.items() if key not in known and key[:1] != "_" and value not in off]

    def config(self, spec: TransformerConfig) -> dict[str, Any]:
        """The config.json of a spec. Raises ConfigError that lists whatever this family has no word for."""
        document = unrolled(spec)
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            self.depth: len(document["layers"]),
        }
        try:
            self._compare_mixers(document)
            for rule in self.rules:
                rule.write(document, config)
            again = unrolled(self.spec(config))
        except Mismatch as error:
            raise ConfigError(f"this model is no '{self.model_type}': {error}") from None
        except ConfigError as error:
            raise ConfigError(f"this model is no '{self.model_type}': {error}") from error
        except (*UNEXPECTED, StopIteration) as error:
            raise ConfigError(f"this model is no '{self.model_type}', which has no word for {error}") from error
        differences = diff(document, again)
        if differences:
            told = "\n".join(f"  {key}: {ours!r} here, {theirs!r} there" for key, ours, theirs in differences[:12])
            raise ConfigError(f"this model is no '{self.model_type}', which could not say all of it:\n{told}")
        return config

    def _compare_mixers(self, document: Document) -> None:
        wanted = self.layer["mixer"]["kind"]
        for i, layer in enumerate(document["layers"]):
            kind = layer.get("mixer", {}).get("kind")
            if kind != wanted:
                raise Mismatch(f"layers[{i}].mixer is of the kind '{kind}', where this family has '{wanted}'")


def _near(name: str, names: Iterable[str]) -> str:
    hint = nearest(name, names)
    return f" ({hint.strip()})" if hint.startswith(" Did you mean") else ""


def find(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises ConfigError that tells the nearest, and what that would not understand."""
    name = config.get("model_type")
    families = Family.registry
    if isinstance(name, str) and name in families:
        return families[name]
    if isinstance(config.get("text_config"), Mapping):
        raise ConfigError(
            f"config.json: model_type: '{name}' reads more than text, and only models of text alone are read here. "
            "Save its language model by itself: in transformers, `model.model.language_model.save_pretrained(folder)`"
        )
    closest = min(families.values(), key=lambda family: len(family.not_understood(config)))
    unknown = closest.not_understood(config)
    told = f"does not understand: {', '.join(unknown)}" if unknown else "understands all its keys: try that model_type"
    raise ConfigError(
        f"config.json: model_type: unknown family {name!r}.{nearest(str(name), families)} By its keys "
        f"'{closest.model_type}' is closest; it {told}. A family is one file: docs/families.md shows how to add one"
    )


def families() -> list[Family]:
    """Every family, once each, in ORDER; one's own come last."""
    rank = {name: i for i, name in enumerate(ORDER)}
    known = dict.fromkeys(Family.registry.values())
    return sorted(known, key=lambda family: rank.get(family.model_type, len(rank)))


def fitting(spec: TransformerConfig) -> list[Family]:
    """The families that can say all of a spec."""
    found = []
    for family in families():
        try:
            family.config(spec)
        except ConfigError:
            continue
        found.append(family)
    return found


def unrolled(spec: TransformerConfig) -> Document:
    """A spec as plain data in one form: layers one by one, defaults worked out, nothing about training."""
    plain = to_dict(spec)
    plain["layers"] = [to_dict(layer) for layer in spec.expand()]
    for layer in plain["layers"]:
        mixer = layer.get("mixer", {})
        if mixer.get("kind") == "attention":
            mixer["kv_heads"] = mixer["kv_heads"] or mixer["heads"]
            mixer["head_dim"] = mixer["head_dim"] or spec.dim // mixer["heads"]
            mixer["scale"] = mixer["scale"] or mixer["head_dim"] ** -0.5
        if mixer.get("kind") == "latent_attention":
            mixer["scale"] = mixer["scale"] or (mixer["nope_dim"] + mixer["rope_dim"]) ** -0.5
    said: Document = _without(plain)
    return said


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        # A balancing bias is a tensor, its step belongs to training.
        kept = {key: _without(item) for key, item in value.items() if key not in UNSAID}
        return {key: item if key != "balance_bias" else item is not None for key, item in kept.items()}
    return [_without(item) for item in value] if isinstance(value, list) else value
