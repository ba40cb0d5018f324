# ruff: noqa: E501 - tables of code are easier to read on one line
"""Training scripts: what must be refused or left alone, then what is rewritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.project import Project
from rewriter.analyze.read.source import Source
from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options
from rewriter.types import Refusal

from ...helpers import converted

HEAD = """import torch
from torch import nn


class Net(nn.Module):
    def forward(self, x):
        return x


"""
LOOP = """model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for x in batches:
    loss = model(x).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""

REFUSED = {
    "accelerate": "from accelerate import Accelerator\naccelerator = Accelerator(**options)\n" + LOOP,
    "lightning": "import pytorch_lightning as pl\ntrainer = pl.Trainer()\ntrainer.fit(Net())\n",
    "new lightning": "import lightning as L\n\n\nclass Task(L.LightningModule):\n    def __init__(self):\n        self.net = Net()\n",
    "fabric": "from lightning.fabric import Fabric\nfabric = Fabric()\n" + LOOP,
    "trainer": "from transformers import Trainer\ntrainer = Trainer(Net())\ntrainer.train()\n",
    "deepspeed": "import deepspeed\nmodel, *_ = deepspeed.initialize(model=Net())\n",
    "fsdp": "from torch.distributed.fsdp import FullyShardedDataParallel as FSDP\nmodel = FSDP(Net())\n",
    "ignite": "from ignite.engine import create_supervised_trainer\ntrainer = create_supervised_trainer(Net(), 1, 2)\ntrainer.run(1)\n",
    "trl": "from trl import SFTTrainer\nSFTTrainer(Net()).train()\n",
    "mmengine": "from mmengine.runner import Runner\nRunner(Net()).train()\n",
    "kfac": "from kfac import KFAC\n" + LOOP.replace("torch.optim.SGD", "KFAC"),
    "spawn": "import torch.multiprocessing as mp\nstarted = mp.spawn(run, nprocs=2, join=False)\n" + LOOP,
    "others leave first": LOOP + "while True:\n    if rank != 0:\n        break\n    state = model.state_dict()\n",
    "else of a guard": LOOP + "if rank == 0:\n    model.state_dict()\nelse:\n    wait()\n",
    "a flag of more than ranks": LOOP
    + "saves = logging and is_main(args)\nif saves:\n    torch.save(model.state_dict(), 'x')\n",
    "optimizer elsewhere": "from engines import engine\n"
    + LOOP.replace("optimizer = torch", "engine.optimizer = torch")
    .replace("    optimizer", "    engine.optimizer")
    .replace("engine.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n", ""),
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_refused_whole_with_a_reason(text: str) -> None:
    result = convert_text(HEAD + text)
    assert not result.changed and not result.error
    assert len({finding.message for finding in result.reported}) >= 1
    assert all(isinstance(finding, Refusal) for finding in result.reported)


def test_files_that_only_a_refused_script_uses_stay(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(HEAD)
    (tmp_path / "main.py").write_text("import deepspeed\nfrom model import Net\n\ndeepspeed.initialize(Net())\n")
    results = convert_paths([tmp_path / "main.py", tmp_path / "model.py"], Options(), [tmp_path])
    assert not any(result.changed for result in results)
    (tmp_path / "plain.py").write_text("from model import Net\n\n" + LOOP)
    results = convert_paths(sorted(tmp_path.glob("*.py")), Options(), [tmp_path])
    assert [result.path.name for result in results if result.changed] == ["model.py", "plain.py"]


def test_models_beside_a_trainer_of_another_engine_are_converted() -> None:
    trainer = (
        "from accelerate import Accelerator\n\n\nclass Trainer:\n    def __init__(self, model):\n"
        "        self.accelerator = Accelerator()\n        self.model = model\n"
        "        self.optimizer = torch.optim.AdamW(model.parameters())\n\n    def train(self, x):\n"
        "        self.accelerator.backward(self.model(x).mean())\n        self.optimizer.step()\n        print(1)\n"
    )
    result = convert_text(HEAD + trainer)
    assert b"class Net(bmt.DistributedModule)" in result.after
    assert trainer.partition("class")[2].encode() in result.after
    assert [finding.code for finding in result.reported] == ["BMT090"]
    assert not convert_text(HEAD + trainer.replace("= model\n", "= Net()\n")).changed


KEPT = {
    "a print of its own": ("print = log\nprint(1)\n", "print(1)\n"),
    "a guarded print": ("if rank == 0:\n    print(1)\n", "if rank == 0:\n    print(1)\n"),
    "a guarded save of local things": (
        "if rank == 0:\n    torch.save(1, 'x')\n",
        "if rank == 0:\n    torch.save(1, 'x')\n",
    ),
    "a scheduler": ("scheduler.step()\n", "\nscheduler.step()\n"),
    "a scheduler of torch's": (
        "from torch.optim.lr_scheduler import StepLR\nscheduler = StepLR(optimizer, 1)\nscheduler.step()\n",
        "\nscheduler = StepLR(optimizer, 1)\nscheduler.step()\n",
    ),
    "an averaged model": (
        "swa = torch.optim.swa_utils.AveragedModel(model)\nswa.step()\n",
        "\nswa = torch.optim.swa_utils.AveragedModel(model)\nswa.step()\n",
    ),
    "a value that is no loss": ("a = torch.ones(1)\nprint(a.item())\n", "a.item()"),
    "somebody else's step": ("env.step()\n", "\nenv.step()\n"),
    "a loss that is a number": (
        "loss = model(1).mean()\nloss = loss.item()\nprint(f'{loss:.3f}', loss)\n",
        "bmt.print_rank(f'{loss:.3f}', loss)\n",
    ),
    "a disabled bar": ("from tqdm import tqdm\ntqdm([], disable=True)\n", "tqdm([], disable=True)"),
}


@pytest.mark.parametrize(("extra", "kept"), KEPT.values(), ids=KEPT.keys())
def test_kept(extra: str, kept: str) -> None:
    assert kept in converted(HEAD + LOOP + extra)


CASES = {
    "backward with arguments": (
        LOOP.replace("loss.backward()", "loss.backward(retain_graph=True)"),
        ["optim_manager.scale_loss(loss).backward(retain_graph=True)"],
    ),
    "scaled loss": (LOOP.replace("loss.backward()", "(loss / 4).backward()"), ["optim_manager.backward(loss / 4)"]),
    "clip with keywords": (
        LOOP.replace("    optimizer.step", "    nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0, norm_type=2)\n    optimizer.step"),
        ["optim_manager.clip_grad_norm(optimizer.param_groups, 1.0, norm_type=2)"],
    ),
    "clip some": (
        LOOP.replace("    optimizer.step", "    nn.utils.clip_grad_norm_(model.head.parameters(), 1.0)\n    optimizer.step"),
        ['optim_manager.clip_grad_norm([{"params": list(model.head.parameters())}], 1.0)'],
    ),
    "two optimizers": (
        LOOP.replace("optimizer", "opt_g") + LOOP.replace("optimizer", "opt_d"),
        ["opt_g_manager.backward(loss)", "opt_d_manager.backward(loss)", "opt_d_manager.step()"],
    ),
    "optimizer as argument": (
        "def epoch(model, optimizer):\n    " + LOOP.split("\n", 2)[2].replace("\n", "\n    ") + "\n\nepoch(Net(), make())\n",
        ["def epoch(model, optimizer):\n    optim_manager = bmt.optim.OptimManager(loss_scale=None)\n    optim_manager.add_optimizer"],
    ),
    "optimizer or none as argument": (
        "def epoch(model, optimizer=None):\n    loss = model(1).mean()\n    if optimizer is not None:\n        loss.backward()\n"
        "        optimizer.step()\n    return loss\n\n\nepoch(Net(), make())\n",
        ["(loss_scale=None)\n    if optimizer is not None:\n        optim_manager.add_optimizer(optimizer)\n    loss ="],
    ),
    "optimizer of another object": (
        "trainer = make()\nmodel = Net()\nfor x in batches:\n    loss = model(x).mean()\n    loss.backward()\n"
        "    trainer.optimizer.step()\n    trainer.optimizer.zero_grad()\n",
        [
            "trainer = make()\noptim_manager = bmt.optim.OptimManager(loss_scale=None)\noptim_manager.add_optimizer(trainer.optimizer)\n",
            "    optim_manager.backward(loss)\n    optim_manager.step()\n    optim_manager.zero_grad()\n",
        ],
    ),
    "optimizer of an argument": (
        "def epoch(trainer, model):\n    model(1).mean().backward()\n    trainer.optimizer.step()\n\n\nepoch(make(), Net())\n",
        ["def epoch(trainer, model):\n    optim_manager = bmt.optim.OptimManager(loss_scale=None)\n    optim_manager.add_optimizer(trainer.optimizer)\n"],
    ),
    "trainer class": (
        "class Trainer:\n    def __init__(self):\n        self.model = Net()\n        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1)\n\n"
        "    def step(self, x):\n        self.model(x).mean().backward()\n        self.optimizer.step()\n\n\nTrainer().step(1)\n",
        ["self.optim_manager.add_optimizer(self.optimizer)", "self.optim_manager.backward(self.model(x).mean())", "self.optim_manager.step()"],
    ),
    "optimizer chosen by an option": (
        LOOP.replace(
            "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)",
            "if adam:\n    optimizer = torch.optim.AdamW(model.parameters())\nelse:\n    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)",
        ),
        ["lr=0.1)\noptim_manager = bmt.optim.OptimManager(loss_scale=None)\noptim_manager.add_optimizer(optimizer)\n", "weight_decay=0.01"],
    ),
    "scaler handed on": (
        "def epoch(model, optimizer, scaler, x):\n    loss = model(x).mean()\n    scaler.scale(loss).backward()\n    scaler.step(optimizer)\n"
        "    scaler.update()\n\n\nmodel = Net()\noptimizer = torch.optim.SGD(model.parameters(), lr=1)\nscaler = torch.amp.GradScaler()\n"
        "epoch(model, optimizer, scaler, x)\n",
        ["scaler = bmt.optim.OptimManager(loss_scale=2**16)\nscaler.add_optimizer(optimizer)\n", "    scaler.backward(loss)\n    scaler.step()\n\n"],
    ),
    "scaler or none": (
        "scaler = None\nmodel = Net()\noptimizer = torch.optim.SGD(model.parameters(), lr=1)\nif amp:\n    scaler = torch.amp.GradScaler()\n"
        "loss = model(x).mean()\nif scaler is not None:\n    scaler.scale(loss).backward()\n    scaler.step(optimizer)\n    scaler.update()\n"
        "else:\n    loss.backward()\n    optimizer.step()\n",
        [
            "bmt.init_distributed()\nscaler = bmt.optim.OptimManager(loss_scale=None)\nmodel = Net()\n",
            "lr=1)\nscaler.add_optimizer(optimizer)\nif amp:\n    scaler = bmt.optim.OptimManager(loss_scale=2**16)\n    scaler.add_optimizer(optimizer)\n",
            "else:\n    scaler.backward(loss)\n    scaler.step()\n",
        ],
    ),
    "scaler argument or none": (
        "def epoch(model, optimizer, scaler, x):\n    loss = model(x).mean()\n    if scaler is not None:\n        scaler.scale(loss).backward()\n"
        "        scaler.step(optimizer)\n        scaler.update()\n    else:\n        loss.backward()\n        optimizer.step()\n\n\nepoch(Net(), make(), None, 1)\n",
        ["    if scaler is None:\n        scaler = bmt.optim.OptimManager(loss_scale=None)\n        scaler.add_optimizer(optimizer)\n    loss ="],
    ),
    "watched on one rank": (
        "import wandb\n" + LOOP + "wandb.watch(model)\n",
        ["if bmt.rank() == 0:\n    wandb.watch(model)\n"],
    ),
    "seed": ("torch.manual_seed(7)\n" + LOOP, ["bmt.init_distributed(seed=7)\nmodel = Net()"]),
    "seed after another": (
        "import random\nrandom.seed(7)\ntorch.manual_seed(7)\n" + LOOP,
        ["bmt.init_distributed(seed=7)\nrandom.seed(7)\ntorch.manual_seed(7)\n"],
    ),
    "no seed": (LOOP, ["bmt.init_distributed()\nmodel = Net()\n"]),
    "evaluation on one rank": (
        "@torch.no_grad()\ndef evaluate(model):\n    return model(1).mean()\n\n\n" + LOOP + "if rank == 0:\n    print(evaluate(model))\n",
        ["\nbmt.print_rank(evaluate(model))\n"],
    ),
    "state of one rank": (
        LOOP + "if step % 10 == 0 and is_main_process():\n    torch.save({'m': model.state_dict()}, 'x')\n",
        ["if step % 10 == 0:\n    bmt.save_checkpoint({'m': model.state_dict()}, 'x')\n"],
    ),
    "saved by a function on one rank": (
        "def keep(state):\n    torch.save(state, 'x')\n\n\n" + LOOP + "if rank == 0:\n    keep({'step': 1})\n",
        ["    bmt.save_checkpoint(state, 'x')\n", "\nkeep({'step': 1})\n"],
    ),
    "state of one rank, of several tests": (
        LOOP + "if step and (every or last) and (a ==\n        b) and rank == 0:\n    torch.save({'m': model.state_dict()}, 'x')\n",
        ["if step and (every or last) and (a ==\n        b):\n    bmt.save_checkpoint({'m': model.state_dict()}, 'x')\n"],
    ),
    "a pretrained model": (
        "from transformers import AutoModel\n" + LOOP.replace("Net()", "AutoModel.from_pretrained('x')")
        + "model.save_pretrained(\n    'out',  # here\n    max_shard_size='1GB',\n)\n",
        ["\nbmt.save_pretrained(\n    model, 'out',  # here\n    max_shard_size='1GB',\n)\n"],
    ),
    "a pretrained model that rank 0 saves": (
        "from transformers import AutoModel\n" + LOOP.replace("Net()", "AutoModel.from_pretrained('x')")
        + "if rank == 0 and step % 10 == 0:\n    print('saving')\n    model.save_pretrained('out')\n",
        ["if step % 10 == 0:\n    bmt.print_rank('saving')\n    bmt.save_pretrained(model, 'out')\n"],
    ),
    "a pretrained model inside another name": (
        "from transformers import AutoModel\n" + LOOP.replace("Net()", "AutoModel.from_pretrained('x')")
        + "if rank == 0:\n    inner = model.module if hasattr(model, 'module') else model\n"
        "    inner = model\n    inner.save_pretrained('out')\n",
        ["\nbmt.save_pretrained(inner, 'out')\n"],
    ),
    "pretrained parts, beside others": (
        "from transformers import AutoModel, AutoTokenizer\n" + LOOP.replace("Net()", "AutoModel.from_pretrained('x')")
        + "tok = AutoTokenizer.from_pretrained('x')\nif rank == 0:\n    tok.save_pretrained('out')\n"
        "    model.config.save_pretrained('out')\n    model.encoder.save_pretrained('out/encoder')\n"
        "    merged = model.merge_and_unload()\n    merged.save_pretrained('out/merged', state_dict=merged.state_dict())\n",
        ["if bmt.rank() == 0:\n    tok.save_pretrained('out')\n", "if bmt.rank() == 0:\n    model.config.save_pretrained('out')\n",
         "\nbmt.save_pretrained(model.encoder, 'out/encoder')\n", "\nbmt.save_pretrained(merged, 'out/merged')\n"],
    ),
    "a model that gets tokens first": (
        "from transformers import AutoModel\n" + LOOP.replace(
            "model = Net()\n", "if new:\n    model = AutoModel.from_config('x')\nelse:\n"
            "    model = AutoModel.from_pretrained('x')\nif tokens > 5:\n    model.resize_token_embeddings(tokens)\n"),
        ["    model = AutoModel.from_pretrained('x')\nif", "_embeddings(tokens)\nmodel = bmt.BMTrainModelWrapper(model)\n"],
    ),
    "a model that gets an adapter first": (
        "from peft import get_peft_model\nfrom transformers import AutoModel\n" + LOOP.replace(
            "model = Net()\n", "model = AutoModel.from_pretrained('x')\nmodel = get_peft_model(model, config)\n"
            "model.print_trainable_parameters()\n"),
        ["\nmodel = AutoModel.from_pretrained('x')\nmodel = bmt.BMTrainModelWrapper(get_peft_model(model, config))\n"
         "if bmt.rank() == 0:\n    model.print_trainable_parameters()\n"],
    ),
    "a model that gets an adapter perhaps": (
        "from peft import get_peft_model\nfrom transformers import AutoModel\n" + LOOP.replace(
            "model = Net()\n", "model = AutoModel.from_pretrained('x')\nif lora:\n    model = get_peft_model(model, c)\n"),
        ["\nmodel = AutoModel.from_pretrained('x')\nif lora:\n    model = get_peft_model(model, c)\n"
         "model = bmt.BMTrainModelWrapper(model)\n"],
    ),
    "a pretrained part of a module": (
        "from transformers import AutoModel\n\n\nclass Part(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.config = AutoConfig.from_pretrained('x')\n"
        "        self.encoder = AutoModel.from_pretrained('x')\n\n\n" + LOOP.replace("Net()", "Part()"),
        ["        self.encoder = bmt.BMTrainModelWrapper(AutoModel.from_pretrained('x'))\n", "AutoConfig.from_pretrained('x')\n"],
    ),
    "safetensors of one rank": (
        "from safetensors.torch import save_file\n" + LOOP + "state = model.state_dict()\nsave_file(state, 'x')\n",
        ["state = model.state_dict()\nif bmt.rank() == 0:\n    save_file(state, 'x')\n"],
    ),
    "a part of the outputs": (
        LOOP.replace("loss = model(x).mean()", "out = model(x)").replace("loss.back", "out['loss'].back")
        + "    print(f'{out[\"loss\"].item():.3f}', out['loss'].item(), out['other'].item())\n",
        ["optim_manager.backward(out['loss'])", "bmt.sum_loss(out['loss']).item(), out['other'].item())"],
    ),
    "a loss that is shown": (
        LOOP + "    both = loss + model(x).sum()\n    print('%.3f %d' % (loss, 1), f'{loss:.3f}', both.item(), loss)\n",
        ["'%.3f %d' % (bmt.sum_loss(loss), 1), f'{bmt.sum_loss(loss):.3f}', bmt.sum_loss(both).item(), bmt.sum_loss(loss))"],
    ),
    "a loader for validation as an argument": (
        "from torch.utils.data import DataLoader\n\n\nclass Trainer:\n    def __init__(self, model, train_loader, val_loader=None):\n"
        "        self.loader = train_loader\n\n\n" + LOOP + "Trainer(model, DataLoader(a), DataLoader(b))\nTrainer(model, DataLoader(a), val_loader=DataLoader(b))\n",
        ["Trainer(model, bmt.shard_loader(DataLoader(a)), DataLoader(b))", "bmt.shard_loader(DataLoader(a)), val_loader=DataLoader(b))"],
    ),
    "a new head": (LOOP.replace("= Net()\n", "= Net()\nmodel.fc = nn.Linear(4, 2)\nmodel.act = nn.Identity()\n"), [
        "model.fc = bmt.BMTrainModelWrapper(nn.Linear(4, 2))\nmodel.act = nn.Identity()\n",
    ]),
    "state of one rank on one line": (
        LOOP + "if rank == 0: torch.save({'m': model.state_dict()}, 'x')\n",
        ["\nbmt.save_checkpoint({'m': model.state_dict()}, 'x')\n"],
    ),
    "logged on one rank": (
        LOOP + "if rank == 0:\n    writer.add_scalar('loss', loss.item(), 1)\n",
        ["\nvalue = bmt.sum_loss(loss).item()\nif bmt.rank() == 0:\n    writer.add_scalar('loss', value, 1)\n"],
    ),
    "no_sync": (
        "from torch.nn.parallel import DistributedDataParallel as DDP\n" + LOOP.replace("model = Net()", "model = DDP(Net())")
        + "with model.no_sync():\n    pass\n",
        ["import contextlib\n", "model = Net()\n", "with contextlib.nullcontext():\n"],
    ),
    "sampler": (
        "from torch.utils.data import DistributedSampler, DataLoader\nsampler = DistributedSampler(data, shuffle=True)\n"
        "loader = DataLoader(data, sampler=sampler)\n" + LOOP,
        ["DistributedSampler(data, shuffle=True, num_replicas=bmt.world_size(), rank=bmt.rank())", "loader = DataLoader(data, sampler=sampler)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES.keys())
def test_rewritten(text: str, expected: list[str]) -> None:
    after = converted(HEAD + text)
    for part in expected:
        assert part in after


def test_a_whole_data_parallel_script() -> None:
    folder = Path(__file__).parents[2] / "fixtures"
    before = (folder / "ddp_train.py").read_text()
    assert converted(before) == (folder / "ddp_train_converted.py").read_text()


def test_a_loop_over_a_list_that_another_file_builds(tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text(
        "from torch import nn\n\n\nclass Block(nn.Module):\n    def forward(self, x):\n        return x\n\n\n"
        "class Base(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.layers = nn.ModuleList([Block() for _ in range(3)])\n"
    )
    (tmp_path / "model.py").write_text(
        "from base import Base\n\n\nclass Model(Base):\n    def forward(self, x):\n"
        "        for layer in self.layers:\n            x = layer(x)\n        return x\n"
    )
    both = [tmp_path / "base.py", tmp_path / "model.py"]
    results = convert_paths(both, Options(), [tmp_path])
    assert b"TransformerBlockList" in results[0].after and b"x = self.layers(x)" in results[1].after
    results = convert_paths(both, Options(ignore=("BMT003",)), [tmp_path])
    assert not results[1].changed
    assert not convert_paths(both[1:], Options(), [tmp_path])[0].changed


def test_a_program_that_calls_its_training_by_name_is_started(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(HEAD + "def run(batches):\n    " + LOOP.replace("\n", "\n    ").rstrip() + "\n")
    (tmp_path / "main.py").write_text(
        "import importlib\nimport sys\nimport work\n\n\ndef main():\n    importlib.import_module(sys.argv[1]).run([])\n\n\n"
        'if __name__ == "__main__":\n    main()\n'
    )
    results = convert_paths([tmp_path / "main.py", tmp_path / "work.py"], Options(), [tmp_path])
    assert b'if __name__ == "__main__":\n    bmt.init_distributed()\n    main()\n' in results[0].after
    assert b"init_distributed" not in results[1].after


def test_a_function_that_is_handed_the_training_data_is_pointed_out() -> None:
    loader = "train_loader = torch.utils.data.DataLoader(data)\n"
    loop = LOOP.replace("batches", "train_loader")
    after = "def score(model, loader):\n    return 1\n\n\n"
    assert [f.code for f in convert_text(HEAD + after + loader + loop + "score(model, train_loader)\n").reported] == [
        "BMT037"
    ]


def test_a_script_that_shares_nothing_out_is_pointed_out() -> None:
    assert [f.code for f in convert_text(HEAD + LOOP).reported] == ["BMT023"]
    assert not convert_text(HEAD + "x = torch.randn(batch_size, 4)\n" + LOOP).reported


def test_loops_over_parameters_inside_a_loop_over_modules() -> None:
    before = SCRIPT_OF_MODULES
    after = converted(before)
    assert after.count("bmt.gathered(") == 1
    assert "with bmt.gathered(model, write=True):\n    for module in model.modules():" in after


SCRIPT_OF_MODULES = """import torch

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LSTM(8, 1))
for module in model.modules():
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.zeros_(module.weight)
    for name, p in module.named_parameters(recurse=False):
        if "bias" in name:
            p.data.fill_(1.0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(1, 8))[0].sum().backward()
optimizer.step()
"""


@pytest.mark.parametrize("what", ["model", "{'net': model, 'step': 1}"])
def test_a_pickled_model_is_given_by_all_ranks(what: str) -> None:
    assert converted(HEAD + LOOP + f"torch.save({what}, 'x')\n").endswith(f"\nbmt.save_checkpoint({what}, 'x')\n")


def test_loaders_of_a_program_that_does_not_train_stay(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(HEAD)
    (tmp_path / "train.py").write_text("from net import Net\nimport torch\n\n" + LOOP)
    (tmp_path / "data.py").write_text(
        "from torch.utils.data import DataLoader\n\n\ndef load(data):\n    return DataLoader(data)\n"
    )
    (tmp_path / "use.py").write_text(
        "from data import load\nfrom net import Net\n\nmodel = Net()\nfor x in load([1]):\n    model(x)\n"
    )
    loop = LOOP.replace("batches", "load([1])")
    paths = sorted(tmp_path.glob("*.py"))
    assert b"shard_loader" not in convert_paths(paths, Options(), [tmp_path])[0].after
    (tmp_path / "train.py").write_text("from net import Net\nfrom data import load\nimport torch\n\n" + loop)
    assert b"shard_loader" in convert_paths(paths, Options(), [tmp_path])[0].after


def test_files_that_train_come_in_the_projects_order() -> None:
    project = Project()
    files = [project.add(Source(Path(f"train_{number}.py"), (HEAD + LOOP).encode())) for number in range(64)]
    assert list(Facts(project).scripts.training) == files
