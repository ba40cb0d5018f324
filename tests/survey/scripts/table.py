"""The scripts: where each comes from, how it is made small, what data it gets, how it is started."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy


@dataclass(frozen=True)
class Script:
    """``command`` is run in a folder that holds what ``data`` wrote, with the package's folder on the path.

    ``constants``: (file, pattern, replacement), in the original before it is converted. ``files``: scripts of ours, for
    packages that ship the training code as functions and show their use in a README or a test. ``printed``: a pattern
    whose group is a number that the script prints or logs. ``saved``: checkpoints that it writes. ``refused``: the part
    of the converter's message, for scripts that it must leave alone. ``logs``: it logs on every rank, so that only
    rank 0's output is read. ``still``: dropout is off. ``noise``: tensors of a checkpoint whose gradient is nothing but
    rounding.
    """

    name: str
    package: str
    version: str
    command: str = ""
    sdist: bool = False
    needs: tuple[str, ...] = ()
    constants: tuple[tuple[str, str, str], ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    data: Callable[[Path], None] | None = None
    printed: str = ""
    saved: tuple[str, ...] = ()
    still: bool = True
    logs: bool = False
    noise: str = ""
    tolerance: float = 1e-5
    refused: str = ""
    what: str = ""


_WORDS = ("the", "of", "and", "to", "in", "is", "was", "for", "on", "that", "by", "with", "as", "at", "from", "his")


def _text(characters: int) -> str:
    draw = random.Random(0)
    out = ""
    while len(out) < characters:
        out += draw.choice(_WORDS) + draw.choice([" ", " ", " ", ", ", ".\n"])
    return out[:characters]


def _enwik8(folder: Path) -> None:
    (folder / "data").mkdir()
    with gzip.open(folder / "data" / "enwik8.gz", "wb") as file:
        file.write(_text(20000).encode())


def _texts(folder: Path) -> None:
    (folder / "train.txt").write_text(_text(4000))
    (folder / "dev.txt").write_text(_text(1000))


def _ranking(folder: Path) -> None:
    """Queries with results of 16 features, in the format of svmlight; and the configuration."""
    draw = random.Random(0)
    (folder / "data").mkdir()
    for name, queries in (("train", 16), ("vali", 8)):
        with open(folder / "data" / f"{name}.txt", "w") as file:
            for query in range(queries):
                for _ in range(6):
                    features = " ".join(f"{i}:{draw.uniform(-1, 1):.4f}" for i in range(1, 17))
                    file.write(f"{draw.randrange(4)} qid:{query} {features}\n")
    configuration = {
        "model": {
            "fc_model": {"sizes": [32], "input_norm": False, "activation": None, "dropout": 0.0},
            "transformer": {"N": 2, "d_ff": 32, "h": 2, "positional_encoding": None, "dropout": 0.0},
            "post_model": {"output_activation": "Sigmoid", "d_output": 1},
        },
        "data": {
            "path": str(folder / "data"), "num_workers": 0, "batch_size": 4, "slate_length": 6,
            "validation_ds_role": "vali",
        },
        "optimizer": {"name": "Adam", "args": {"lr": 0.01}},
        "lr_scheduler": {"name": "StepLR", "args": {"step_size": 1, "gamma": 0.5}},
        "training": {"epochs": 2, "early_stopping_patience": 100, "gradient_clipping_norm": 0.1},
        "metrics": ["ndcg_3"],
        "val_metric": "ndcg_3",
        "loss": {"name": "listNet", "args": {}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(configuration))


_ENWIK8 = (
    (r"^NUM_BATCHES = .*", "NUM_BATCHES = 4"),
    (r"^(VALIDATE|GENERATE)_EVERY = .*", r"\1_EVERY = 2"),
    (r"^(PRIME|GENERATE)_LENGTH = .*", r"\1_LENGTH = 16"),
    (r"^SEQ_LEN = .*", "SEQ_LEN = 64"),
    (r"int\(95e6\)", "20000"),
    (r"int\(90e6\)", "16000"),
    (r"^(    )?dim = 512", r"\1dim = 32"),
    (r"^(    )?depth = \d", r"\1depth = 2"),
)


def _small(name: str, *more: tuple[str, str]) -> tuple[tuple[str, str, str], ...]:
    return tuple((name, *change) for change in (*_ENWIK8, *more))


def _tokens(folder: Path) -> None:
    """Shards of tokens, as the package's own preparation writes them."""
    (folder / "requirements_dev.txt").touch()
    (folder / "dataset_cache").mkdir()
    for split in ("train", "validation"):
        tokens = numpy.frombuffer(_text(8000).encode(), numpy.uint8).astype(numpy.uint16)
        numpy.save(folder / "dataset_cache" / f"tinyshakespeare_{split}.npy.000.npy", tokens)


def _messages(folder: Path) -> None:
    draw = random.Random(0)
    for name, lines in (("train.csv", 16), ("validation.csv", 8)):
        rows = [f"{draw.randrange(2)},{' '.join(draw.choices(_WORDS, k=4))}" for _ in range(lines)]
        (folder / name).write_text("\n".join(["Label,Text", *rows]) + "\n")


_SPAM = """import tiktoken
import torch
from torch.utils.data import DataLoader
from llms_from_scratch.ch04 import GPTModel
from llms_from_scratch.ch06 import SpamDataset, calc_accuracy_loader, train_classifier_simple

CONFIG = {
    "vocab_size": 50257, "context_length": 32, "emb_dim": 32, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0,
    "qkv_bias": True,
}

if __name__ == "__main__":
    torch.manual_seed(123)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = tiktoken.get_encoding("gpt2")
    train_dataset = SpamDataset("train.csv", tokenizer=tokenizer, max_length=24)
    val_dataset = SpamDataset("validation.csv", tokenizer=tokenizer, max_length=train_dataset.max_length)
    train_loader = DataLoader(train_dataset, batch_size=4, shuffle=True, num_workers=0, drop_last=True)
    val_loader = DataLoader(val_dataset, batch_size=4, num_workers=0, drop_last=False)
    model = GPTModel(CONFIG)
    for param in model.parameters():
        param.requires_grad = False
    model.out_head = torch.nn.Linear(in_features=CONFIG["emb_dim"], out_features=2)
    model.to(device)
    for param in model.trf_blocks[-1].parameters():
        param.requires_grad = True
    for param in model.final_norm.parameters():
        param.requires_grad = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1)
    train_classifier_simple(
        model, train_loader, val_loader, optimizer, device, num_epochs=2, eval_freq=2, eval_iter=2,
    )
    print("accuracy", calc_accuracy_loader(val_loader, model, device))
    torch.save(model.state_dict(), "model.pth")
"""
_LLM = """import torch
from llms_from_scratch.ch02 import create_dataloader_v1
from llms_from_scratch.ch04 import GPTModel
from llms_from_scratch.ch05 import train_model_simple
import tiktoken

CONFIG = {
    "vocab_size": 256, "context_length": 32, "emb_dim": 32, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0,
    "qkv_bias": False,
}


def main():
    torch.manual_seed(123)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with open("train.txt") as file:
        text = file.read()[:1000]
    split = int(0.8 * len(text))
    train_loader = create_dataloader_v1(text[:split], batch_size=4, max_length=32, stride=32, shuffle=True)
    val_loader = create_dataloader_v1(text[split:], batch_size=2, max_length=32, stride=32, shuffle=False)
    model = GPTModel(CONFIG)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1)
    train_losses, val_losses, tokens_seen = train_model_simple(
        model, train_loader, val_loader, optimizer, device, num_epochs=2, eval_freq=2, eval_iter=2,
        start_context="the of", tokenizer=tiktoken.get_encoding("gpt2"),
    )
    torch.save(model.state_dict(), "model.pth")


if __name__ == "__main__":
    main()
"""
_PICO = """from picogpt import PicoGPT

pico = PicoGPT(block_size=32, n_embd=32, n_head=2, n_layer=2, dropout=0.0, batch_size=8, train_steps=200)
pico.train_with_file("train.txt")
pico.save_model("model.pt")
print(pico.ask("the of"))
"""

SCRIPTS = (
    Script(
        "min_gru", "minGRU-pytorch", "0.2.1", "train.py", sdist=True, needs=("einops", "tqdm"),
        constants=_small("train.py"), data=_enwik8, printed=r"(?:training|validation) loss: ([\d.]+)",
        what="minGRU on bytes; a dataset that draws its samples, accumulation, clipping, generation",
    ),
    Script(
        "min_gru_hybrid", "minGRU-pytorch", "0.2.1", "train_hybrid.py", sdist=True, needs=("einops", "tqdm"),
        constants=_small("train_hybrid.py"), data=_enwik8, printed=r"(?:training|validation) loss: ([\d.]+)",
        what="the same with attention beside the recurrences",
    ),
    Script(
        "sparse_attention", "native-sparse-attention-pytorch", "0.2.3", "train.py", sdist=True,
        needs=("einops", "einx", "jaxtyping", "local-attention", "rotary-embedding-torch", "tqdm"),
        constants=_small(
            "train.py", (r"^USE_TRITON_NSA = True", "USE_TRITON_NSA = False"), (r"dim_head = 64", "dim_head = 16"),
            (r"^SLIDING_WINDOW_SIZE = .*", "SLIDING_WINDOW_SIZE = 16"),
            (r"use_flex_sliding_window = True", "use_flex_sliding_window = False"),
        ),
        data=_enwik8, printed=r"(?:training|validation) loss: ([\d.]+)",
        what="sparse attention on bytes; wandb, generation with a cache",
    ),
    Script(
        "nano_gpt", "nano-gpt", "0.1.0",
        "-m nano_gpt.tool train --model gpt2-xxs --device cpu --no-compile --dataset tinyshakespeare "
        "--sequence-length 32 --micro-batch-size 4 --total-batch-size 256 --max-steps 6 --eval-steps 3 "
        "--validation-steps 2 --checkpoint-steps 4 --checkpoint-dir . --sample-num-sequences 0 --log-file train.log",
        needs=("huggingface_hub", "safetensors", "tqdm"), data=_tokens, printed=r'"?loss"?[:=]? ?"?([\d.]+)', logs=True,
        saved=("checkpoint_000004.bin",),
        what="GPT-2; hand-set learning rate, DDP code, checkpoints on one rank, started by name",
    ),
    Script(
        "llm_classifier", "llms-from-scratch", "1.0.19", "main.py", needs=("matplotlib", "tqdm", "requests", "pandas"),
        files={"main.py": _SPAM}, data=_messages,
        printed=r"(?:Train loss|Val loss|Validation accuracy:|^accuracy) ([\d.]+)",
        saved=("model.pth",),
        what="a GPT with a new head, the first blocks frozen; functions of the package, the script of its book",
    ),
    Script(
        "mnist", "torch-optimizer", "0.3.0", "examples/mnist.py", sdist=True,
        needs=("tensorboard", "pytorch_ranger", "setuptools"),
        constants=(
            ("examples/mnist.py", "epochs: int = 15", "epochs: int = 2"),
            ("examples/mnist.py", "log_interval: int = 10", "log_interval: int = 1"),
            ("examples/mnist.py", r"batch_size: int = \d+", "batch_size: int = 8"),
        ),
        printed=r"(?:Loss|Average loss): ([\d.]+)",
        what="convolutions; another optimizer, a schedule, histograms of weights and gradients",
    ),
    Script(
        "llm_from_scratch", "llms-from-scratch", "1.0.19", "main.py", needs=("matplotlib", "tqdm", "requests"),
        files={"main.py": _LLM}, data=_texts, printed=r"(?:Train|Val) loss ([\d.]+)", saved=("model.pth",),
        what="a GPT; training functions of the package, the script of its test",
    ),
    Script(
        "picogpt", "picogpt", "0.1.1", "main.py", files={"main.py": _PICO}, data=_texts,
        printed=r"loss=([\d.]+)", saved=("model.pt",),
        what="a GPT behind a class; batches drawn by torch.randint, GradScaler, bits of text out",
    ),
    Script(
        "allrank", "allRank", "1.4.3", "-m allrank.main --job-dir out --run-id run --config-file-name config.json",
        needs=("attrs", "flatten-dict", "tensorboardX", "scikit-learn", "pandas", "scipy"), data=_ranking,
        printed=r"(?:Train loss:|Val loss:|Val ndcg_3) ([\d.]+)", saved=("out/results/run/model.pkl",), logs=True,
        noise=r"linears\.1\.bias",
        what="a transformer for ranking; optimizer and loss by name, metrics, early stopping",
    ),
    Script(
        "charlm", "stanza", "1.15.0",
        "-m stanza.models.charlm --train_file train.txt --eval_file dev.txt --shorthand en_test --save_dir saved "
        "--epochs 2 --batch_size 4 --bptt_size 40 --char_emb_dim 16 --char_hidden_dim 32 --char_dropout 0 "
        "--char_unit_dropout 0 --report_steps 5 --cutoff 1 --cpu",
        needs=(
            "emoji", "huggingface-hub", "networkx", "orjson", "platformdirs", "protobuf", "requests", "tqdm", "udtools",
        ),
        data=_texts, printed=r"loss +([\d.]+)", saved=("saved/en_test_forward_charlm.pt",), logs=True,
        what="an LSTM over characters; the state carried on, ReduceLROnPlateau, checkpoints to go on from",
    ),
    Script("litgpt", "litgpt", "0.5.13", "pretrain.py", refused="the script is written for Lightning"),
    Script(
        "open_clip", "open-clip-torch", "3.3.0", "open_clip_train.main",
        refused="original_model.state_dict(...) is for all ranks, but args.save_logs is true on one rank only",
    ),
)  # fmt: skip
