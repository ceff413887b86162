"""From a configuration to a model of which little is trained: what is frozen, what is put beside it, how it starts."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from treadle.errors import ConfigError
from treadle.finetune.adapted import AdaptedGrouped, AdaptedLinear, ScaledLinear, adapt, adapted, wide
from treadle.finetune.bottleneck import Around, Bottleneck
from treadle.finetune.config import FinetuneConfig
from treadle.finetune.lora import DoRA, GroupedLoRA, LoRA
from treadle.finetune.mora import MoRA
from treadle.finetune.scales import Scale
from treadle.finetune.targets import Targets, select, trainable
from treadle.nn.init import Pieces, initialise, whole_piece
from treadle.nn.linear import GroupedLinear
from treadle.nn.moe import MoE
from treadle.nn.roles import parameter_roles
from treadle.nn.store import build_meta
from treadle.nn.transformer import Transformer
from treadle.parallel.shards import copy_whole, cut_like, gather, local, parts_of

UPDATES: dict[str, Any] = {"lora": LoRA, "dora": DoRA, "mora": MoRA, "ia3": Scale}


def attach(model: Transformer, config: FinetuneConfig) -> None:
    """Freeze a model, or a pipeline's part of one, and put updates beside its layers, without values as yet.

    Comes before a model is cut or sharded, and after layers were swapped for others. Raises ConfigError as `select`
    does, and where nothing of this part would be trained.
    """
    if config.method == "full":
        return
    whole = build_meta(model.config)
    targets, more = select(whole, config), trainable(whole, config)
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learned & more)
    model.tuned = True  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, MoE):
            module.bias_rate = None  # what balances experts is frozen too
    with torch.device(next(model.parameters()).device):
        if config.method == "adapter":
            _put_between(model, targets, config)
        else:
            _put_beside(model, targets, config)
    model.train(model.training)  # what is new too
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "finetune.targets: nothing would be trained in one of the pipeline's parts; target its layers"
        )


def prepare(model: Transformer, config: FinetuneConfig, *, seed: int = 0) -> Transformer:
    """A model with weights, of one process, ready to be fine-tuned: `attach`, first values, `begin` and `settle`."""
    own = {name for name, _ in model.named_parameters()}

    def new(name: str, parameter: torch.Tensor) -> Any:
        return [] if name in own else whole_piece(name, parameter)

    attach(model, config)
    pieces: Pieces = new
    initialise(model, model.config.init, seed=seed, depth=len(model.layers), pieces=pieces)
    begin(model)
    settle(model)
    return model


def _put_between(model: Transformer, targets: Targets, config: FinetuneConfig) -> None:
    for path, parts in targets.items():
        _, number, name = path.split(".")
        if number in model.layers:
            layer: Any = model.layers[number]
            (width,) = parts.values()
            bottleneck = Bottleneck(model.config.dim, width, config)
            layer.add_module(f"{name}_updates", bottleneck)
            getattr(layer, name).register_forward_hook(Around(bottleneck))


def _put_beside(model: Transformer, targets: Targets, config: FinetuneConfig) -> None:
    modules, roles = dict(model.named_modules()), parameter_roles(model)
    for path, ranks in targets.items():
        if path not in modules:  # of another stage
            continue
        layer: Any = modules[path]
        outputs, inputs = layer.weight.shape[-2:]
        sizes = layer.parts or {"all": outputs}
        if isinstance(layer, GroupedLinear):
            updates: dict[str, nn.Module] = {
                part: GroupedLoRA(layer, sizes[part], rank, config) for part, rank in ranks.items()
            }
            adapt(layer, AdaptedGrouped, updates)
            continue
        kind, role = UPDATES[config.method], roles[f"{path}.weight"]
        updates = {part: kind(inputs, sizes[part], rank, role, part, config) for part, rank in ranks.items()}
        adapt(layer, ScaledLinear if config.method == "ia3" else AdaptedLinear, updates)


@torch.no_grad()
def begin(model: nn.Module) -> None:
    """First values that follow from the weights: DoRA's norms, PiSSA's singular vectors. All processes call it."""
    stacks = parts_of(model)
    for path, layer in adapted(model):
        updates = {part: update for part, update in layer.updates.items() if _needs_weight(update)}
        if not updates:
            continue
        weight_OI = wide(gather(layer._parameters["weight"].detach(), stacks.get(f"{path}.weight", ())))
        rows = dict(
            zip(layer.parts or ["all"], weight_OI.split(list(layer.parts.values()) or len(weight_OI)), strict=True)
        )
        for part, update in updates.items():
            if isinstance(update, DoRA):
                copy_whole(update._parameters["magnitude"], rows[part].norm(dim=1))  # type: ignore[arg-type]
            else:
                _start_at_largest(update, rows[part])


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Take off a weight what an update begins with (PiSSA), so that the model computes what it did before. Once, with
    the values that `begin` has found or a checkpoint has kept; all processes call it."""
    stacks = parts_of(model)
    for path, layer in adapted(model):
        if not any(getattr(update, "A0", None) is not None for update in layer.updates.values()):
            continue
        parameter = layer._parameters["weight"]
        origin_OI = torch.zeros(parameter.shape, dtype=wide(local(parameter)).dtype, device=local(parameter).device)
        rows = dict(
            zip(layer.parts or ["all"], origin_OI.split(list(layer.parts.values()) or len(origin_OI)), strict=True)
        )
        for part, update in layer.updates.items():
            A0_RI, B0_OR = (wide(gather(factor._parameters["weight"].detach())) for factor in (update.A0, update.B0))
            rows[part].copy_(update.scale * (B0_OR @ A0_RI))
            update.settled = True
        here = local(parameter)
        here.copy_(wide(here) - cut_like(origin_OI, parameter, stacks.get(f"{path}.weight", ())))


def _needs_weight(update: nn.Module) -> bool:
    return isinstance(update, DoRA) or getattr(update, "A0", None) is not None


def _start_at_largest(update: LoRA, weight_OI: torch.Tensor) -> None:
    U, S, V = torch.linalg.svd(weight_OI, full_matrices=False)
    root_R = (S[: update.rank] / update.scale).sqrt()
    A_RI, B_OR = root_R[:, None] * V[: update.rank], U[:, : update.rank] * root_R
    for factor, values in ((update.A, A_RI), (update.B, B_OR), (update.A0, A_RI), (update.B0, B_OR)):
        assert factor is not None
        copy_whole(factor._parameters["weight"], values)  # type: ignore[arg-type]


def saved_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What a checkpoint has of a model: of one with frozen weights all others, of any other model everything."""
    tuned = getattr(model, "tuned", False)
    for name, parameter in model.named_parameters():
        if not tuned or parameter.requires_grad or "updates." in name:
            yield name, parameter
