"""MoRA on many shapes, in float64, against the paper's equations written out element by element."""

import itertools
import math

import pytest
import torch

from treadle.finetune.mora import mora, square_size

SHAPES = [(64, 64, 2), (64, 172, 2), (172, 64, 2), (96, 96, 8), (64, 64, 32), (128, 32, 8), (32, 128, 8), (30, 50, 3)]


def groups(features, size):
    """The group of each feature: the first `features % size` groups have one more than the others."""
    sizes = [features // size + (group < features % size) for group in range(size)]
    return [group for group, count in enumerate(sizes) for _ in range(count)]


def matrix(square, inputs, outputs, kind):
    """The update as the paper defines it: what output o gets from input i."""
    size = len(square)
    found = torch.zeros(outputs, inputs, dtype=torch.float64)
    blocks = -(-inputs // size)
    padded = [i % inputs for i in range(blocks * size)]  # circular
    if kind == 6:
        whole = torch.zeros(blocks * size, inputs, dtype=torch.float64)
        for block in range(blocks):
            turn = torch.zeros(size, size, dtype=torch.float64)
            for k, half in itertools.product(range(size), (size // 2,)):
                angle = block * 10000 ** (-2 * (k % half) / size)
                turn[k, k] = math.cos(angle)
                turn[k, (k + half) % size] = -math.sin(angle) if k < half else math.sin(angle)
            part = square @ turn
            for column in range(size):
                whole[block * size : (block + 1) * size, padded[block * size + column]] += part[:, column]
        return torch.stack([whole[o % len(whole)] for o in range(outputs)])
    into = [(i, n % size) for n, i in enumerate(padded)] if kind in (1, 4) else list(enumerate(groups(inputs, size)))
    out = [o % size for o in range(outputs)] if kind in (1, 3) else groups(outputs, size)
    for o, (i, column) in itertools.product(range(outputs), into):
        found[o, i] += square[out[o], column]
    return found


@pytest.mark.parametrize(("kind", "shape"), itertools.product((1, 2, 3, 4, 6), SHAPES))
def test_an_update_is_the_papers_and_has_its_rank(kind, shape):
    inputs, outputs, rank = shape
    torch.manual_seed(0)
    size = square_size(inputs, outputs, rank, kind)
    assert abs(size * size - (inputs + outputs) * rank) <= 4 * size  # as many numbers as a pair of that rank
    square = torch.randn(size, size, dtype=torch.float64)
    expected = matrix(square, inputs, outputs, kind)
    x = torch.randn(3, 5, inputs, dtype=torch.float64)
    torch.testing.assert_close(mora(x, square, outputs, kind), x @ expected.T, atol=1e-11, rtol=0)
    if kind != 6:
        assert torch.linalg.matrix_rank(expected) == min(size, inputs, outputs)
    elif shape == (64, 64, 2):
        assert (size, torch.linalg.matrix_rank(expected)) == (16, 64)
