"""Tensor parallelism: every matrix is cut between a few processes, by the role of each parameter.

Applied from outside to the built model, before everything else. Parameters become DTensors, which sharding of data,
optimizers, clipping and checkpoints know what to do with; computation is local. Three things make a block compute its
share without knowing of it:

    its parameters   its code sees, under their own names, what is here of them
    its head counts  are those of this process (`head_counts`, see `treadle.nn.roles`)
    its two ends     all tokens are gathered where it begins, partial sums added up and scattered where it ends

Between blocks each process has some of a sequence's tokens, so that norms and the residual stream are cut as well. It
follows that what is replicated gets a part of its gradient on each process, everywhere: outside of a block each has
seen some tokens only, inside each has seen what its own heads, channels or experts' rows make of them. So the gradient
of every replicated parameter is a sum over the processes, without an exception.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from treadle.attention import AttentionFacts
from treadle.errors import ConfigError
from treadle.nn.linear import GroupedLinear, Linear
from treadle.nn.roles import Role, parameter_roles
from treadle.nn.transformer import Transformer
from treadle.parallel import cut_modules as cut
from treadle.parallel.collectives import Peers, gather, not_fused_because
from treadle.parallel.config import ParallelConfig
from treadle.parallel.data import sharded_units, wide_units
from treadle.parallel.fits import blocks
from treadle.parallel.mesh import Mesh
from treadle.parallel.shards import EXPERT, TENSOR, summed


def shard_tensor(model: Transformer, mesh: Mesh, config: ParallelConfig) -> None:
    """Cut a model on the meta device between the processes of `mesh.tensor`. A no-op where that is one process.

    Raises ConfigError where a size does not divide (`check_layout` says so before), or `async_tensor` asks for what
    this machine or this model cannot do; ValueError for a block whose facts do not add up.
    """
    if mesh.tensor is None:
        return
    group = mesh.tensor.get_group()
    peers = Peers(group.group_name, mesh.tensor.size(), mesh.tensor.get_local_rank(), config.async_tensor)
    sites = _sites(model, peers)
    if config.async_tensor:
        _check_fused(sites, mesh)
    roles, made = parameter_roles(model), dict[nn.Parameter, tuple[nn.Parameter, View]]()
    for path, module in list(model.named_modules()):
        site, views = sites[path], dict[str, View]()
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            name = f"{path}.{leaf}".removeprefix(".")
            if parameter not in made:  # the head's may be the embedding's
                placement, view = _placement(leaf, module, parameter, roles[name], site, peers)
                made[parameter] = _spread(name, parameter, placement, mesh.tensor), view
            spread, views[leaf] = made[parameter]
            module.register_parameter(leaf, spread)
        _become(module, site.form, views, peers)
    for layer in sharded_units(model):
        inner = wide_units(model, layer)
        for unit in (layer, *inner):
            _look_before(layer, unit, without=[other for other in inner if other is not unit])


@dataclass
class Site:
    """What shard_tensor knows of a module.

    form: what its class is mixed with. inside: of a block that is cut. shared: heads of those parts that are fewer than
    processes. heads: of a norm that has weights for each, `peers.size` standing for at least so many; None: of another.
    """

    form: type | None = None
    inside: bool = False
    shared: dict[str, int] = field(default_factory=dict)
    heads: int | None = None


def _sites(model: Transformer, peers: Peers) -> dict[str, Site]:
    """By path. Head counts of the blocks that are cut become those of this process."""
    sites = {path: Site() for path, _ in model.named_modules()}
    sites[""].form = cut.CutTransformer
    forms = {"embedding": cut.CutEmbedding, "position": cut.CutPosition, "head": cut.CutHead}
    for name, form in {**forms, "multi_token": cut.CutMultiToken}.items():
        if getattr(model, name) is not None:  # a stage of a pipeline may have none of them
            sites[name].form = form
    if model.multi_token is not None:
        for key in model.multi_token.layers:
            sites[f"multi_token.layers.{key}"].form = cut.CutMultiTokenModule
    for path, block in blocks(model):
        counts = _divide_heads(path, block, peers)
        for inner, _ in block.named_modules():
            site = sites[f"{path}.{inner}".removesuffix(".")]
            site.inside, site.shared = True, counts
        _set_ends(path, block, sites)
        for name, (attribute, over) in getattr(block, "norms_of_heads", {}).items():
            norm = getattr(block, name)
            if norm is not None:
                site = sites[f"{path}.{name}"]
                site.heads = counts.get(attribute, peers.size)
                site.form = cut.wide_norm(norm) if over == "all" else None
    return sites


def _divide_heads(path: str, block: Any, peers: Peers) -> dict[str, int]:
    """Give a block this process's number of heads. Returns, by attribute and by part, the counts that are shared."""
    shared: dict[str, int] = {}
    if isinstance(facts := getattr(block, "facts", None), AttentionFacts):
        block.facts = replace(facts, heads=(peers.rank * block.heads // peers.size, block.heads))
    for attribute, parts in getattr(block, "head_counts", {}).items():
        count = getattr(block, attribute)
        if count % peers.size and (not parts or peers.size % count):
            raise ValueError(f"{path}: {peers.size} processes cannot share {attribute}={count}")
        setattr(block, attribute, max(1, count // peers.size))
        if count < peers.size:
            shared |= dict.fromkeys((attribute, *parts), count)
    return shared


def _set_ends(path: str, block: Any, sites: dict[str, Site]) -> None:
    """Where tokens are gathered and scattered: in the Linear that a block names for it, or around all of it."""
    ends = (("entry", "column", cut.EntryLinear), ("exit", "row", cut.ExitLinear))
    names = [getattr(block, end, None) for end, _, _ in ends]
    for name, (end, role, form) in zip(names, ends, strict=True):
        if name is None:
            continue
        if not isinstance(getattr(block, name, None), Linear) or block.roles.get(name) != role:
            raise ValueError(f"{type(block).__name__}.{end}: '{name}' is no Linear of role '{role}'")
        sites[f"{path}.{name}"].form = form
    sites[path].form = cut.block_form(enters=names[0] is None, leaves=names[1] is None)


def _check_fused(sites: dict[str, Site], mesh: Mesh) -> None:
    here = mesh.world.local_size
    if here % mesh.layout.tensor:
        shared = f"{here} processes on a machine cannot be shared out to groups of parallel.tensor={mesh.layout.tensor}"
        raise ConfigError(f"parallel.async_tensor: {shared}, and none may span machines; leave it out")
    if reason := not_fused_because(mesh.device):
        raise ConfigError(f"parallel.async_tensor: {reason}; leave it out")
    if not any(site.form in (cut.EntryLinear, cut.ExitLinear) for site in sites.values()):
        raise ConfigError("parallel.async_tensor: no block of this model has an entry or an exit to be fused")


@dataclass(frozen=True)
class View:
    """What the code of a module sees of one of its parameters.

    replicated: whole, and its gradient is a part of a sum. once: on the first process as it is, on others as zeros (a
    bias that is added to each part of a sum). heads: of which it sees the one that it needs. shared: of a stack in
    which others' heads are needed, for each part the rows that are here, and its heads (0: each has its own).
    """

    replicated: bool = False
    once: bool = False
    heads: int | None = None
    shared: tuple[tuple[int, int], ...] = ()

    def of(self, parameter: DTensor, peers: Peers) -> Tensor:
        if not self.replicated:
            here = parameter.to_local()
            return self._with_shared(here, peers) if self.shared else here
        here = parameter.to_local(grad_placements=summed(parameter.placements))
        if self.heads is not None:
            return _head(here, self.heads, peers)
        return here * float(peers.rank == 0) if self.once else here

    def rows(self, parts: dict[str, int], peers: Peers) -> list[int]:
        """Of each part of a stack, how many are seen here."""
        if self.replicated:
            return list(parts.values())
        shared = [heads for _, heads in self.shared] or [0] * len(parts)
        return [whole // (heads or peers.size) for whole, heads in zip(parts.values(), shared, strict=True)]

    def _with_shared(self, here: Tensor, peers: Peers) -> Tensor:
        """Each shared part is replaced by its one head that this process needs.

        Weights are gathered, and not what is computed with them: they are small, and the gradient of a head is the sum
        over those who use it by itself.
        """
        sizes = [rows for rows, _ in self.shared]
        common = [part for part, (_, heads) in zip(here.split(sizes), self.shared, strict=True) if heads]
        everyone = gather(torch.cat(common), 0, peers).unflatten(0, (peers.size, -1))
        wholes = iter(everyone.split([part.shape[0] for part in common], dim=1))
        found = []
        for part, (_, heads) in zip(here.split(sizes), self.shared, strict=True):
            if heads:
                part = _head(next(wholes).flatten(0, 1), heads, peers)
            found.append(part)
        return torch.cat(found)

    def add_gradient(self, mine: Tensor, add: Callable[[Tensor], Any], peers: Peers) -> None:
        """Add to `mine`, the gradient of what is here of a parameter, what `add` adds to that of what is seen of it."""
        if not self.shared:
            add(mine)
            return
        with torch.enable_grad():
            here = torch.zeros_like(mine).requires_grad_()
            seen = self._with_shared(here, peers)  # linear: the values make no difference to its backward
        gradient = torch.zeros_like(seen)
        add(gradient)
        mine.add_(torch.autograd.grad(seen, here, gradient)[0])


def _head(whole: Tensor, heads: int, peers: Peers) -> Tensor:
    """Of a stack of fewer heads than processes the one that this process needs."""
    each = whole.shape[0] // heads
    return whole.narrow(0, peers.rank * heads // peers.size * each, each)


def _placement(
    leaf: str, module: nn.Module, parameter: Tensor, role: Role, site: Site, peers: Peers
) -> tuple[Placement, View]:
    """How a parameter is spread, and what the module sees of it."""
    whole, once = (Replicate(), View(replicated=True)), (Replicate(), View(replicated=True, once=True))
    if isinstance(module, GroupedLinear):
        if module.alone == "replicate":
            return whole
        if module.alone == "column":
            return Shard(1), View()
        return (Shard(2), View()) if leaf == "weight" else once
    if site.heads is not None:
        return (
            (Shard(0), View()) if site.heads == peers.size else (Replicate(), View(replicated=True, heads=site.heads))
        )
    if role == "column":
        if not site.inside:
            raise ValueError(f"{type(module).__name__}.{leaf} is a column, and nothing around it has rows")
        return Shard(0), _stack(getattr(module, "parts", {}), site.shared, peers)
    if role == "row" and site.inside:
        if parameter.ndim == 2:
            return Shard(1), View()
        return whole if site.form is cut.ExitLinear else once
    if role == "vocab" and site.form in (cut.CutEmbedding, cut.CutHead):
        return Shard(0), View()
    return whole


def _stack(parts: dict[str, int], heads: dict[str, int], peers: Peers) -> View:
    """Of a stack of these parts, of which some may have fewer heads than there are processes."""
    shared = tuple((rows // peers.size, heads.get(part, peers.size) % peers.size) for part, rows in parts.items())
    return View(shared=shared if any(count for _, count in shared) else ())


def _spread(name: str, parameter: nn.Parameter, placement: Placement, mesh: DeviceMesh) -> nn.Parameter:
    shape = list(parameter.shape)
    if isinstance(placement, Shard):
        if shape[placement.dim] % mesh.size():
            message = f"{mesh.size()} processes cannot share {name} equally, {shape[placement.dim]} are given out"
            raise ConfigError(f"parallel.tensor: {message}")
        shape[placement.dim] //= mesh.size()
    here = parameter.new_empty(shape)
    spread = DTensor.from_local(
        here, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(spread, requires_grad=parameter.requires_grad)


def _become(module: Any, form: type | None, views: dict[str, View], peers: Peers) -> None:
    """The same module, whose code sees what is here of its parameters."""
    module.views, module.peers, module.seen = views, peers, {}
    kind: Any = type(module)
    module.__class__ = _class(kind, form, tuple(views))


@functools.cache
def _class(kind: type, form: type | None, names: tuple[str, ...]) -> type:
    bases = (kind,) if form is None else (form, kind)
    return type(f"Cut{kind.__name__}", bases, {name: property(_seen(name)) for name in names})


def _seen(name: str) -> Any:
    def seen(module: Any) -> Tensor:
        found = module.seen.get(name)
        return _look(module, name) if found is None else found  # type: ignore[no-any-return]

    return seen


def _look(module: Any, name: str) -> Tensor:
    parameter = module._parameters[name]
    # Outside of a forward it is on the mesh of data as well: whoever asks then means the parameter itself.
    if not {TENSOR, EXPERT}.issuperset(parameter.device_mesh.mesh_dim_names):
        return parameter  # type: ignore[no-any-return]
    return module.views[name].of(parameter, module.peers)  # type: ignore[no-any-return]


def _look_before(layer: nn.Module, unit: nn.Module, without: list[nn.Module]) -> None:
    """While a unit of a compiled layer runs (the layer itself, or what is gathered by itself in it), have what it sees
    of its parameters at hand, so that the compiler meets plain tensors only.

    Of a DTensor it may keep the mesh for the backward, where torch 2.13 expects tensors. A layer that is not compiled
    looks at each parameter as it comes to it: the same in the forward and when it is recomputed, where no hook runs.
    """
    hidden = {inner for other in without for inner in other.modules()}
    modules: list[Any] = [module for module in unit.modules() if module not in hidden]

    @torch.compiler.disable
    def look(*_: Any) -> None:
        for module in modules if layer._compiled_call_impl is not None else ():
            module.seen.update({name: _look(module, name) for name in module.views})

    @torch.compiler.disable
    def forget(*_: Any) -> None:
        for module in modules:
            module.seen.clear()

    unit.register_forward_pre_hook(look)  # sharding of data will come before it, and gather
    unit.register_forward_hook(forget, always_call=True)
