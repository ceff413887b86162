"""What part each parameter plays, in one word: the parent block names its leaves' roles, and everything applied from
outside (initialisation, parallelism, optimizers) asks here.

A block that uses parameters in float32, whatever the compute dtype, says `full_precision = True`: they are then never
rounded on their way between processes.

A block that has columns and rows can be cut between processes (`treadle.parallel.tensor`): each computes some of the
columns and what follows from them, and the rows' outputs are added up. What else it has to say for that are facts of
the class:

    entry        the column `Linear` that alone reads the block's input, where there is such a one
    exit         the row `Linear` whose output is the block's, where there is
    head_counts  {attribute: parts of its columns}: attributes that say how many heads of a kind there are. Each
                 process has its share of them. Where they are fewer than processes, those that have parts here (keys
                 and values in grouped-query attention) are shared: a process has the one that its own heads need

and for an object with norms whose weights differ by head `norms_of_heads`, {norm: (attribute of head_counts, over)},
over being "all" where the heads are normed as one vector, and "own" where each is by itself.

A block whose children score choices, such as a router's gate, names them in `scorers`: their rows, like those of a
head, are vectors with a meaning of their own, and no part of a map between features.
"""

from typing import Literal, cast, get_args

from torch import nn

# column: output features may be split; row: input features may be split, the output joins the residual stream;
# vocab: rows are tokens; norm: a vector over features; expert: the first dimension counts experts, which may
# live apart; replicate: whole everywhere.
Role = Literal["column", "row", "vocab", "norm", "expert", "replicate"]


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter, by its full name. Raises ValueError for a parameter whose block names no role."""
    roles: dict[str, Role] = {}
    modules = dict(model.named_modules())
    for name, _ in model.named_parameters():
        roles[name] = _namer(name, modules)[0]
    return roles


def is_matrix(name: str, role: Role, parameter: nn.Parameter) -> bool:
    """Whether a parameter maps vectors, or holds one per token: no norm's factor, bias, filter or other vector."""
    return role != "norm" and not name.endswith("bias") and parameter.ndim == (3 if role == "expert" else 2)


def feature_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices, alone or one for each expert, that map features to features: no table, head or score."""
    modules = dict(model.named_modules())
    found = {}
    for name, parameter in model.named_parameters():
        role, block, child = _namer(name, modules)
        scores = child in getattr(block, "scorers", ())
        if role != "vocab" and not scores and is_matrix(name, role, parameter):
            found[name] = parameter
    return found


def _namer(name: str, modules: dict[str, nn.Module]) -> tuple[Role, nn.Module, str]:
    """A parameter's role, the block that names it, and what it names: walking up, the nearest decides."""
    path, child = name.rpartition(".")[::2]
    while True:
        role = getattr(modules[path], "roles", {}).get(child)
        if role is not None:
            if role not in get_args(Role):
                raise ValueError(f"{path}: role '{role}' of '{child}' is unknown; known: {', '.join(get_args(Role))}")
            return cast(Role, role), modules[path], child
        if not path:
            raise ValueError(f"parameter {name} has no role: add it to `roles` of the block that owns it")
        path, child = path.rpartition(".")[::2]
