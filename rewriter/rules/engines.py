"""Scripts written for another engine are left alone.

What: a script that uses Lightning, accelerate, Fabric, the transformers Trainer, DeepSpeed, Megatron, FSDP, Horovod,
Colossal-AI or apex.amp is recognised and reported; nothing in it, nor in files that only it uses, is changed.
Why: these engines own the training loop, the optimizer and the parameters. Half a conversion would train wrongly.
Refuses when: always; go back to an ordinary torch loop first.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.project import External, File
from rewriter.types import Example, Finding, Rule, Safety

_CALLS = {
    "accelerate.Accelerator": "accelerate",
    "transformers.Trainer": "the transformers Trainer",
    "transformers.Seq2SeqTrainer": "the transformers Trainer",
    "deepspeed.initialize": "DeepSpeed",
    "apex.amp.initialize": "apex.amp",
    "horovod.torch.init": "Horovod",
    "colossalai.launch_from_torch": "Colossal-AI",
    "colossalai.booster.Booster": "Colossal-AI",
    "torch.distributed.fsdp.FullyShardedDataParallel": "FSDP",
    "torch.distributed.fsdp.fully_shard": "FSDP",
    "megatron.training.pretrain": "Megatron",
    "megatron.initialize.initialize_megatron": "Megatron",
}
_LIGHTNING = ("lightning.", "pytorch_lightning.", "lightning_fabric.", "lightning_lite.")
_TOP = ("Trainer", "Fabric", "LightningModule", "LightningLite", "LightningDataModule")
_HINTS = (
    b"accelerate",
    b"transformers",
    b"deepspeed",
    b"apex",
    b"horovod",
    b"colossalai",
    b"fsdp",
    b"megatron",
    b"lightning",
)


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if not any(hint in file.source.data for hint in _HINTS):
        return
    for node in file.nodes:
        engine = ""
        if isinstance(node, ast.Call):
            engine = _engine(facts.project.external(file, node.func))
        elif isinstance(node, ast.ClassDef):
            bases = [base for _, base in facts.classes.bases(file.class_info(node))]
            engine = next((e for b in bases if isinstance(b, External) and (e := _engine(b.name))), "")
        if engine:
            message = f"the script is written for {engine}; bmtrain needs an ordinary torch loop, so it stays as it is"
            yield Finding(RULE.code, getattr(node, "lineno", 1), message, safety=Safety.REPORT, stop=True)
            return


def _engine(name: str) -> str:
    if name in _CALLS:
        return _CALLS[name]
    if name.startswith(_LIGHTNING) and name.split(".")[-1] in _TOP:
        return "Lightning"
    if name.startswith("accelerate.") and name.endswith("Accelerator"):
        return "accelerate"
    return ""


RULE = Rule(
    code="BMT090",
    title="scripts written for another engine are left alone",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            "import torch\nfrom accelerate import Accelerator\n\n\nclass Net(torch.nn.Module):\n    pass\n\n\n"
            "accelerator = Accelerator()\nmodel = accelerator.prepare(Net())\n"
        ),
    ),
)
