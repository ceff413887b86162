"""A step's gradient does not depend on how its rows are cut into micro-batches."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from train_zoo import VOCABULARY, gradients, make_loader, make_model

from treadle.errors import ConfigError
from treadle.train.forward_backward import forward_backward
from treadle.train.losses import Loss, cross_entropy


def step(model, batches, **options):
    model.zero_grad(set_to_none=True)
    result = forward_backward(model, batches, options.pop("loss", cross_entropy), **options)
    return result, gradients(model)


def uneven(batch):
    """The batch with every seventh token's value not to be predicted: rows then differ in how many targets count."""
    targets_BS = batch.targets_BS.masked_fill(batch.targets_BS % 7 == 0, -100)
    return replace(batch, targets_BS=targets_BS, valid_tokens=int((targets_BS != -100).sum()))


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_micro_batches_add_up_to_the_whole(rows, tied, dtype, tolerance):
    model, loader = make_model(tied=tied).to(dtype), make_loader(batch_size=8)
    model.dtype = dtype
    pieces = [uneven(piece) for piece in loader.micro_batches(3, rows)]
    counts = [piece.valid_tokens for piece in pieces]
    assert len(set(counts)) > 1 or rows == 8, "the case is an uneven one"
    whole, expected = step(model, [uneven(loader.batch(3))])
    result, found = step(model, pieces)
    assert result.tokens == whole.tokens == sum(counts)
    torch.testing.assert_close(result.loss, whole.loss, rtol=0, atol=tolerance)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_it_is_the_mean_cross_entropy_by_plain_pytorch():
    model, loader = make_model().double(), make_loader(batch_size=6)
    model.dtype = torch.float64
    batch = uneven(loader.batch(0))
    assert 0 < batch.valid_tokens < batch.targets_BS.numel()
    result, found = step(model, [uneven(piece) for piece in loader.micro_batches(0, 2)])
    model.zero_grad(set_to_none=True)
    logits = model(batch.tokens_BS, batch.context).flatten(0, 1)
    loss = F.cross_entropy(logits, batch.targets_BS.flatten(), ignore_index=-100)
    loss.backward()
    torch.testing.assert_close(result.loss, loss.detach(), rtol=0, atol=1e-12)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-12)


def test_a_micro_batch_without_targets_changes_nothing():
    model, loader = make_model(), make_loader()
    batch = loader.batch(0)
    empty = replace(batch, targets_BS=torch.full_like(batch.targets_BS, -100), valid_tokens=0)
    result, found = step(model, [batch, empty])
    alone, expected = step(model, [batch])
    torch.testing.assert_close(result.loss, alone.loss)
    torch.testing.assert_close(found, expected)


def test_no_token_at_all_is_refused():
    batch = make_loader().batch(0)
    empty = replace(batch, targets_BS=torch.full_like(batch.targets_BS, -100), valid_tokens=0)
    with pytest.raises(ValueError, match="no token"):
        forward_backward(make_model(), [empty, empty], cross_entropy)


@pytest.mark.parametrize("scale", [1024.0, torch.tensor(1024.0)])
def test_loss_scale_scales_the_gradient_only(scale):
    model, batches = make_model(), make_loader().micro_batches(0, 2)
    plain, expected = step(model, batches)
    scaled, found = step(model, batches, loss_scale=scale)
    assert scaled.loss == plain.loss
    for name, grad in found.items():
        torch.testing.assert_close(grad, 1024 * expected[name], rtol=1e-6, atol=0)


def test_gradients_add_to_what_is_there():
    model, batches = make_model(), [make_loader().batch(0)]
    _, once = step(model, batches)
    forward_backward(model, batches, cross_entropy)
    torch.testing.assert_close(gradients(model), {name: 2 * grad for name, grad in once.items()})


def test_metrics_are_means_over_tokens():
    def loss(model, batch):
        right = (model(batch.tokens_BS, batch.context).argmax(-1) == batch.targets_BS).sum()
        return Loss(cross_entropy(model, batch).total, {"accuracy": right.float()})

    model, loader = make_model(), make_loader(batch_size=8)
    whole, _ = step(model, [loader.batch(0)], loss=loss)
    parts, _ = step(model, loader.micro_batches(0, 2), loss=loss)
    torch.testing.assert_close(parts.metrics, whole.metrics)


def test_z_loss_is_the_squared_log_partition_function():
    model, batch = make_model(init={"kind": "normal", "std": 0.3}), make_loader().batch(0)
    logits = model(batch.tokens_BS, batch.context).detach()
    counted = logits.logsumexp(-1)[batch.targets_BS != -100]
    with_z = cross_entropy(model, batch, z_loss=0.1).total - cross_entropy(model, batch).total
    torch.testing.assert_close(with_z.detach(), 0.1 * counted.square().sum(), rtol=1e-4, atol=1e-4)


def test_the_named_attention_backend_computes_the_loss():
    model, batch = make_model(), make_loader().batch(0)
    with pytest.raises(ConfigError, match=r"attention backend 'flash' cannot be used here: it runs on CUDA only"):
        cross_entropy(model, batch, attention="flash")
    reference = partial(cross_entropy, attention="reference")
    torch.testing.assert_close(reference(model, batch).total, cross_entropy(model, batch).total)


def test_loss_of_an_untrained_model_is_that_of_a_guess():
    result, _ = step(make_model(), [make_loader().batch(0)])
    assert result.loss.item() == pytest.approx(torch.tensor(VOCABULARY).log().item(), abs=0.1)
