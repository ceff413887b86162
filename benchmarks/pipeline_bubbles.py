"""Idle time and activations of each pipeline schedule, from the order in which PyTorch runs it, without running it.

    python benchmarks/pipeline_bubbles.py --processes 4 --micro-batches 8 --micro-batches 32

A stage's forward, its backward by the inputs and that by the weights take the same time each (as matmuls do), and
sending takes none. Every process has as many layers as the others, however many stages it cuts them into.
"""

import logging
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.testing._internal.distributed.fake_pg import FakeStore

from treadle.parallel.config import SINGLE, Schedule
from treadle.parallel.pipeline import CLASSES

FORWARD, INPUT, WEIGHT, FULL = "FORWARD", "BACKWARD_INPUT", "BACKWARD_WEIGHT", "FULL_BACKWARD"
Action = tuple[str, int, int]  # what, stage, micro-batch
SECONDS = {FORWARD: 1.0, INPUT: 1.0, WEIGHT: 1.0, FULL: 2.0}


def orders(schedule: Schedule, processes: int, number: int) -> tuple[dict[int, list[Action]], int]:
    """What each process does, in order, and how many stages there are."""
    each = 1 if schedule in SINGLE else 2
    stages = [PipelineStage(nn.Identity(), index, processes * each, torch.device("cpu")) for index in range(each)]
    kind: Any = get_schedule_class(CLASSES[schedule])
    made = kind(stages[0] if each == 1 else stages, number, loss_fn=lambda *_: None)
    if schedule == "1f1b":  # PyTorch's own table of it lacks the last process's first forward (2.13)
        return {rank: one_forward_one_backward(rank, processes, number) for rank in range(processes)}, processes
    return {rank: actions(order) for rank, order in made.pipeline_order.items()}, processes * each


def one_forward_one_backward(rank: int, processes: int, number: int) -> list[Action]:
    ahead = min(number, processes - rank)
    order = [(FORWARD, rank, micro) for micro in range(ahead)]
    for micro in range(number):
        order.append((FULL, rank, micro))
        order += [(FORWARD, rank, micro + ahead)] if micro + ahead < number else []
    return order


def actions(order: list[Any]) -> list[Action]:
    """The computations of a row of PyTorch's table."""
    found = []
    for action in order:
        for part in (action.sub_actions or (action,)) if action is not None else ():
            if part.computation_type.name in SECONDS:
                found.append((part.computation_type.name, part.stage_index, part.microbatch_index))
    return found


def simulate(schedule: Schedule, processes: int, number: int) -> tuple[float, float]:
    """Share of the time that processes are idle; most activations on one, in micro-batches of all its layers."""
    waiting, stages = orders(schedule, processes, number)
    each = stages // processes
    done: dict[Action, float] = {}
    clock, held, peak, busy = dict.fromkeys(waiting, 0.0), dict.fromkeys(waiting, 0), dict.fromkeys(waiting, 0), 0.0
    while any(waiting.values()):
        before = len(done)
        for rank, row in waiting.items():
            while row:
                what, stage, micro = row[0]
                needed = [(FORWARD, stage - 1, micro)] if what == FORWARD and stage > 0 else []
                if what in (INPUT, FULL) and stage < stages - 1:
                    needed.append((INPUT, stage + 1, micro))
                if not all(need in done for need in needed):
                    break
                start = max([clock[rank], *(done[need] for need in needed)])
                took = SECONDS[what] / each
                clock[rank], busy = start + took, busy + took
                # A whole backward's gradient of the input is there halfway, but PyTorch sends it at the end.
                done[INPUT if what == FULL else what, stage, micro] = clock[rank]
                held[rank] += {FORWARD: 1, FULL: -1, WEIGHT: -1, INPUT: 0}[what]
                peak[rank] = max(peak[rank], held[rank])
                row.pop(0)
        assert len(done) > before, "the order waits for itself"
    return 1 - busy / (processes * max(clock.values())), max(peak.values()) / each


def main(
    processes: Annotated[int, typer.Option(help="processes of the pipeline")] = 4,
    micro_batches: Annotated[list[int] | None, typer.Option(help="numbers of them to compare")] = None,
) -> None:
    logging.disable(logging.CRITICAL)
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    numbers = micro_batches or [8, 32]  # dualpipev needs at least two for each process
    table = Table("schedule", *(f"idle, {n}" for n in numbers), *(f"held, {n}" for n in numbers))
    for schedule in CLASSES:
        found = [simulate(schedule, processes, number) for number in numbers]
        table.add_row(schedule, *(f"{idle:.1%}" for idle, _ in found), *(f"{held:g}" for _, held in found))
    Console().print(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
