"""Losses, means over samples, accumulation, evaluation."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bmtrain as bmt

from .registry import idiom
from .user import CLASSES, User


def _loss(k: User, loss, **options):
    model = k.net(**options)
    return k.train(model, k.sgd(model), loss=loss)


@idiom
def label_smoothing(k: User):
    """`cross_entropy(label_smoothing=0.1)`"""
    return _loss(k, lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1))


@idiom
def class_weights_summed(k: User):
    """Class weights, a sum divided by the number of rows"""
    weight = torch.linspace(0.5, 2, 5, device=k.device)
    return _loss(k, lambda out, y: F.cross_entropy(out, y, weight=weight, reduction="none").mean())


@idiom(verdicts="right said said", says="different counts")
def class_weights(k: User):
    """`cross_entropy(weight=...)`: its mean is over the weights of the batch"""
    weight = torch.linspace(0.5, 2, 5, device=k.device)
    return _loss(k, lambda out, y: F.cross_entropy(out, y, weight=weight))


@idiom(verdicts="right said said", says="different counts")
def ignored_labels(k: User):
    """`cross_entropy` with labels of -100, different counts on the ranks"""
    return _loss(k, lambda out, y: F.cross_entropy(out, y.masked_fill(y < 2, -100)))


@idiom(verdicts="right said said", says="different counts")
def masked_mean(k: User):
    """`(loss * mask).sum() / mask.sum()`"""

    def loss(out, y):
        mask = (y > 1).float()
        return (F.cross_entropy(out, y, reduction="none") * mask).sum() / mask.sum()

    return _loss(k, loss)


@idiom(verdicts="right said said", says="different counts")
def masked_selection(k: User):
    """`cross_entropy(out[mask], y[mask])`"""
    return _loss(k, lambda out, y: F.cross_entropy(out[y > 1], y[y > 1]))


@idiom
def ignored_labels_converted(k: User):
    """Labels of -100 under `bmt.loss.FusedCrossEntropy`"""
    loss = k.cross_entropy(ignore_index=-100)
    return _loss(k, lambda out, y: loss(out, y.masked_fill(y < 2, -100)))


@idiom
def class_weights_converted(k: User):
    """Class weights in `bmt.loss.FusedCrossEntropy`"""
    loss = k.cross_entropy(weight=torch.linspace(0.5, 2, 5)).to(k.device)
    return _loss(k, loss)


@idiom
def masked_mean_converted(k: User):
    """`bmt.mean(loss, mask)`"""
    return _loss(k, lambda out, y: k.mean_of(F.cross_entropy(out, y, reduction="none"), (y > 1).float()))


@idiom
def masked_selection_converted(k: User):
    """`bmt.mean(loss[mask])`"""
    return _loss(k, lambda out, y: k.mean_of(F.cross_entropy(out[y > 1], y[y > 1], reduction="none")))


@idiom
def summed_by_rows(k: User):
    """`reduction="sum"` divided by the rows of the batch"""
    return _loss(k, lambda out, y: F.cross_entropy(out, y, reduction="sum") / len(y))


@idiom(verdicts="right said said", says="not a mean over this rank's samples")
def summed(k: User):
    """`cross_entropy(reduction="sum")` as it is"""
    return _loss(k, lambda out, y: F.cross_entropy(out, y, reduction="sum") * 0.3)


@idiom(verdicts="right said said", says="not a mean over this rank's samples")
def root_of_the_mean(k: User):
    """RMSE: `F.mse_loss(...).sqrt()`"""
    return _loss(k, lambda out, y: F.mse_loss(out, F.one_hot(y, CLASSES).float()).sqrt())


@idiom
def weights_of_samples(k: User):
    """A weight for each sample, mean over the rows"""
    return _loss(k, lambda out, y: (F.cross_entropy(out, y, reduction="none") * (y + 1.0)).mean())


@idiom
def focal(k: User):
    """Focal loss"""

    def loss(out, y):
        ce = F.cross_entropy(out, y, reduction="none")
        return ((1 - torch.exp(-ce)) ** 2 * ce).mean()

    return _loss(k, loss)


@idiom
def binary(k: User):
    """`binary_cross_entropy_with_logits` with `pos_weight`"""
    weight = torch.linspace(1, 2, 5, device=k.device)
    return _loss(k, lambda out, y: F.binary_cross_entropy_with_logits(out, F.one_hot(y, 5).float(), pos_weight=weight))


@idiom
def several(k: User):
    """MSE, Huber and a weighted sum of losses"""
    return _loss(k, lambda out, y: F.mse_loss(out[:, 0], y.float()) + 0.5 * F.huber_loss(out[:, 1], y.float()))


@idiom
def distillation(k: User):
    """KL divergence to a frozen teacher's outputs"""
    teacher, model = k.net(layers=3), k.net()
    teacher.eval().requires_grad_(False)
    manager = k.sgd(model)
    for x, y in k.batches():
        with torch.no_grad():
            wanted = (teacher(x) / 2).softmax(-1)
        out = model(x)
        soft = F.kl_div((out / 2).log_softmax(-1), wanted, reduction="batchmean") * 4
        k.step(manager, 0.5 * F.cross_entropy(out, y) + 0.5 * soft)
    return {"weights": k.weights(model), "teacher": k.weights(teacher)}


@idiom
def triplets(k: User):
    """Triplet loss, three forwards"""
    model = k.net()
    manager = k.sgd(model)
    for x, _ in k.batches():
        k.step(manager, F.triplet_margin_loss(model(x), model(x + 0.1), model(-x)))
    return model


@idiom
def ctc(k: User):
    """CTC loss, mean over the batch by hand"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        out = model(x.unsqueeze(1).expand(-1, 4, -1) * torch.arange(1, 5, device=k.device)[:, None]).log_softmax(-1)
        lengths = torch.full((len(x),), 4), torch.ones(len(x), dtype=torch.long)
        k.step(manager, F.ctc_loss(out.transpose(0, 1), y[:, None].clamp(min=1), *lengths, reduction="none").mean())
    return model


@idiom
def loss_module_with_weights(k: User):
    """A loss that is a module with parameters of its own, wrapped"""

    class Margin(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 5))

        def forward(self, f, y):
            return F.cross_entropy(5 * F.linear(F.normalize(f), F.normalize(self.weight)), y)

    model, margin = k.net(), k.shard(Margin())
    manager = k.sgd([*model.parameters(), *margin.parameters()])
    for x, y in k.batches():
        k.step(manager, margin(model(x), y))
    return {"model": k.weights(model), "margin": k.weights(margin)}


@idiom
def accumulated(k: User):
    """Gradient accumulation: `(loss / 3).backward()`"""
    model = k.net()
    manager = k.sgd(model)
    for number, (x, y) in enumerate(k.batches(6)):
        manager.backward(F.cross_entropy(model(x), y) / 3)
        if number % 3 == 2:
            manager.step()
            manager.zero_grad()
    return model


@idiom
def accumulated_with_a_rest(k: User):
    """Accumulation whose last group is smaller"""
    model = k.net()
    manager = k.sgd(model)
    for number, (x, y) in enumerate(k.batches(4)):
        manager.backward(F.cross_entropy(model(x), y) / 3)
        if number in (2, 3):
            manager.step()
            manager.zero_grad()
    return model


@idiom
def accumulated_by_plain_backward(k: User):
    """Accumulation by `loss.backward()`, the step by the manager"""
    model = k.net()
    manager = k.sgd(model)
    for number, (x, y) in enumerate(k.batches(4)):
        (F.cross_entropy(model(x), y) / 2).backward()
        if number % 2:
            manager.step()
            manager.zero_grad()
    return model


@idiom
def backward_twice(k: User):
    """Two backwards through one graph: `retain_graph=True`"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        out = model(x)
        manager.zero_grad()
        if k.sharded:
            manager.scale_loss(F.cross_entropy(out, y)).backward(retain_graph=True)
        else:
            F.cross_entropy(out, y).backward(retain_graph=True)
        manager.backward(out.square().mean())
        manager.step()
    return model


@idiom
def two_losses_two_backwards(k: User):
    """Two forwards and two backwards before one step"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        manager.zero_grad()
        manager.backward(F.cross_entropy(model(x), y))
        manager.backward(model(-x).square().mean())
        manager.step()
    return model


@idiom
def gradient_of_the_output(k: User):
    """`out.backward(gradient)`"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        manager.zero_grad()
        out = model(x)
        gradient = (out.softmax(-1) - F.one_hot(y, 5)).detach() / len(y)
        manager.backward((out * gradient).sum())
        manager.step()
    return model


@idiom(verdicts="right said said", says="bmt.mean")
def uneven_loader(k: User):
    """A loader whose last batch is shorter: 7 rows"""
    model = k.net()
    manager = k.sgd(model)
    data = TensorDataset(k.randn(19, 6).cpu(), k.randint(5, 19).cpu())
    for x, y in k.loader(DataLoader(data, batch_size=12)):
        k.step(manager, F.cross_entropy(model(x.to(k.device)), y.to(k.device)))
    return model


@idiom
def uneven_loader_converted(k: User):
    """The same with `bmt.mean` of the rows' losses"""
    model = k.net()
    manager = k.sgd(model)
    data = TensorDataset(k.randn(19, 6).cpu(), k.randint(5, 19).cpu())
    for x, y in k.loader(DataLoader(data, batch_size=12)):
        k.step(manager, k.mean_of(F.cross_entropy(model(x.to(k.device)), y.to(k.device), reduction="none")))
    return model


@idiom
def even_loader(k: User):
    """A shuffled loader, two epochs"""
    model = k.net()
    manager = k.sgd(model)
    data = TensorDataset(k.randn(24, 6).cpu(), k.randint(5, 24).cpu())
    loader = k.loader(DataLoader(data, batch_size=12, shuffle=True, generator=torch.Generator().manual_seed(3)))
    for _ in range(2):
        for x, y in loader:
            k.step(manager, F.cross_entropy(model(x.to(k.device)), y.to(k.device)))
    return model


@idiom
def loader_that_drops(k: User):
    """`drop_last=True`"""
    model = k.net()
    manager = k.sgd(model)
    data = TensorDataset(k.randn(19, 6).cpu(), k.randint(5, 19).cpu())
    for x, y in k.loader(DataLoader(data, batch_size=6, drop_last=True)):
        k.step(manager, F.cross_entropy(model(x.to(k.device)), y.to(k.device)))
    return model


@idiom(verdicts="right refused refused", says="multiple of")
def uneven_batch(k: User):
    """A batch of 7 rows, shared out"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches(rows=7):
        k.step(manager, F.cross_entropy(model(x), y))
    return model


@idiom
def bad_losses_are_skipped(k: User):
    """A step whose loss is NaN on all is left out by `continue`"""
    model = k.net()
    manager = k.sgd(model)
    for number, (x, y) in enumerate(k.batches(4)):
        loss = F.cross_entropy(model(x if number != 1 else x * float("nan")), y)
        if not math.isfinite(k.mean(loss)):
            continue
        k.step(manager, loss)
    return model


@idiom
def forward_without_backward(k: User):
    """A forward with gradients whose loss is thrown away, then steps"""
    model = k.net()
    manager = k.sgd(model)
    for number, (x, y) in enumerate(k.batches(4)):
        loss = F.cross_entropy(model(x), y)
        if number % 2:
            continue
        k.step(manager, loss)
    return model


@idiom
def evaluated_in_between(k: User):
    """Accuracy under `no_grad` between steps"""
    model, seen = k.net(), []
    manager = k.sgd(model)
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model(x), y))
        model.eval()
        with torch.no_grad():
            seen.append(k.mean((model(x).argmax(-1) == y).float().mean()))
        model.train()
    return {"seen": seen, "weights": k.weights(model)}


@idiom
def inference_mode(k: User):
    """`torch.inference_mode` between steps"""
    model, seen = k.net(), []
    manager = k.sgd(model)
    for x, y in k.batches():
        with torch.inference_mode():
            seen.append(k.mean(F.cross_entropy(model(x), y)))
        k.step(manager, F.cross_entropy(model(x), y))
    return {"seen": seen, "weights": k.weights(model)}


@idiom
def grad_switched_off(k: User):
    """`torch.set_grad_enabled(phase == "train")`"""
    model = k.net()
    manager = k.sgd(model)
    for number, (x, y) in enumerate(k.batches(4)):
        training = number % 2 == 0
        model.train(training)
        with torch.set_grad_enabled(training):
            loss = F.cross_entropy(model(x), y)
        if training:
            k.step(manager, loss)
        else:
            k.losses.append(k.mean(loss))
    return model


@idiom
def all_outputs_gathered(k: User):
    """Predictions of all ranks in the order of the data"""
    model = k.net()
    k.train(model, k.sgd(model))
    with torch.no_grad():
        return {"rows": k.gather(model(k.batch(7)[0]))}


@idiom
def perplexity(k: User):
    """`exp` of a mean loss over several batches"""
    model = k.net()
    k.train(model, k.sgd(model))
    with torch.no_grad():
        losses = [F.cross_entropy(model(x), y) for x, y in k.batches()]
    return {"perplexity": math.exp(k.mean(torch.stack(losses).mean()))}


def _rooted(k, mean):
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches(3):
        k.step(manager, mean((model(x) - F.one_hot(y, CLASSES)).square()).sqrt())
    return model


@idiom
def root_of_the_mean_converted(k: User):
    """RMSE: `bmt.mean(squares).sqrt()`"""
    return _rooted(k, k.mean_of)


@idiom(verdicts="right said said", says="bmt.mean(values)")
def root_of_the_mean_reduced(k: User):
    """The same by `bmt.distributed.all_reduce(squares.mean(), "avg")`, with its gradient"""
    return _rooted(
        k, lambda squares: bmt.distributed.all_reduce(squares.mean(), "avg") if k.sharded else squares.mean()
    )


@idiom
def root_of_the_mean_reduced_times_ranks(k: User):
    """The same, the loss's gradient times the number of ranks"""

    def mean(squares):
        if not k.sharded:
            return squares.mean()
        reduced = bmt.distributed.all_reduce(squares.mean(), "avg")
        return reduced.detach() + k.ranks * (reduced - reduced.detach())

    return _rooted(k, mean)
