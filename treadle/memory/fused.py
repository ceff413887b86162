"""What a compiled layer keeps and needs: the graphs that the compiler would make code of, played back as allocations.

The graph is the real one: traced by the real front end, differentiated, decomposed, and cut into forward and backward
by the compiler's own partitioner, which decides what is kept. Only the code is not generated. In its place stands a
model of what the code generator does with memory:

    one kernel per result   of an operation that is a kernel of its own (a matmul, attention, a collective), or that
                            somebody outside of the kernel reads; what is elementwise and reductions before it is fused
    freed at last use       intermediate results and, as the calling convention has it, inputs that nobody else holds
    written in place        a fused kernel that reads a dying buffer of its own size last writes its result there
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from treadle.memory.live import Block, Costs, LiveMemory, costs_of, workspace

Base = tuple[fx.Node, int]  # a buffer: which result of which node

aten = torch.ops.aten
_REDUCTIONS = {
    *(aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default, aten.amax.default, aten.amin.default),
    *(aten.var_mean.correction, aten.argmax.default, aten.any.default, aten.any.dim, aten.prod.default),
}
_FUSED = _REDUCTIONS | {
    *(aten.full.default, aten.cat.default, aten.embedding.default, aten.index.Tensor, aten.gather.default),
    *(aten.constant_pad_nd.default, aten.clone.default, aten.index_select.default, aten.repeat.default),
    *(torch.ops.prims.iota.default, torch.ops.prims.convert_element_type.default, aten.arange.start_step),
    *(aten.full_like.default, aten.new_zeros.default, aten.empty.memory_format, aten.where.self, aten._to_copy.default),
    *(aten.scalar_tensor.default, aten.slice_scatter.default, aten.select_scatter.default, aten.copy.default),
}

_ELSEWHERE = _REDUCTIONS | {aten.cat.default, aten.constant_pad_nd.default}  # never written over what they read


def backend(meter: LiveMemory) -> Any:
    """For `torch.compile`: graphs on fake tensors that do to the meter what compiled code does to memory."""

    def compiler(graph: fx.GraphModule, _: Any) -> Callable[[list[Any]], Any]:
        return Region(graph, meter).run

    return aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )


class Region:
    """A compiled graph. `run` is called, in the compiler's convention, with a list of inputs that it empties."""

    def __init__(self, module: fx.GraphModule, meter: LiveMemory):
        self.meter, graph = meter, module.graph
        self.inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.outputs = next(node for node in graph.nodes if node.op == "output").args[0]
        self.attributes = {node: getattr(module, node.target) for node in graph.nodes if node.op == "get_attr"}
        self.costs = Costs()
        self.bases: dict[fx.Node, Base] = {}
        self.kernels: list[tuple[fx.Node, set[Base]]] = []
        self._plan(graph)
        last = {base: number for number, (_, reads) in enumerate(self.kernels) for base in reads}
        kept = {self.bases[node] for node in self.outputs if isinstance(node, fx.Node)}
        self.dying: list[list[Base]] = [[] for _ in self.kernels]
        for base, number in last.items():
            if base not in kept:
                self.dying[number].append(base)
        self.unread = {(node, i) for node, _ in self.kernels for i in range(len(_sizes(node)))} - set(last) - kept
        self.kept = kept

    def _plan(self, graph: fx.Graph) -> None:
        returned = {node for node in self.outputs if isinstance(node, fx.Node)}
        whole: set[fx.Node] = set()  # has a buffer of its own
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.bases[node] = node, 0
                whole.add(node)
            elif node.op != "call_function":
                continue
            elif _picks(node):
                source = node.args[0]
                self.bases[node] = (source, node.args[1]) if source in whole else self.bases[source]
            elif _is_view(node):
                self.bases[node] = self.bases[node.all_input_nodes[0]]
            else:
                self.bases[node] = node, 0
                if not _is_fused(node) or _read_outside(node, returned):
                    whole.add(node)
                    self.kernels.append((node, set()))
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
                self.costs.add(costs_of(node.target, args, kwargs, node.meta.get("val")))
        reads: dict[fx.Node, set[Base]] = {}
        for node in graph.nodes:  # what a fused node reads, through others that have no buffer
            if node.op != "call_function" or _picks(node):
                reads[node] = set()
                continue
            found: set[Base] = set()
            for source in node.all_input_nodes:
                base = self.bases[source]
                found |= {base} if base[0] in whole else reads[base[0]]
            reads[node] = found
        self.kernels = [(node, reads[node]) for node, _ in self.kernels]

    def run(self, arguments: list[Any]) -> list[Any]:
        meter = self.meter
        held: dict[Base, Any] = {(node, 0): value for node, value in zip(self.inputs, arguments, strict=True)}
        held |= {(node, 0): value for node, value in self.attributes.items()}
        arguments.clear()
        for (node, _), dying in zip(self.kernels, self.dying, strict=True):
            sizes = _sizes(node)
            in_place = _is_fused(node) and node.target not in _ELSEWHERE
            reused = [base for base in dying if isinstance(held.get(base), Block)] if in_place else []
            for base in reused:
                if sum(sizes) == held[base].size:
                    meter.close(held.pop(base))
                    break
            for number, size in enumerate(sizes):
                base = node, number
                held[base] = _tensor(node, number) if base in self.kept else meter.open(size)
            if extra := workspace(node.target, fx.map_arg(node.args, lambda n: n.meta.get("val"))):
                meter.close(meter.open(extra, "workspace"))
            for base in [*dying, *((node, i) for i in range(len(sizes)) if (node, i) in self.unread)]:
                value = held.pop(base, None)
                if isinstance(value, Block):
                    meter.close(value)
                del value
        if meter.counting:
            meter.costs.add(self.costs)
        return [self._output(node, held) for node in self.outputs]

    run._boxed_call = True  # type: ignore[attr-defined]

    def _output(self, node: Any, held: dict[Base, Any]) -> Any:
        if not isinstance(node, fx.Node):
            return node
        value, base = node.meta.get("val"), self.bases[node]
        found = held[base]
        if not isinstance(value, torch.Tensor) or base == (node, 0):
            return found
        return found.as_strided(value.shape, value.stride(), value.storage_offset())


def _tensor(node: fx.Node, number: int) -> torch.Tensor:
    value = _values(node)[number]
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _values(node: fx.Node) -> list[Any]:
    value = node.meta.get("val")
    return list(value) if isinstance(value, tuple | list) else [value]


def _sizes(node: fx.Node) -> list[int]:
    return [v.untyped_storage().nbytes() if isinstance(v, torch.Tensor) else 0 for v in _values(node)]


def _picks(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _is_view(node: fx.Node) -> bool:
    if node.target in (torch.ops._c10d_functional.wait_tensor.default, aten._unsafe_view.default):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(
        result.alias_info is not None and not result.alias_info.is_write for result in schema.returns
    )


def _is_fused(node: fx.Node) -> bool:
    return node.target in _FUSED or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _read_outside(node: fx.Node, returned: set[fx.Node]) -> bool:
    """Whether what a fused node computes is read by more than the kernels that it is fused into."""
    if node in returned or node.target in _REDUCTIONS:
        return True
    for user in node.users:
        if user.op == "call_function" and (_is_view(user) or _picks(user)):
            if _read_outside(user, returned):
                return True
        elif user.op != "output" and not _is_fused(user):
            return True
    return False
