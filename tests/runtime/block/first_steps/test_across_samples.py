"""Which losses compare samples or are made of a batch's statistics, by their graphs alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bmtrain.autograd import mark_output
from bmtrain.block.first_steps.across_samples import AcrossSamples

B = 6
Make = Callable[[torch.Tensor], torch.Tensor]


def _found(model: Callable[..., Any], x: torch.Tensor, loss: Callable[..., torch.Tensor]) -> tuple[str, bool] | None:
    """What is said of ``loss(model(x))``, whose model takes ``x`` first."""
    torch.manual_seed(0)
    out = model(x)
    for tensor in out if isinstance(out, tuple) else (out,):
        mark_output(tensor.grad_fn)
    value = loss(*out) if isinstance(out, tuple) else loss(out)
    assert value.grad_fn is not None
    is_batch_first = x.dim() != 3 and not (x.dim() == 2 and not x.is_floating_point())
    return AcrossSamples(len(x), is_batch_first, x.dim() == 1).of(value.grad_fn)


def _off_diagonal(c: torch.Tensor) -> torch.Tensor:
    return c.flatten()[:-1].view(len(c) - 1, len(c) + 1)[:, 1:]


def _barlow(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = (a - a.mean(0)) / a.std(0), (b - b.mean(0)) / b.std(0)
    c = a.T @ b / len(a)
    return (torch.diagonal(c) - 1).pow(2).sum() + 0.005 * _off_diagonal(c).pow(2).sum()


def _covariance(z: torch.Tensor) -> torch.Tensor:
    z = z - z.mean(dim=0)
    return _off_diagonal((z.T @ z) / (len(z) - 1)).pow(2).sum() / z.shape[1]


def _supervised(z: torch.Tensor) -> torch.Tensor:
    z, labels = F.normalize(z, dim=1), torch.arange(len(z)) % 2
    logits = z @ z.T / 0.1
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    mask = (labels[:, None] == labels[None]).float().fill_diagonal_(0)
    log_probs = logits - logits.exp().sum(1, keepdim=True).log()
    return -((mask * log_probs).sum(1) / mask.sum(1)).mean()


def _ntxent(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    z = F.normalize(torch.cat([a, b]), dim=1)
    similar = F.cosine_similarity(z.unsqueeze(1), z.unsqueeze(0), dim=2) / 0.5
    similar = similar.masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(similar, torch.arange(len(z)).roll(len(a)))


def _infonce(z: torch.Tensor) -> torch.Tensor:
    z = F.normalize(z, dim=-1)
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)))


def _two(z: torch.Tensor) -> torch.Tensor:
    a, b = F.normalize(z, dim=-1), F.normalize(z.tanh(), dim=-1)
    logits = 10 * torch.einsum("id,jd->ij", a, b)
    labels = torch.arange(len(z))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def _hard(z: torch.Tensor) -> torch.Tensor:
    distances = torch.cdist(z, z)
    return F.relu(distances.max(1)[0] - distances.min(1)[0] + 0.3).mean()


COMPARES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "products": _infonce,
    "two towers": _two,
    "supervised": _supervised,
    "hardest triplets": _hard,
    "distances": lambda z: torch.exp(-torch.cdist(z, z)).mean().log(),
    "uniformity": lambda z: torch.pdist(F.normalize(z, dim=1)).pow(2).mul(-2).exp().mean().log(),
    "differences": lambda z: (z[:, None] - z[None, :]).square().sum(-1).sqrt().add(1).log().mean(),
    "differences of scores": lambda z: F.softplus(z[:, 0][:, None] - z[:, 0][None]).mean(),
    "kernel": lambda z: torch.exp(-((z.unsqueeze(1) - z.unsqueeze(0)) ** 2).sum(2)).mean(),
    "cosine": lambda z: F.cosine_similarity(z[:, None], z[None], dim=-1).square().mean(),
    "inner": lambda z: torch.inner(z, z).logsumexp(1).mean(),
    "batched": lambda z: torch.bmm(z[None], z.t()[None])[0].softmax(-1).square().mean(),
    "softmax over samples": lambda z: (z.softmax(0) * torch.randn(B, 8)).sum(),
    "hard examples": lambda z: F.cross_entropy(z, torch.zeros(B, dtype=torch.long), reduction="none").topk(3)[0].mean(),
    "ranked": lambda z: z.sum(1).sort()[0].diff().square().mean(),
    "views": lambda z: F.cross_entropy(z.view(2, B // 2, 8)[0] @ z.view(2, B // 2, 8)[1].T, torch.arange(B // 2)),
    "beside another": lambda z: F.cross_entropy(z, torch.zeros(B, dtype=torch.long)) + 0.1 * _infonce(z),
    "three dimensions": lambda z: _infonce(z.view(B, 2, 4).mean(1)),
    "rolled": lambda z: F.mse_loss(z, z.roll(1, 0)),
    "rolled as one": lambda z: (z - z.roll(3)).square().mean(),
    "flipped": lambda z: F.mse_loss(z, z.flip(0)),
    "flipped twice": lambda z: (z * z.flip([0, 1])).mean().tanh(),
    "the worst": lambda z: z.abs().max(),
    "the worst, beside another": lambda z: z.square().mean() + 0.1 * z.amax(),
    "the median": lambda z: z.square().mean(1).median(),
}  # fmt: skip
STATISTICS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "barlow": lambda z: _barlow(z, z.tanh()),
    "covariance": _covariance,
    "variance": lambda z: F.relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean(),
    "deviation": lambda z: F.relu(1 - z.std(0)).mean(),
    "feature matching": lambda z: F.mse_loss(z.mean(0), torch.zeros(8)),
    "diversity": lambda z: (p := z.softmax(1).mean(0)).mul(p.log()).sum(),
    "importance": lambda z: (i := z.softmax(1).sum(0)).var() / i.mean() ** 2,
    "normalized": lambda z: ((z - z.mean(0)) / z.std(0)).square().mean(),
    "gram": lambda z: (z.t() @ z / B - torch.eye(8)).square().mean(),
    "torch.cov": lambda z: torch.cov(z.T).square().mean(),
    "norm over samples": lambda z: F.normalize(z, dim=0).tanh().sum(),
    "dice of classes": lambda z: 1 - (2 * (z.sigmoid() * 0.5).sum(0) / (z.sigmoid().sum(0) + 1)).mean(),
    "centred": lambda z: (z - z.mean()).square().mean(),
    "centred by feature": lambda z: (z - z.mean(0)).square().mean(),
    "centred, times what samples have": lambda z: ((z - z.mean(0)) * torch.randn(B, 8)).mean(),
    "centred, beside itself": lambda z: ((z.mean(0) - z) * z).sum() / B,
    "centred, then a layer": lambda z: ((z - z.mean(0)) @ torch.randn(8, 3)).relu().mean(),
    "spread": lambda z: z.var(),
    "spread, weighed": lambda z: z.square().mean() + 0.1 * (1 - z.std()),
    "length": lambda z: z.norm(),
    "length of an error": lambda z: torch.linalg.vector_norm(z - 1) / B,
    "product": lambda z: (1 + z.mean(1) / 10).prod(),
    "volume": lambda z: -torch.logdet(z.t() @ z / B + torch.eye(8)),
    "sign and volume": lambda z: -torch.linalg.slogdet(z.t() @ z + torch.eye(8))[1],
    "whitened": lambda z: torch.linalg.cholesky(z.t() @ z + torch.eye(8)).diagonal().log().sum(),
    "rank": lambda z: torch.linalg.eigvalsh(z.t() @ z).add(1).log().sum(),
}  # fmt: skip


def _net(width: int = 8) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, width))


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("name", [*COMPARES, *STATISTICS])
def test_losses_of_several_samples_are_found(name: str, where: str) -> None:
    net, loss = _net(), (COMPARES | STATISTICS)[name]
    if where == "outside":
        found = _found(net, torch.randn(B, 5), loss)
    else:
        found = _found(lambda x: loss(net(x)), torch.randn(B, 5), lambda value: value)
    assert found is not None and found[1] == (name in COMPARES)


def test_two_views_are_found() -> None:
    net = _net()
    assert _found(lambda x: (net(x), net(x + 1)), torch.randn(B, 5), _ntxent) == ("a product of samples", True)
    assert _found(lambda x: (net(x), net(x + 1)), torch.randn(B, 5), _barlow) is not None


class _Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.scale = _net(), nn.EmbeddingBag(10, 8), nn.Parameter(torch.ones(()))

    def forward(self, image: torch.Tensor) -> Any:
        text = self.text(torch.arange(3 * len(image)).view(-1, 3) % 10)
        image, text = F.normalize(self.image(image), dim=-1), F.normalize(self.image(image.flip(1)) + text, dim=-1)
        logits = self.scale.exp() * image @ text.t()
        return logits, logits.t()


def test_logits_of_a_model_are_found() -> None:
    labels = torch.arange(B)
    loss = lambda a, b: F.cross_entropy(a, labels) + F.cross_entropy(b, labels)  # noqa: E731
    assert _found(_Clip(), torch.randn(B, 5), loss) is not None


# -- ordinary models ------------------------------------------------------------------------------------------------


class _Attention(nn.Module):
    """Of tokens, by hand, with a mask and positions."""

    def __init__(self, batch_first: bool = True, table: bool = True) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(11, 8), nn.Embedding(12, 8)
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 11)
        self.norm, self.first, self.table = nn.LayerNorm(8), batch_first, table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        places = torch.arange(x.shape[1])
        x = x + (self.places(places) if self.table else self.places(places[None]))
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) + torch.full((t, t), -1e9).triu(1)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))
        return self.head(x)  # type: ignore[no-any-return]


class _Recurrent(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(5, 8, batch_first=batch_first), nn.Linear(8, 4)
        self.first = batch_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, (last, _) = self.rnn(x)
        return self.head(out.mean(1 if self.first else 0).tanh() + last[-1])  # type: ignore[no-any-return]


class _Additive(nn.Module):
    """Attention as a sum of what each token asks and offers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(5, 8) for _ in range(4))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = (self.q(x)[:, :, None] + self.k(x)[:, None]).tanh().sum(-1)
        return self.head((scores.softmax(-1) @ self.v(x)).mean(1))  # type: ignore[no-any-return]


class _Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.cls, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 17, 8))
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), 1) + self.places
        return self.head(self.layer(x)[:, 0])  # type: ignore[no-any-return]


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.GroupNorm(2, 6)
        )
        self.squeeze, self.head = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        x = x * self.squeeze(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class _Square(nn.Module):
    """Features as many as samples, products and norms of weights, weights that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, B), nn.utils.parametrizations.weight_norm(nn.Linear(B, B))
        self.c, self.d = nn.Parameter(torch.randn(B, B)), nn.Parameter(torch.randn(B, 5))
        self.mask = torch.ones(B, B).tril()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.a(x).relu()) @ (self.c * self.mask).T + x @ self.d.T
        return x + x @ (self.d @ self.d.T) + x * self.c.mean(0)


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts, self.head = (
            nn.Linear(5, 2),
            nn.ModuleList([nn.Linear(5, 8) for _ in range(2)]),
            nn.Linear(8, 4),
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gates = self.gate(x).softmax(-1)
        out, chosen = 0, gates.argmax(-1)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            out = out + torch.zeros(len(x), 8).index_add(0, rows, expert(x[rows]) * gates[rows, index][:, None])
        share = F.one_hot(chosen, 2).float().mean(0)
        return self.head(out), 2 * (gates.mean(0) * share).sum()


class _Bag(nn.Module):
    """Of instances or nodes, which attend to each other, the class of all together."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.head, self.kind = _net(), nn.Linear(8, 4), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.net(x)
        if self.kind == "mean":
            return self.head(x.mean(0, keepdim=True).relu())  # type: ignore[no-any-return]
        if self.kind == "weights":
            return self.head((x[:, 0].softmax(0)[:, None] * x).sum(0)[None])  # type: ignore[no-any-return]
        scores = (x[:, :1] + x[:, 1:2].T).tanh().softmax(1)
        return self.head(scores @ x + (x @ x.T).softmax(1) @ x)  # type: ignore[no-any-return]


class _Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(5, 8), nn.Linear(4, 5)
        self.codes = nn.Parameter(torch.randn(B, 4))

    def forward(self, x: torch.Tensor) -> Any:
        mean, spread = self.encode(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * spread).exp()
        distances = z.square().sum(1, keepdim=True) - 2 * z @ self.codes.T + self.codes.square().sum(1)
        z = z + (self.codes[distances.argmin(1)] - z).detach() + 0 * torch.cdist(z, self.codes).sum(1, keepdim=True)
        return self.decode(z), mean, spread


def _classes(out: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out, torch.zeros(len(out), dtype=torch.long))


def _tokens(out: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(
        out[:, :-1].reshape(-1, out.shape[-1]), torch.zeros(out[:, :-1].numel() // out.shape[-1], dtype=torch.long)
    )


def _variational(out: torch.Tensor, mean: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    divergence = -0.5 * (1 + spread - mean.pow(2) - spread.exp()).sum(1)
    return F.mse_loss(out, torch.zeros_like(out), reduction="none").sum(1).mean() + divergence.mean()


def _penalised(x: torch.Tensor) -> torch.Tensor:
    critic, real = _net(1), x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(real).sum(), real, create_graph=True)
    return critic(x).mean() - critic(-x).mean() + 10 * (gradient.norm(2, dim=1) - 1).square().mean()


def _policy(out: torch.Tensor) -> torch.Tensor:
    chosen, advantage = out.log_softmax(-1)[:, 0], torch.randn(len(out))
    ratio = (chosen - chosen.detach()).exp()
    entropy = -(out.softmax(-1) * out.log_softmax(-1)).sum(-1)
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean() - 0.01 * entropy.mean()


def _preferences(out: torch.Tensor) -> torch.Tensor:
    scores = out.log_softmax(-1)[:, 0]
    chosen, rejected = scores[: len(out) // 2], scores[len(out) // 2 :]
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


class _Rows(torch.autograd.Function):
    """Gathers, as users write it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad[:B]


class _EachRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.clone(), x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grads[0]


class _Views(nn.Module):
    """Of each sample some views."""

    def __init__(self, shifts: tuple[float, ...]) -> None:
        super().__init__()
        self.net, self.shifts = _net(), shifts

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.net(x + shift) for shift in self.shifts)


def _encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16)


def _pixels(out: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out, torch.zeros(B, 6, 6, dtype=torch.long))


IDS, IMAGES, ROWS = torch.arange(B * 7).view(B, 7) % 11, torch.randn(B, 3, 8, 8), torch.randn(B, 5)
PROTOTYPES, SQUARE = nn.Parameter(torch.randn(B, 8)), nn.Parameter(torch.randn(B, B))
ORDINARY: dict[str, tuple[Callable[[], Any], torch.Tensor, Callable[..., torch.Tensor]]] = {
    "perceptron": (_net, ROWS, _classes),
    "as many features as samples": (_Square, ROWS, _classes),
    "as many classes as samples": (lambda: _net(B), ROWS, _classes),
    "attention": (_Attention, IDS, _tokens),
    "as many tokens as samples": (_Attention, IDS[:, :B], _tokens),
    "tokens a multiple of samples": (_Attention, IDS[:3, :6], _tokens),
    "positions in a row": (lambda: _Attention(table=False), IDS[:, :B], _tokens),
    "additive attention": (_Additive, torch.randn(B, B, 5), _classes),
    "encoder, length first": (_encoder, torch.randn(7, B, 8), lambda out: _classes(out.mean(0))),
    "encoder, square": (_encoder, torch.randn(B, B, 8), lambda out: _classes(out.mean(0))),
    "LSTM": (lambda: _Recurrent(True), torch.randn(B, 7, 5), _classes),
    "LSTM, length first": (lambda: _Recurrent(False), torch.randn(7, B, 5), _classes),
    "LSTM, square": (lambda: _Recurrent(False), torch.randn(B, B, 5), _classes),
    "patches": (_Patches, IMAGES, _classes),
    "convolutions": (_Convolutions, IMAGES, _classes),
    "segmentation": (lambda: nn.Conv2d(3, 4, 3), IMAGES, _pixels),
    "a bag of instances": (lambda: _Bag("weights"), ROWS, _classes),
    "a graph": (lambda: _Bag("mean"), ROWS, _classes),
    "attention among the rows": (lambda: _Bag("scores"), ROWS, _classes),
    "experts": (_Experts, ROWS, lambda out, balance: _classes(out) + 0.01 * balance),
    "variational": (_Autoencoder, ROWS, _variational),
    "gradient penalty": (lambda: _penalised, ROWS, lambda loss: loss),
    "policy": (_net, ROWS, _policy),
    "preferences": (_net, ROWS, _preferences),
    "similar to its own view": (
        lambda: _Views((0, 1)), ROWS, lambda a, b: -F.cosine_similarity(a, b.detach()).mean()
    ),
    "triplets that are given": (lambda: _Views((0, 1, 2)), ROWS, F.triplet_margin_loss),
    "its own products": (_net, ROWS, lambda z: torch.einsum("id,ie->ide", z, z).tanh().mean()),
    "products of each with itself": (_net, ROWS, lambda z: -(z[:, None] @ z[:, :, None]).sigmoid().log().mean()),
    "prototypes": (_net, ROWS, lambda z: _classes(-torch.cdist(z, PROTOTYPES)) + _classes(z @ PROTOTYPES.T)),
    "differences from prototypes": (
        _net, ROWS, lambda z: _classes(-(z[:, None] - PROTOTYPES[None]).square().sum(2))
    ),
    "weights decay": (_net, ROWS, lambda z: _classes(z) + (SQUARE @ SQUARE.T - torch.eye(B)).square().sum()),
    "a table of users": (lambda: nn.Embedding(9, 8), torch.arange(B), lambda z: z.square().sum(1).sigmoid().mean()),
    "shifted before an exponent": (_net, ROWS, lambda z: (z - z.max()).exp().sum(1).log().mean()),
    "mirrored pictures": (_Convolutions, IMAGES, lambda z: _classes(z + z.flip(1) + z.roll(1, -1))),
    "moved windows": (
        lambda: nn.Conv2d(3, 4, 3), IMAGES, lambda z: _pixels(z.roll((1, 1), (2, 3)).flip([2, 3]))
    ),
    "centred features": (_net, ROWS, lambda z: (z - z.mean(1, keepdim=True)).square().mean()),
    "centred, linear": (_net, ROWS, lambda z: ((z - 0.5 * z.mean(0)) * torch.randn(8)).mean()),
    "volume of each": (_net, ROWS, lambda z: torch.logdet(z[:, :, None] * z[:, None] + torch.eye(8)).mean()),
    "length of weights": (_net, ROWS, lambda z: _classes(z) + SQUARE.norm() + SQUARE.max() + SQUARE.var()),
    "spread of features": (_net, ROWS, lambda z: (z.std(1) + z.norm(dim=1) + z.max(1)[0]).mean()),
    "sum and number": (_net, ROWS, lambda z: z.square().sum() / len(z) + z.mean(0).sum()),
    "top classes": (_net, ROWS, lambda z: z.topk(2, dim=-1)[0].softmax(-1).square().mean()),
    "rows of all ranks": (_net, ROWS, lambda z: _infonce(_Rows.apply(z))),
    "rows of other ranks": (_net, ROWS, lambda z: _infonce(torch.cat([z, z.detach() + 1]))),
    "rows of all ranks, one by one": (_net, ROWS, lambda z: _infonce(torch.cat(_EachRanks.apply(z)))),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_models_are_left_alone(name: str) -> None:
    make, x, loss = ORDINARY[name]
    model = make()
    assert _found(model, x, loss) is None
    if not isinstance(model(x), tuple) and not isinstance(model, _Bag):
        assert _found(lambda x: loss(model(x)), x, lambda value: value) is None
