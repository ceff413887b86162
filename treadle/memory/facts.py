"""What one layer keeps, moves and sends, found by tracing the module itself, once for each kind of layer.

A layer's forward and backward are traced into a graph, divided as PyTorch divides it: eagerly, everything that a
backward formula reads is kept; compiled, the partitioner that inductor uses decides what is kept and what is computed
again. So a new block is planned for without a line about it. Attention is a stand-in that keeps what every fused kernel
keeps (queries, keys, values, output, log-sum-exp), and collectives are stand-ins that know their sizes only.

S tokens, D model dim. Bytes "per token" count tokens of a row's part on one process, as blocks see them: between blocks
tensor parallelism leaves each process some of those.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._functorch.config
from functorch.compile import aot_function, default_partition, min_cut_rematerialization_partition, nop
from torch import Tensor, fx, nn
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

from treadle.attention import AttentionContext, AttentionFacts, context_parallel, dispatch
from treadle.attention.padding import one_dim
from treadle.attention.parts import Parts
from treadle.errors import ConfigError
from treadle.kernels import collectives
from treadle.memory.kernels import own_kernels
from treadle.nn.config import LayerConfig
from treadle.nn.linear import GroupedLinear
from treadle.nn.roles import parameter_roles
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.parallel.compile import compile_layers
from treadle.parallel.config import ParallelConfig
from treadle.parallel.fits import blocks
from treadle.parallel.float8 import use_float8
from treadle.parallel.mesh import Mesh

PRIME = 61  # tokens are a multiple of it, and weights are not: so a tensor's size tells whether it grows with tokens
TOKENS = 512 * PRIME  # about as many as a micro-batch, as a budget weighs activations against weights


@dataclass(frozen=True)
class LayerFacts:
    """Of one layer on one process; bytes, per token of a micro-batch but for those named `weights`.

    kept: for the backward, its input included. input: of that. dear: of it with attention's and sums over processes,
    which selective checkpointing keeps; matmuls: outputs of each, in order, of which it keeps some.
    weights: kept besides, whatever the tokens: the matrices in the compute dtype, where nothing gathers them in it.
    working: what its backward needs besides what is kept, at most. forward, backward: traffic of everything that is no
    matmul, convolution or attention. repeated: matmuls that the backward computes again, as a share of the forward's.
    tensor: gathered and scattered in one forward, by all processes that share matrices. context: the same, of keys and
    values. launches: kernels of a forward and a backward.
    """

    kept: float
    dear: float
    matmuls: tuple[float, ...]
    input: float
    weights: float
    working: float
    forward: float
    backward: float
    repeated: float
    tensor: float
    context: float
    launches: int


def layer_facts(
    model: TransformerConfig,
    layer: LayerConfig,
    *,
    dtype: torch.dtype,
    compiled: bool,
    tensor: int = 1,
    gathered: int = 1,
    exchanged: bool = False,
    fp8: bool = False,
    budget: float = 1.0,
) -> LayerFacts:
    """tensor: processes that share its matrices. gathered: parts of a row whose keys and values come together.
    exchanged: parts of rows for heads, as `ulysses` does. fp8, budget: as in training and its activation checkpointing.
    """
    spec = _SPECS.setdefault(id(layer), (repr(layer), layer))[0]  # a search asks often
    key = (model.dim, model.max_length, spec, dtype, compiled, tensor, gathered, exchanged, fp8, budget)
    if key not in _FACTS:
        one = model.model_copy(update={"layers": [layer], "vocab_size": 64 * tensor, "multi_token": None})
        with torch._functorch.config.patch(activation_memory_budget=budget):
            _FACTS[key] = _traced(one, dtype, compiled, tensor, gathered, exchanged, fp8)
    return _FACTS[key]


_FACTS: dict[Any, LayerFacts] = {}
_SPECS: dict[int, tuple[str, LayerConfig]] = {}


def _traced(
    model: TransformerConfig,
    dtype: torch.dtype,
    compiled: bool,
    tensor: int,
    gathered: int,
    exchanged: bool,
    fp8: bool,
) -> LayerFacts:
    if compiled:
        compile_layers(nn.ModuleDict())  # sets what the compiler, and so the partitioner, is set to in a run
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graphs: list[fx.Graph] = []

    def divide(joint: Any, inputs: Any, **options: Any) -> Any:
        if compiled:  # parameters are there anyway: casts of them are formed again rather than kept
            options["static_lifetime_input_indices"] = list(range(1, 1 + len(parameters)))
        parts = (min_cut_rematerialization_partition if compiled else default_partition)(joint, inputs, **options)
        graphs.extend(part.graph for part in parts)
        return parts

    with mode, _stand_ins(compiled, gathered):
        whole: Transformer = model.build()
        whole.dtype = dtype
        (layer,) = whole.layers.values()
        if fp8:
            with suppress(ConfigError):  # of a layer none of whose sizes suit it
                use_float8(whole, Mesh(), ParallelConfig())
        _cut(whole, tensor)
        x_BSD = torch.empty(1, TOKENS // tensor, model.dim, dtype=dtype, requires_grad=True)
        context = whole.with_tables(AttentionContext.causal(1, TOKENS, backend="planned"))
        tables = context.tables
        if exchanged:
            context = replace(context, parts=Parts("ulysses", "contiguous", "", 0, 1), whole=context)
        if gathered > 1:
            parts = Parts("gather", "contiguous", "", 0, gathered)
            keys = (torch.empty(TOKENS, dtype=torch.int32), torch.empty(TOKENS * gathered, dtype=torch.int32))
            context = replace(context, parts=parts, whole=context)
            tables = {**tables, context_parallel.KEYS: keys}
        parameters = dict(layer.named_parameters())

        def run(x_BSD: Tensor, parameters: Any, positions_BS: Tensor, tables: Any) -> Tensor:
            given = replace(context, positions_BS=positions_BS, tables=tables)
            return functional_call(layer, parameters, (x_BSD, given))  # type: ignore[no-any-return]

        table = select_decomp_table() if compiled else {}
        aot_function(run, fw_compiler=nop, partition_fn=divide, decompositions=table)(
            x_BSD, parameters, context.positions_BS, tables
        )
    return _facts(_Graph(graphs[0], compiled), _Graph(graphs[1], compiled))


def _cut(model: Transformer, tensor: int) -> None:
    """What tensor parallelism leaves of each block on one process, with a stand-in where tokens come and go."""
    if tensor == 1:
        return
    roles = parameter_roles(model)
    for path, block in list(blocks(model)):
        shared: dict[str, int] = {}
        for attribute, parts in getattr(block, "head_counts", {}).items():
            count = getattr(block, attribute)
            setattr(block, attribute, max(1, count // tensor))
            shared |= dict.fromkeys(parts if count < tensor else (), count)
        for inner, module in block.named_modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                name = ".".join(filter(None, (path, inner, leaf)))
                shape, grouped = list(parameter.shape), isinstance(module, GroupedLinear)
                role: Any = module.alone if grouped else roles[name]  # type: ignore[union-attr]
                own = inner in getattr(block, "norms_of_heads", {})
                if role == "column" or own:
                    parts = getattr(module, "parts", None) or {"": shape[grouped]}
                    shape[grouped] = sum(rows // shared.get(part, tensor) for part, rows in parts.items())
                elif role == "row" and leaf == "weight":
                    shape[-1] //= tensor
                setattr(module, leaf, nn.Parameter(parameter.new_empty(shape), parameter.requires_grad))
        ends = (getattr(block, "entry", None), getattr(block, "exit", None))
        first, last = (block if end is None else getattr(block, end) for end in ends)
        first.register_forward_pre_hook(lambda _, args: (gather(args[0], tensor, "tensor"), *args[1:]))
        last.register_forward_hook(lambda _, args, y: scatter(y, tensor, "tensor"))


class _Graph:
    """Half of a layer's graph: which memory each node is, and which nodes a compiler makes one pass over memory of."""

    def __init__(self, graph: fx.Graph, compiled: bool):
        self.nodes = list(graph.nodes)
        self.compiled = compiled
        self.outputs: list[Any] = [n for n in self.nodes[-1].args[0] if isinstance(n, fx.Node)]
        self.inputs = [node for node in self.nodes if node.op == "placeholder"]
        self.region = self.regions()

    @staticmethod
    def storages(node: fx.Node) -> dict[int, int]:
        """Of a node's value: size by identity."""
        values = node.meta.get("val")
        tensors = [v for v in (values if isinstance(values, tuple | list) else [values]) if isinstance(v, Tensor)]
        return {s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}

    @staticmethod
    def read(node: fx.Node) -> int:
        value = node.meta.get("val")
        return value.numel() * value.element_size() if isinstance(value, Tensor) else 0

    def is_view(self, node: fx.Node) -> bool:
        found = self.storages(node)
        return bool(found) and any(found.keys() <= self.storages(each).keys() for each in node.all_input_nodes)

    def computes(self, node: fx.Node) -> bool:
        """Whether it is a matmul or a stand-in: timed by its FLOPs or by what it sends."""
        name = str(node.target)
        kinds = ("mm.", "addmm", "bmm", "grouped_linear", "gated_delta_scan", "convolution", "treadle_memory")
        if "rms_norm" in name:
            return False
        return node.op == "call_function" and any(kind in name for kind in kinds)

    def fuses(self, node: fx.Node) -> bool:
        return node.op == "call_function" and "getitem" not in str(node.target) and not self.computes(node)

    def matmuls(self) -> int:
        return sum(self.computes(node) and "treadle_memory" not in str(node.target) for node in self.nodes)

    def launches(self) -> int:
        passes = {its for node, its in self.region.items() if not self.is_view(node)}
        return len(passes) + sum(self.computes(node) for node in self.nodes)

    def regions(self) -> dict[fx.Node, int]:
        """Nodes that are one pass over memory, by the number of the last of them. Eagerly each is by itself."""
        region: dict[fx.Node, int] = {}
        for number, node in enumerate(self.nodes):
            if not self.fuses(node):
                continue
            region[node] = number
            if self.compiled and not any(word in str(node.target) for word in ("sort", "topk")):
                joined = {region[each] for each in node.all_input_nodes if each in region}
                region |= {each: number for each, had in region.items() if had in joined}
        return region

    def traffic(self) -> float:
        """Bytes of tokens read and written by all that is elementwise or a reduction, once for each region."""
        total = 0
        for number in set(self.region.values()):
            inside = [node for node, its in self.region.items() if its == number]
            made = {key for node in inside if not self.is_view(node) for key in self.storages(node)}
            reads, writes = dict[int, int](), dict[int, int]()
            for node in inside if made else ():
                for each in node.all_input_nodes:
                    for key in self.storages(each).keys() - made:
                        reads[key] = max(reads.get(key, 0), self.read(each))
                if any(self.region.get(user) != number for user in node.users):
                    writes |= {key: self.read(node) for key in self.storages(node).keys() & made}
            total += sum(size for size in (*reads.values(), *writes.values()) if grows(size))
            if self.compiled and any(not grows(size) for size in writes.values()):  # sums over tokens are a second pass
                total += sum(filter(grows, reads.values()))
        return float(total)

    def peak(self, lasting: set[int]) -> float:
        """The most that lives at once besides the inputs, each of which is freed with its last use. lasting: memory
        that is not counted."""
        uses: dict[int, int] = {}
        for number, node in enumerate(self.nodes):
            last = self.region.get(node, number)
            for each in (node, *node.all_input_nodes):
                uses |= {key: max(last, uses.get(key, 0)) for key in self.storages(each)}
        live = {key: size for node in self.inputs for key, size in self.storages(node).items() if grows(size)}
        start = most = sum(live.values())
        for number, node in enumerate(self.nodes):
            inside = node in self.region and all(self.region.get(user) == self.region[node] for user in node.users)
            if node.op == "call_function" and not inside:
                live |= {k: size for k, size in self.storages(node).items() if k not in lasting and grows(size)}
            most = max(most, sum(live.values()))
            live = {key: size for key, size in live.items() if uses[key] > number}
        return float(most - start)


def grows(size: int) -> bool:
    """Whether memory of so many bytes is of tokens, and no weight's."""
    return size % PRIME == 0


def _facts(forward: _Graph, backward: _Graph) -> LayerFacts:
    x, own = forward.inputs[0], set(forward.inputs[1:])
    given = {key for node in own for key in forward.storages(node)}
    kept: dict[int, int] = {}
    for node in forward.outputs[1:]:
        kept |= {key: size for key, size in forward.storages(node).items() if key not in given}
    tokens = {key: size for key, size in kept.items() if grows(size)}
    dear, matmuls = forward.storages(x), []
    for node in forward.nodes:
        name = str(node.target)
        if "treadle_memory.attention" in name or "treadle_memory.scatter" in name:
            dear |= forward.storages(node)
        elif forward.computes(node) and "treadle_memory" not in name:
            matmuls.append(sum(forward.storages(node).values()) / TOKENS)
    sent = {"tensor": 0.0, "context": 0.0}
    for node in forward.nodes:
        if "treadle_memory.gather" in str(node.target) or "treadle_memory.scatter" in str(node.target):
            larger = max(forward.read(node), *(forward.read(each) for each in node.all_input_nodes))
            sent[str(node.args[2])] += larger
    weights = {key for node in backward.outputs[1:] for key in backward.storages(node)}
    return LayerFacts(
        kept=sum(tokens.values()) / TOKENS,
        dear=sum(dear.values()) / TOKENS,
        matmuls=tuple(matmuls),
        input=forward.read(x) / TOKENS,
        weights=float(sum(kept.values()) - sum(tokens.values())),
        working=backward.peak(weights) / TOKENS,
        forward=forward.traffic() / TOKENS,
        backward=backward.traffic() / TOKENS,
        repeated=max(0, backward.matmuls() - 2 * forward.matmuls()) / forward.matmuls() if forward.matmuls() else 0.0,
        tensor=sent["tensor"] / TOKENS,
        context=sent["context"] / TOKENS,
        launches=forward.launches() + backward.launches(),
    )


# Stand-ins: what keeps, takes and gives the memory of the real thing, and computes nothing.


@torch.library.custom_op("treadle_memory::attention", mutates_args=())
def _attention(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@_attention.register_fake
def _(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
    out_BSHK = q_BSHK.new_empty(*q_BSHK.shape[:3], v_BTGK.shape[-1])
    return out_BSHK, q_BSHK.new_empty(q_BSHK.shape[:3], dtype=torch.float32)


@torch.library.custom_op("treadle_memory::attention_backward", mutates_args=())
def _attention_backward(
    dout_BSHK: Tensor, q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, out_BSHK: Tensor, lse_BSH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError


@_attention_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_attention.register_autograd(
    lambda ctx, dout, _: _attention_backward(dout, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


@torch.library.custom_op("treadle_memory::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@torch.library.custom_op("treadle_memory::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor | None, statistics: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@_rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor | None, statistics: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if weight is None else weight.shape)


def _norm_gradients(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor, Tensor | None]:
    x, weight, statistics = ctx.saved_tensors
    dx, dweight = _rms_norm_backward(dy, x, weight, statistics)
    return dx, None if weight is None else dweight


_rms_norm.register_autograd(
    _norm_gradients,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output[1]),
)


@torch.library.custom_op("treadle_memory::gather", mutates_args=())
def gather(x_BSX: Tensor, size: int, over: str) -> Tensor:
    raise NotImplementedError


@torch.library.custom_op("treadle_memory::scatter", mutates_args=())
def scatter(x_BSX: Tensor, size: int, over: str) -> Tensor:
    raise NotImplementedError


@torch.library.custom_op("treadle_memory::exchange", mutates_args=())
def exchange(x_BSHK: Tensor) -> Tensor:
    raise NotImplementedError


@exchange.register_fake
def _(x_BSHK: Tensor) -> Tensor:
    return x_BSHK.new_empty(x_BSHK.shape)


exchange.register_autograd(lambda ctx, dy: exchange(dy))


@gather.register_fake
def _(x_BSX: Tensor, size: int, over: str) -> Tensor:
    return x_BSX.new_empty(x_BSX.shape[0], x_BSX.shape[1] * size, *x_BSX.shape[2:])


@scatter.register_fake
def _(x_BSX: Tensor, size: int, over: str) -> Tensor:
    return x_BSX.new_empty(x_BSX.shape[0], x_BSX.shape[1] // size, *x_BSX.shape[2:])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rest = inputs[1:]


gather.register_autograd(lambda ctx, dy: (scatter(dy, *ctx.rest), None, None), setup_context=_remember)
scatter.register_autograd(lambda ctx, dy: (gather(dy, *ctx.rest), None, None), setup_context=_remember)


def _planned(
    q_BSHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, facts: AttentionFacts, context: Any, sinks_H: Tensor | None = None
) -> Tensor:
    V = v_BTGV.shape[-1]
    if max(q_BSHK.shape[-1], V) <= 256:  # fused kernels have one head dim
        q_BSHK, k_BTGK, v_BTGV = one_dim(q_BSHK, k_BTGK, v_BTGV)
    return _attention(q_BSHK, k_BTGK, v_BTGV)[0][..., :V]


def _exchanging(
    q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, facts: Any, context: Any, sinks: Any, local: Any
) -> Tensor:
    """Whole rows of some heads are as many numbers as parts of rows of all heads."""
    there = [exchange(x) for x in (q_BSHK, k_BSGK, v_BSGV)]
    return exchange(local(*there, facts, context.whole, sinks))


@contextmanager
def _stand_ins(compiled: bool, gathered: int) -> Iterator[None]:
    backend: Any = SimpleNamespace(unsupported=lambda *_: None, attend=_planned)
    # Eagerly a GPU has one kernel for it, where a CPU has a chain.
    fused: Any = torch.rms_norm if compiled else lambda x, shape, weight, eps: _rms_norm(x, weight)[0]
    with (
        nullcontext() if compiled else own_kernels(),
        patch.dict(dispatch.BACKENDS, planned=backend),
        patch.object(context_parallel, "_ulysses", _exchanging),
        patch.object(collectives, "gather", lambda given, *_: [gather(x, gathered, "context") for x in given]),
        patch("torch.nn.functional.rms_norm", fused),
    ):
        yield
