"""Adapters in the file format of PEFT: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Names are those of the published model: a family says which rows of which tensor a part of a layer is, and an adapter
goes the same way. Where a family keeps several of our parts in one matrix (GPT-2's c_attn), their pairs stand in one of
the sum of their ranks, B in blocks; read back, each part gets its rows of B, and A whole.

I inputs, O outputs, R rank.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from treadle.errors import CheckpointError, ConfigError
from treadle.families.checkpoint import choose
from treadle.families.family import Family
from treadle.families.layouts import Piece
from treadle.families.tensors import pieces
from treadle.finetune.adapted import adapted
from treadle.finetune.attach import prepare
from treadle.finetune.config import FinetuneConfig
from treadle.nn.linear import GroupedLinear
from treadle.nn.store import build_meta
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.nn.weights import WeightsReader

CONFIG_FILE, TENSORS_FILE, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Keys of a LoRA config that change what is computed, with the values that we know; others are refused.
KNOWN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "modules_to_save": (None, []),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "lora_ga_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}


@dataclass
class Rows:
    """Where the outputs of a part of ours are in a tensor of theirs. transposed: it is stored inputs first."""

    module: str
    size: int
    path: str
    part: str
    theirs: Tensor
    transposed: bool


def save_peft(model: Transformer, folder: Path, *, family: str | None = None, base: str | None = None) -> Path:
    """Write the LoRA, DoRA or IA3 updates of a whole model. PiSSA becomes a plain LoRA of twice the rank, which is of
    the original weights, as everything that is written here. base: what PEFT is to load the model from.

    Raises ConfigError for what the format, or the family, has no word for.
    """
    chosen = choose(model.config, family)
    layers, tensors = dict(adapted(model)), dict[str, Tensor]()
    places = list(_places(chosen, model.config, layers))
    config: dict[str, Any] = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True}
    if any(row.transposed for row in places):
        config["fan_in_fan_out"] = True
    by_module: dict[str, list[Rows]] = defaultdict(list)
    for row in places:
        by_module[row.module].append(row)
    config["target_modules"] = list(by_module)
    kinds = {type(update).__name__ for layer in layers.values() for update in layer.updates.values()}
    if not layers or kinds - {"LoRA", "DoRA", "Scale"}:
        raise ConfigError(
            f"PEFT's format: {', '.join(sorted(kinds)) or 'nothing'}; it has lora, dora and ia3 of linear layers"
        )
    if kinds == {"Scale"}:
        inward = []
        for module, rows in by_module.items():
            tensors[f"{PREFIX}{module}.ia3_l"], inputs = _scales(rows, layers)
            inward += [module] * inputs
        config |= {"peft_type": "IA3", "feedforward_modules": inward}
    else:
        config |= {"peft_type": "LORA", "bias": "none", "use_dora": kinds == {"DoRA"}, "rank_pattern": {}}
        scales = {}
        for module, rows in by_module.items():
            found, rank, scale = _low_rank(rows, layers)
            tensors |= {f"{PREFIX}{module}.{name}": values for name, values in found.items()}
            config["rank_pattern"][module], scales[module] = rank, scale * rank
        config |= {"r": max(config["rank_pattern"].values()), "lora_dropout": 0.0, "alpha_pattern": scales}
        config["lora_alpha"] = max(scales.values())
    further = _further(model)
    if further:
        raise ConfigError(
            f"PEFT's format: {further[0]} was trained as well, which is not written; merge the model instead"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / TENSORS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def load_peft(model: Transformer, folder: Path, *, family: str | None = None) -> FinetuneConfig:
    """Put an adapter in PEFT's format beside the weights of a whole model. Returns what it is in our words.

    Raises CheckpointError for what it holds and we do not have, or for names and shapes that are not the model's.
    """
    config = _read_config(folder)
    reader = WeightsReader(folder / TENSORS_FILE)
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name in reader:
        module, _, leaf = (
            name.removeprefix(PREFIX).partition(".lora_")
            if ".lora_" in name
            else name.removeprefix(PREFIX).rpartition(".")
        )
        found[module][leaf] = reader.tensor(name)
    chosen, spec = choose(model.config, family), build_meta(model.config)
    every = {path: module for path, module in spec.named_modules() if hasattr(module, "weight") and _is_linear(module)}
    by_module: dict[str, list[Rows]] = defaultdict(list)
    for row in _places(chosen, model.config, every, strict=False):
        by_module[row.module].append(row)
    unknown = [module for module in found if module not in by_module]
    if unknown:
        raise CheckpointError(f"{folder}: {unknown[0]} is no linear layer of {chosen.model_type}")
    ours = _as_ours(config, found, by_module)
    prepare(model, ours)
    layers = dict(adapted(model))
    with torch.no_grad():
        for module, tensors in found.items():
            rows = [row for row in by_module[module] if row.part in layers.get(row.path, nn.Module()).updates]
            scale = _scale(config, module, tensors)
            for row in rows:
                _fill(layers[row.path].updates[row.part], row, tensors, scale)
    return ours


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "parts") and not isinstance(module, GroupedLinear)


def _places(family: Family, spec: TransformerConfig, layers: dict[str, Any], *, strict: bool = True) -> Iterator[Rows]:
    """Of each part of these layers (that has an update, if strict), its rows in the family's tensors."""
    model = build_meta(spec)
    named = pieces(family, model)
    for path, layer in layers.items():
        if isinstance(layer, GroupedLinear):
            raise ConfigError(
                f"PEFT's format: {path} is of experts, which have no names there; merge the model instead"
            )
        parts = layer.parts or {"all": layer._parameters["weight"].shape[0]}
        start = 0
        for part, size in parts.items():
            if not strict or part in layer.updates:
                yield from _rows(named[f"{path}.weight"], path, part, range(start, start + size), layer)
            start += size


def _rows(sources: list[Piece], path: str, part: str, wanted: range, layer: Any) -> Iterator[Rows]:
    outputs, inputs = layer._parameters["weight"].shape
    own = torch.arange(outputs)[:, None].expand(outputs, inputs)
    theirs, names = torch.full((outputs,), -1), set()
    for piece in sources:
        numbers = piece.place(own)
        transposed = numbers.stride(-1) != 0
        size = piece.shape[-1] if transposed else piece.shape[0]
        index = torch.arange(size).view(1, -1) if transposed else torch.arange(size).view(-1, 1)
        both = (numbers, piece.select(index.expand(piece.shape)))
        here, there = (view[0] if transposed else view[..., 0].flatten() for view in both)
        inside = (here >= wanted.start) & (here < wanted.stop)
        if inside.any():
            theirs[here[inside]] = there[inside]
            names.add((piece.source.removesuffix(".weight"), size, transposed))
    if len(names) != 1:
        raise ConfigError(
            f"PEFT's format: {path}.{part} is in {len(names)} matrices of this family; merge the model instead"
        )
    ((name, size, transposed),) = names
    yield Rows(name, size, path, part, theirs[wanted.start : wanted.stop], transposed)


def _low_rank(rows: list[Rows], layers: dict[str, Any]) -> tuple[dict[str, Tensor], int, float]:
    """One pair for all that is in a module of theirs, its rank and its scale."""
    As, blocks, magnitude, start = [], [], None, 0
    updates: list[Any] = [layers[row.path].updates[row.part] for row in rows]
    scale = updates[0].scale
    for row, update in zip(rows, updates, strict=True):
        A_RI, B_OR = update.A.weight.detach(), update.B.weight.detach() * (update.scale / scale)
        if update.A0 is not None and update.B0 is not None:
            A_RI = torch.cat((A_RI, update.A0.weight.detach()))
            B_OR = torch.cat((B_OR, -update.B0.weight.detach()), dim=1)
        block = B_OR.new_zeros(row.size, B_OR.shape[1])
        block[row.theirs] = B_OR
        As.append(A_RI)
        blocks.append(block)
        start += len(row.theirs)
        if hasattr(update, "magnitude"):
            magnitude = torch.empty(row.size) if magnitude is None else magnitude
            magnitude[row.theirs] = update.magnitude.detach()
    if magnitude is not None and start != rows[0].size:
        raise ConfigError(f"PEFT's format: dora of a part of {rows[0].module} only; target all of its parts")
    tensors = {"lora_A.weight": torch.cat(As), "lora_B.weight": torch.cat(blocks, dim=1)}
    if magnitude is not None:
        tensors["lora_magnitude_vector"] = magnitude
    return tensors, len(tensors["lora_A.weight"]), scale


def _scales(rows: list[Rows], layers: dict[str, Any]) -> tuple[Tensor, bool]:
    updates: list[Any] = [layers[row.path].updates[row.part] for row in rows]
    if updates[0].inputs:
        return updates[0].factor.detach()[None], True
    factor = torch.ones(rows[0].size)
    for row, update in zip(rows, updates, strict=True):
        factor[row.theirs] = update.factor.detach()
    return factor[:, None], False


def _further(model: Transformer) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad and "updates." not in name]


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: cannot be read: {error}") from None
    kind = config.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise CheckpointError(f"{folder / CONFIG_FILE}: peft_type {kind}; known: LORA (with DoRA), IA3")
    for key, values in KNOWN.items():
        if key in config and config[key] not in values:
            raise CheckpointError(f"{folder / CONFIG_FILE}: {key}={config[key]!r}, which is not known here")
    return config


def _as_ours(
    config: dict[str, Any], found: dict[str, dict[str, Tensor]], by_module: dict[str, list[Rows]]
) -> FinetuneConfig:
    """The configuration that has these updates. The scale of all is that of the first; B makes up for others."""
    targets = {}
    for module, tensors in found.items():
        rank = 1 if "ia3_l" in tensors else tensors["A.weight"].shape[0]
        for row in by_module[module]:
            targets[row.path if row.part == "all" else f"{row.path}.{row.part}"] = rank
    if config["peft_type"] == "IA3":
        return FinetuneConfig(method="ia3", targets=list(targets))
    return FinetuneConfig(
        method="dora" if config.get("use_dora") else "lora",
        targets=targets,
        alpha=float(config.get("lora_alpha", 8)),
        rs=bool(config.get("use_rslora")),
        dropout=float(config.get("lora_dropout") or 0.0),
    )


def _scale(config: dict[str, Any], module: str, tensors: dict[str, Tensor]) -> float:
    if "A.weight" not in tensors:
        return 1.0
    alpha, rank = float(config.get("lora_alpha", 8)), len(tensors["A.weight"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = float(value)
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _fill(update: Any, row: Rows, tensors: dict[str, Tensor], scale: float) -> None:
    if "ia3_l" in tensors:
        factor = tensors["ia3_l"].flatten()
        update.factor.copy_(factor if update.inputs else factor[row.theirs])
        return
    update.A.weight.copy_(tensors["A.weight"])
    update.B.weight.copy_(tensors["B.weight"][row.theirs] * (scale / update.scale))
    if "magnitude_vector" in tensors:
        update.magnitude.copy_(tensors["magnitude_vector"][row.theirs])
