"""A sum of a few losses, each a mean over the batch, is no sum over it: the ranks' mean is the batch's."""

from __future__ import annotations

import pytest

from ...helpers import IMPORTS, NET, converted

SCRIPT = (
    IMPORTS
    + NET
    + """
net = Net()
variances = nn.Parameter(torch.zeros(2))
opt = torch.optim.SGD([*net.parameters(), variances], lr=0.1)
w = torch.tensor([1.0, 2.0])


def weigh(losses):
    {weigh}


def make(out, y):
    return torch.stack([F.cross_entropy(out, y), F.mse_loss(out, y)])


for x, y in DataLoader(data, batch_size=8):
    out = net(x)
    a, b = F.cross_entropy(out, y), F.mse_loss(out, y)
    {body}
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
)
BOTH = "losses = torch.stack([a, b])\n    "


def is_sum(body: str, weigh: str = "pass") -> bool:
    after = converted(SCRIPT.format(body=body, weigh=weigh))
    assert ("backward(loss)" in after) != ("backward(loss * bmt.world_size())" in after)
    return "backward(loss * bmt.world_size())" in after


MEANS = {
    "by their uncertainty": BOTH + "loss = (torch.exp(-variances) * losses + variances).sum()",
    "by torch": BOTH + "loss = torch.sum(torch.exp(-net.variances) * losses + net.variances)",
    "halved": "loss = (0.5 * torch.exp(-variances) * torch.stack([a, b]) + 0.5 * variances).sum()",
    "divided": BOTH + "loss = (losses / w).sum()",
    "by squares": "loss = (torch.stack([a, b]) / (2 * variances**2) + torch.log(variances)).sum()",
    "less something": "loss = (torch.stack([a, b]) - w).sum()",
    "by methods": BOTH + "loss = losses.mul(torch.exp(-variances)).add(variances).sum()",
    "negated": "loss = (-torch.stack([a, b]) * -w).sum()",
    "some of them": BOTH + "loss = losses[:1].sum()",
    "moved": BOTH + "loss = (losses.to(x.device) * w).sum()",
    "changed, then added up": BOTH + "losses = losses * w\n    loss = losses.sum()",
    "added up under their own name": "loss = torch.stack([a, b])\n    loss = loss.sum()",
    "added up under their own name by torch": "loss = torch.stack([a, b])\n    loss = torch.sum(loss)",
    "scaled in place": BOTH + "losses *= w\n    loss = losses.sum()",
    "filled in": "losses = torch.zeros(2)\n    losses[0] = a\n    losses[1] = b\n    loss = losses.sum()",
    "in a list": "losses = list()\n    losses.append(a)\n    losses.append(b)\n    loss = torch.stack(losses).sum()",
    "in a dict": "losses = dict()\n    losses['a'] = a\n    loss = torch.stack(list(losses.values())).sum()",
    "extended": "losses = [a]\n    losses.extend([b])\n    loss = torch.stack(losses).sum()",
    "grown": "losses = []\n    losses += [a, b]\n    loss = torch.stack(losses).sum()",
    "in an attribute": "net.losses = [a, b]\n    loss = torch.stack(net.losses).sum()",
    "of columns": "loss = ((out - y) ** 2).mean(0).sum()",
    "of columns, by name": "loss = torch.mean((out - y) ** 2, dim=0).sum()",
    "of columns, weighed": "columns = ((out - y) ** 2).mean(dim=0)\n    loss = (columns * w).sum()",
    "of several dimensions": "loss = ((out - y) ** 2).mean((0, 2)).sum()",
    "by the argument's name": "loss = torch.stack(tensors=[a, b]).sum()",
    "in a dict that is called": "losses = dict(a=a, b=b)\n    loss = torch.stack(list(losses.values())).sum()",
    "in a list in a list": "losses = {'a': a}\n    loss = (torch.stack([*losses.values(), b]) * w).sum()",
    "of a function": "loss = torch.sum(make(out, y))",
    "of a function, named": "losses = make(out, y)\n    loss = (losses * w).sum()",
}


@pytest.mark.parametrize("body", MEANS.values(), ids=MEANS.keys())
def test_sums_of_means(body: str) -> None:
    assert not is_sum(body)


WEIGHING = {
    "at once": "return losses.sum()",
    "scaled": "return (losses / 2).sum()",
    "by torch": "return torch.sum(losses)",
    "named": "total = (losses * w).sum()\n    return total",
    "by their uncertainty": "return (torch.exp(-variances) * losses + variances).sum()",
    "under their own name": "losses = losses * w\n    return losses.sum()",
    "added up under their own name": "losses = losses.sum()\n    return losses",
}


@pytest.mark.parametrize("weigh", WEIGHING.values(), ids=WEIGHING.keys())
def test_what_a_function_is_given_tells_what_it_adds_up(weigh: str) -> None:
    assert not is_sum("loss = weigh(torch.stack([a, b]))", weigh)
    assert not is_sum(BOTH + "loss = weigh(losses)", weigh)
    assert is_sum("loss = weigh(F.mse_loss(out, y, reduction='none'))", weigh)


@pytest.mark.parametrize(
    "weigh",
    [
        "losses = torch.stack(losses)\n    return (losses * w).sum()",
        "if isinstance(losses, list):\n        losses = torch.stack(losses)\n    return (losses * w).sum()",
        "return (torch.stack(losses) * w).sum()",
        "return torch.sum(torch.stack(tuple(losses)))",
    ],
)
def test_a_list_that_a_function_stacks(weigh: str) -> None:
    assert not is_sum("loss = weigh([a, b])", weigh)
    assert not is_sum("loss = weigh([a]) + weigh([b])", weigh)


def test_what_is_given_as_several_arguments() -> None:
    after = SCRIPT.replace("def weigh(losses)", "def weigh(*losses)")
    after = after.format(body="loss = weigh(a, b)", weigh="return (torch.stack(losses) * w).sum()")
    assert "backward(loss)" in converted(after)
    assert "backward(loss * bmt.world_size())" in converted(
        after.replace("weigh(a, b)", "weigh(c, d)").replace(
            "loss = weigh",
            "c, d = F.mse_loss(out, y, reduction='sum'), F.l1_loss(out, y, reduction='sum')\n    loss = weigh",
        )
    )


def test_a_function_given_means_and_items() -> None:
    weigh = "if isinstance(losses, list):\n        losses = torch.stack(losses)\n    return (losses * 0.5).sum()"
    assert not is_sum("loss = weigh([a, b]) + weigh(F.mse_loss(out, y, reduction='none'))", weigh)


SUMS = {
    "of sums in an attribute": (
        "net.losses = [F.mse_loss(out, y, reduction='sum'), F.l1_loss(out, y, reduction='sum')]\n"
        "    loss = torch.stack(net.losses).sum()"
    ),
    "of sums in a list in a list": (
        "losses = [F.mse_loss(out, y, reduction='sum')]\n    loss = torch.stack([*losses, *losses]).sum()"
    ),
    "of rows": "loss = ((out - y) ** 2).mean(1).sum()",
    "of columns": "loss = ((out - y) ** 2).sum(0).mean()",
    "of columns, weighed": "loss = (((out - y) ** 2).sum(dim=0) * w).sum()",
    "changed first": "each = (out - y) ** 2\n    each = each * 2\n    loss = each.sum()",
    "written into": "out[:, 0] = 0.0\n    loss = ((out - y) ** 2).sum()",
    "squares": "loss = ((out - y) ** 2).sum()",
    "of items": "loss = F.mse_loss(out, y, reduction='none').sum()",
    "weighed by column": "loss = (F.mse_loss(out, y, reduction='none') * w).sum()",
    "divided by column": "loss = (((out - y) ** 2) / w).sum()",
    "of sums": (
        "loss = (torch.stack([F.mse_loss(out, y, reduction='sum'), F.l1_loss(out, y, reduction='sum')]) * w).sum()"
    ),
}


@pytest.mark.parametrize("body", SUMS.values(), ids=SUMS.keys())
def test_sums_over_the_batch(body: str) -> None:
    assert is_sum(body)
