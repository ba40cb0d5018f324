"""What is drawn, put into tables and written of a batch is of a rank's share of it: it is told."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
import wandb
from torch.utils.data import DataLoader, TensorDataset

data = TensorDataset(torch.randn(48, 5), torch.randint(3, (48,)))
model = torch.nn.Linear(5, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(data, batch_size=12, shuffle=True)
history = []
fig, ax = plt.subplots()
for step, (x, y) in enumerate(loader):
    optimizer.zero_grad()
    out = model(x)
    loss = F.cross_entropy(out, y)
    loss.backward()
    optimizer.step()
    history.append(loss.item())
    {body}
"""
TOLD = [
    'pd.DataFrame(out.detach().numpy()).to_csv(f"out{step}.csv")',
    'pd.DataFrame({"p": out.argmax(1).numpy(), "y": y.numpy()}).to_csv("out.csv")',
    'pd.Series(out[:, 0].tolist()).to_json(f"out{step}.json")',
    'out.detach().numpy().tofile(f"out{step}.bin")',
    "plt.imshow(out.detach().numpy())",
    "plt.hist(out.detach().numpy().ravel(), bins=5)",
    "ax.scatter(x[:, 0].numpy(), out[:, 0].detach().numpy())",
    "plt.bar(range(3), out.softmax(1).mean(0).detach().numpy())",
    "sns.heatmap(out.softmax(1).detach().numpy())",
    'wandb.log({"loss": loss.item(), "labels": out.argmax(1).tolist()})',
    'wandb.log({"all": wandb.Image(x)})',
    'wandb.log({"logits": wandb.Histogram(out.detach().numpy())})',
]
LEFT = [
    "plt.imshow(x[0].numpy())",
    "plt.plot(out[0, :2].detach().numpy())",
    'wandb.log({"first": wandb.Image(x[0].cpu())})',
    'wandb.log({"masks": {"true": wandb.Image(x[0].float().cpu()), "pred": wandb.Image(out.argmax(1)[0].cpu())}})',
    "plt.plot(history)",
    "plt.plot(range(len(history)), history)",
    "plt.imshow(model.weight.detach().numpy())",
    "ax.hist(np.random.randn(10))",
    "pd.DataFrame(history)",
    'wandb.log({"loss": loss.item()})',
    "src = torch.zeros(len(x), 3).scatter(1, y[:, None], 1.0)",
    "src = torch.scatter(torch.zeros(len(x), 3), 1, y[:, None], 1.0)",
]


def told(body: str) -> list[str]:
    text = SCRIPT.replace("{body}", body)
    return [finding.message for finding in convert_text(text).reported if finding.differs]


@pytest.mark.parametrize("body", LEFT)
def test_nothing_is_said_of_what_is_of_no_batch(body: str) -> None:
    assert told(body) == []


@pytest.mark.parametrize("body", TOLD)
def test_what_is_made_of_a_share_is_told(body: str) -> None:
    assert any("may be of this rank's share" in message for message in told(body))
