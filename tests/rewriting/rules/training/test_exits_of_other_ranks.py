"""``if rank != 0: continue`` in front of what all ranks must do: none leaves, and what only one may do is its alone."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

HEAD = """import os
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

RANK = int(os.getenv("RANK", -1))
LOCAL = 0
dist.init_process_group("gloo")
net = DDP(torch.nn.Linear(4, 1))
opt = torch.optim.SGD(net.parameters(), lr=0.1)


def is_main():
    return RANK in {-1, 0}


main = RANK in {-1, 0}
best = 9.0
"""
LOOP = """for epoch in range(3):
    loss = net(x).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
AFTER = """    value = net(x).mean().item()
    print("epoch", epoch, value)
    history.append(value)
    with open("log.txt", "a") as file:
        file.write(f"{value}")
    torch.save(net.state_dict(), "net.pt")
"""
LIFTED = """    value = net(x).mean().item()
    bmt.print_rank("epoch", epoch, value)
    if bmt.rank() == 0:
        history.append(value)
    if bmt.rank() == 0:
        with open("log.txt", "a") as file:
            file.write(f"{value}")
    bmt.save(net, "net.pt")
"""
TESTS = {
    "RANK not in {-1, 0}": "",
    "RANK not in [-1, 0]": "",
    "RANK not in (-1, 0)": "",
    "RANK > 0": "",
    "dist.get_rank() != 0": "",
    "RANK != -1 and RANK != 0": "",
    "dist.is_initialized() and dist.get_rank() != 0": "",
    "not is_main()": "",
    "not main": "",
    "int(os.environ['RANK']) != 0": "",
    "RANK > 0 or epoch % 2": "epoch % 2",
    "epoch == 1 or not is_main() or epoch == 2": "epoch == 1 or epoch == 2",
}


@pytest.mark.parametrize("test", TESTS)
def test_no_rank_goes_on_to_the_next_pass(test: str) -> None:
    kept = f"    if {TESTS[test]}:\n        continue\n" if TESTS[test] else ""
    after = converted(f"{HEAD}{LOOP}    if {test}:\n        continue\n{AFTER}")
    assert after.endswith(f"    optim_manager.step()\n{kept}{LIFTED}")


@pytest.mark.parametrize("leave", ["return", "return None", "return 0.0"])
@pytest.mark.parametrize("test", ["RANK not in {-1, 0}", "not is_main()"])
def test_no_rank_returns(leave: str, test: str) -> None:
    text = f"{HEAD}def after(epoch):\n    if {test}:\n        {leave}\n{AFTER}\n\n{LOOP}    after(epoch)\n"
    assert f"def after(epoch):\n{LIFTED}" in converted(text)


def test_what_follows_around_the_exit_is_one_ranks_too() -> None:
    body = f"    if epoch:\n        if RANK > 0:\n            continue\n        print(1)\n{AFTER}"
    assert converted(HEAD + LOOP + body).endswith(f"    if epoch:\n        bmt.print_rank(1)\n{LIFTED}")


def test_two_exits() -> None:
    body = f"    if RANK > 0:\n        continue\n    print(1)\n    if RANK > 0 or epoch:\n        continue\n{AFTER}"
    assert converted(HEAD + LOOP + body).endswith(f"    bmt.print_rank(1)\n    if epoch:\n        continue\n{LIFTED}")


def test_one_with_nothing_for_all_ranks_behind_it_stays() -> None:
    after = converted(f"{HEAD}{LOOP}    if RANK > 0:\n        continue\n    print(epoch)\n")
    assert "    if RANK > 0:\n        continue\n" in after


REFUSED = {
    "it does more": f"    if RANK > 0:\n        dist.barrier()\n        continue\n{AFTER}",
    "it does more by two tests": f"    if RANK + 1 and RANK != 0:\n        dist.barrier()\n        continue\n{AFTER}",
    "it leaves the loop": f"    if RANK > 0:\n        break\n{AFTER}",
    "in an elif": f"    if epoch == 7:\n        pass\n    elif RANK > 0:\n        continue\n{AFTER}",
    "it has another side": f"    if RANK > 0:\n        continue\n    else:\n        print(1)\n{AFTER}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_is_refused(name: str) -> None:
    result = convert_text(HEAD + LOOP + REFUSED[name])
    assert not result.changed and any("is for all ranks, but" in finding.message for finding in result.reported)


def test_one_by_a_mixed_flag_is_refused() -> None:
    text = HEAD.replace("main = RANK in {-1, 0}", "main = RANK in {-1, 0} and saves")
    result = convert_text(f"{text}{LOOP}    if not main:\n        continue\n{AFTER}")
    assert not result.changed and any("not on that account alone" in finding.message for finding in result.reported)


def test_one_out_of_a_loop_and_its_function_is_refused() -> None:
    indented = "".join(f"    {line}\n" for line in (LOOP + "    if RANK > 0:\n        return\n" + AFTER).splitlines())
    result = convert_text(f"{HEAD}def train():\n{indented}\n\ntrain()\n")
    assert not result.changed and any("only one gets past this line" in f.message for f in result.reported)


LOOKS = {
    "a parameter": "self.get_parameter('a.weight')",
    "a buffer": "self.get_buffer('b')",
    "a part": "self.get_submodule('a')",
    "the parts": "list(self.named_children())",
}


@pytest.mark.parametrize("looks", LOOKS.values(), ids=LOOKS)
def test_what_only_looks_at_a_model_is_not_for_all_ranks(looks: str) -> None:
    model = f"""
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 1)
        self.register_buffer("b", torch.ones(1))

    def pick(self):
        return {looks}

    def move(self, ready):
        if ready and RANK > 0 and not self.training:
            for name in "ab":
                print(name)
            return
        print(type(self.pick()))

    def forward(self, x):
        return self.a(x)


"""
    text = f"{HEAD}{LOOP}".replace("dist.init", f"{model}dist.init").replace(
        "torch.nn.Linear(4, 1))\nopt", "Net())\nopt"
    )
    result = convert_text(text)
    assert result.changed and not any("only one gets past" in said.message for said in result.reported)
