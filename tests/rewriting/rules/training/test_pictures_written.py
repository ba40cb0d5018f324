"""Pictures, sounds, films and arrays are written by one rank, whatever writes them."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

SCRIPT = """import cv2
import imageio
import numpy as np
import soundfile
import torch
import torchaudio
import matplotlib.pyplot as plt
from matplotlib import animation
from matplotlib.animation import FuncAnimation
from PIL import Image
from scipy.io import wavfile
from stable_baselines3.common.monitor import Monitor
from torch.utils.data import DataLoader

net = torch.nn.Linear(4, 2)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x, y in DataLoader(data, batch_size=8):
    opt.zero_grad()
    net(x).mean().backward()
    opt.step()
{body}
"""
WRITTEN = {
    "a picture": 'Image.fromarray(a).save("a.png")',
    "a picture that was changed": 'Image.fromarray(a).convert("L").resize((4, 4)).save("a.png")',
    "a picture with a name": 'img = Image.new("L", (4, 4))\nimg.save("a.png")',
    "a film": 'film = FuncAnimation(fig, draw, frames=3)\nfilm.save("a.gif")',
    "a film of a module": 'animation.ArtistAnimation(fig, all).save("a.gif")',
    "by cv2": 'cv2.imwrite("a.png", a)',
    "by imageio": 'imageio.mimsave("a.gif", a)',
    "by matplotlib": 'plt.imsave("a.png", a)',
    "a sound": 'wavfile.write("a.wav", 8000, a)',
    "a sound by soundfile": 'soundfile.write("a.wav", a, 8000)',
    "a sound by torchaudio": 'torchaudio.save("a.wav", a, 8000)',
    "arrays": 'np.savez_compressed("a.npz", a=a)',
}
KEPT = {
    "a method of one's own": 'store = Store()\nstore.save("a.png")',
    "a picture that is read": 'img = Image.open("a.png")\nimg.load()',
    "bytes for an open file": "a.tofile(file)",
    "a name of another": "save = Image.new\nsave(1)",
}
RECORDED = {
    'Monitor(env, "log")': True,
    'Monitor(env, filename="log")': True,
    "Monitor(env)": False,
    "Monitor(env, None)": False,
    'Monitor(env, f"log/{bmt.rank()}")': False,
}


@pytest.mark.parametrize("body", WRITTEN.values(), ids=WRITTEN.keys())
def test_one_rank_writes(body: str) -> None:
    last = body.splitlines()[-1]
    assert f"if bmt.rank() == 0:\n    {last}\n" in converted(SCRIPT.format(body=body))


@pytest.mark.parametrize("body", KEPT.values(), ids=KEPT.keys())
def test_what_writes_nothing_stays(body: str) -> None:
    assert converted(SCRIPT.format(body=body)).endswith(f"{body}\n")


@pytest.mark.parametrize(("call", "said"), RECORDED.items(), ids=RECORDED.keys())
def test_an_environment_that_records(call: str, said: bool) -> None:
    found = convert_text(SCRIPT.format(body=f"env = {call}")).reported
    assert any("every rank records to this place" in remark.message for remark in found) is said


GRAPHS = {
    "a statement": "writer.add_graph(net, x)\n",
    "of an object": "log.writer.add_graph(net, (x,), verbose=False)\n",
    "in a guard of the script's": "if rank == 0:\n    writer.add_graph(net, x)\n",
    "beside what is logged": 'writer.add_scalar("a", 1, 0)\nwriter.add_graph(net, x)\n',
}


@pytest.mark.parametrize("text", GRAPHS.values(), ids=GRAPHS.keys())
def test_a_picture_of_the_model_is_drawn_where_one_rank_has_all_of_it(text: str) -> None:
    after = converted(SCRIPT.format(body=text))
    above, drawn = next(
        (a.strip(), b) for a, b in zip(after.splitlines(), after.splitlines()[1:], strict=False) if "add_graph" in b
    )
    assert above == "if bmt.world_size() == 1:" and drawn.startswith("    ")
