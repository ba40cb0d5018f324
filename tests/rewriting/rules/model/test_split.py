# ruff: noqa: E501 - tables of code are easier to read on one line
"""``--tensor-parallel``: what stays whole and why, and the plans of what does not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rewriter import cli
from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options
from rewriter.types import Remark
from tests.runtime.ranks import run_ranks

from ...helpers import converted
from ...split_models import BERT, BLOCK, CHUNKS, LLAMA, MLP, NANOGPT, NEOX, OPT, QWEN3, STYLES, VIT, WHISPER, source

FAST, SLOW = (NANOGPT.replace("FLASH", str(flash)) for flash in (True, False))
CHOSEN = Options(tensor_parallel=True)


def changed(style: str, before: str, after: str, tail: str = "") -> str:
    assert before in style, before
    return source(style.replace(before, after)) + tail


def planned(text: str) -> tuple[str, str]:
    """The plan in the converted text, and what is said of layers that stay whole."""
    result = convert_text(text, CHOSEN)
    assert not result.error, result.error
    found = re.search(r"parallelize_module\((.*?)\n        \)", result.after.decode(), re.S)
    said = [item.message for item in result.reported if isinstance(item, Remark) and item.code == "BMT008"]
    return found[1] if found else "", "\n".join(said)


SCALED = """

class Scaled(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(sizes))
        self.one = nn.Parameter(torch.ones(sizes[0]))

    def forward(self, x):
        return x * self.one

    def whole(self, x):
        return x * self.weight
"""
ENTRY = "may have an entry for each head"
FOR_HEADS = {
    "slopes that are no buffer": ("self.m = torch.tensor([0.5] * config.heads).view(1, -1, 1, 1)", "att = att + self.m", ENTRY),
    "slopes by another name": (
        "n = config.heads\n        self.m = make_slopes(n)", "att = att + self.m[:, None, None]", ENTRY,
    ),
    "slopes of the forward": ("pass", "att = att - torch.arange(1, self.n_head + 1).view(1, -1, 1, 1)", ENTRY),
    "a mask that is expanded": (
        "pass", "m = torch.ones(T, T).tril()[None, None].expand(B, self.n_head, T, T)\n            att = att + m", ENTRY,
    ),
    "a mask that is repeated": ("pass", "att = att + torch.ones(T, T).repeat(1, self.n_head, 1, 1)", ENTRY),
    "a mask of heads that is compared": (
        'self.register_buffer("m", torch.ones(8, 8).repeat(config.heads, 1, 1))',
        "att = att.masked_fill(self.m[:, :T, :T] == 0, -1e9)", ENTRY,
    ),
    "a module that scales each head": (
        "self.sc = Scaled(config.heads)", "att = self.sc(att.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)",
        "has all features or heads",
    ),
    "a parameter of unknown dimensions": (
        "self.sc = Scaled(config.heads, 1, 1)", "att = self.sc.whole(att)", "dimensions are not seen",
    ),
    "a norm over heads and features": (
        "self.no = nn.LayerNorm([4, 4])", "v = self.no(v.transpose(1, 2)).transpose(1, 2)", "self.no is not followed",
    ),
    "a functional norm over heads and features": (
        "pass", "v = F.layer_norm(v.transpose(1, 2), (self.n_head, 4)).transpose(1, 2)", "a norm goes over",
    ),
    "a layer that mixes heads": (
        "self.talk = nn.Linear(4, 4)", "att = self.talk(att.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)", "mixes heads",
    ),
    "a loop whose second turn meets shares": (
        "pass", "z = x\n            for _ in range(2):\n                w = z.mean()\n                z = att",
        "z is another thing in each branch",
    ),
}  # fmt: skip

WHOLE_ATTENTION: dict[str, tuple[str, str]] = {
    "a norm over all heads": (
        changed(
            LLAMA.replace("self.head_dim = ", "self.q_norm = nn.LayerNorm(config.width)\n        self.head_dim = "),
            "query_states = self.q_proj(hidden_states)\n", "query_states = self.q_norm(self.q_proj(hidden_states))\n",
        ),
        "self_attn.q_norm is a norm over features that ranks would share",
    ),
    "a norm of the project over all heads": (
        changed(
            LLAMA.replace("self.head_dim = ", "self.q_norm = Norm(config.width, 1e-6)\n        self.head_dim = "),
            "query_states = self.q_proj(hidden_states)\n", "query_states = self.q_norm(self.q_proj(hidden_states))\n",
        ),
        "mean goes over what the ranks share",
    ),
    "probabilities that leave": (
        changed(SLOW, "return y\n", "return y, att\n").replace(
            "x = x + self.attn(self.ln_1(x))", "y, att = self.attn(self.ln_1(x))\n        x = x + y"
        ).replace("return x + self.mlp(self.ln_2(x))", "return x + self.mlp(self.ln_2(x)), att"),
        "what it gives leaves the block",
    ),
    "kept on the module": (changed(SLOW, "y = att @ v", "self.seen = att\n            y = att @ v"), "is kept on the module"),
    "a mean over heads": (
        changed(FAST, "y = y.transpose(1, 2)", "y = y - y.mean(1, keepdim=True)\n        y = y.transpose(1, 2)"),
        "mean goes over what the ranks share",
    ),
    "a softmax over heads": (changed(SLOW, "F.softmax(att, dim=-1)", "F.softmax(att, dim=1)"), "softmax goes over"),
    "heads that talk": (
        changed(
            SLOW.replace("self.n_head = ", "self.talk = nn.Linear(config.heads, config.heads)\n        self.n_head = "),
            "att = self.attn_dropout(att)", "att = self.talk(att.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)",
        ),
        "",
    ),
    "one layer for all heads": (
        changed(
            FAST.replace("self.n_head = ", "self.each = nn.Linear(4, 4)\n        self.n_head = "),
            "y = y.transpose(1, 2)", "y = self.each(y)\n        y = y.transpose(1, 2)",
        ),
        "attn.each is one layer for all heads",
    ),
    "a temperature of each head that trains": (
        changed(
            SLOW.replace("self.n_head = ", "self.scale = nn.Parameter(torch.ones(4, 1, 1))\n        self.n_head = "),
            "att = self.attn_dropout(att)", "att = att * self.scale",
        ),
        "it meets a whole value that trains",
    ),
    "slopes of heads": (
        changed(
            SLOW.replace("self.n_head = ", 'self.register_buffer("m", make_slopes(4))\n        self.n_head = '),
            "att = F.softmax", "att = att + self.m\n            att = F.softmax",
        ),
        "it meets a whole value that trains",
    ),
    **{
        name: (
            changed(
                SLOW.replace("self.n_head = ", f"{made}\n        self.n_head = ") + SCALED,
                "att = F.softmax", f"{used}\n            att = F.softmax",
            ),
            reason,
        )
        for name, (made, used, reason) in FOR_HEADS.items()
    },
    "a module that somebody else has made": (
        changed(
            SLOW.replace("self.n_head = ", "self.rel = config.rel\n        self.n_head = "),
            "att = F.softmax", "att = att + self.rel(T)\n            att = F.softmax",
        ),
        ENTRY,
    ),
    "a gate of the whole": (
        changed(FAST, "y = y.transpose(1, 2)", "y = y * x.mean(-1)[:, None, :, None]\n        y = y.transpose(1, 2)"),
        "it meets a whole value that trains",
    ),
    "parts of unequal length": (
        changed(FAST, ".split(self.n_embd, dim=2)", ".split([self.n_embd, self.n_embd, self.n_embd], dim=2)"),
        "split into parts that are not seen to be equal",
    ),
    "parts of another length": (
        changed(FAST, "self.n_embd = config.width", "self.n_embd = config.inner"),
        "split into parts that are not seen to be equal",
    ),
    "heads and parts in one view": (
        changed(
            FAST, "q, k, v = self.c_attn(x).split(self.n_embd, dim=2)",
            "q, k, v = self.c_attn(x).view(B, T, C // 4, 3, 4).unbind(3)",
        ),
        "",
    ),
    "features before heads": (
        changed(NEOX, "out.permute(0, 2, 1, 3).contiguous().view(B, T, C)", "out.permute(0, 2, 3, 1).reshape(B, T, C)"),
        "",
    ),
    "a length that is inferred": (
        changed(OPT, "view(bsz, seq_len, self.num_heads", "view(bsz, -1, self.num_heads"), ""
    ),
    "a size that is compared": (
        changed(LLAMA, "attn_output = attn_output.transpose(1, 2)", "assert attn_output.shape[1] == self.num_heads\n        attn_output = attn_output.transpose(1, 2)"),
        "compares what differs on a rank",
    ),
    "a size that is computed with": (
        changed(FAST, "y = y.transpose(1, 2)", "y = y / y.size(1)\n        y = y.transpose(1, 2)"),
        "the number of features or heads, which differs on a rank",
    ),
    "used twice": (changed(FAST, "y = self.resid_dropout(self.c_proj(y))", "y = self.c_proj(self.c_proj(y))"), ""),
    "used in a loop": (
        changed(FAST, "y = self.resid_dropout(self.c_proj(y))", "for _ in range(2):\n            z = self.c_proj(y)\n        y = z"),
        "attn.c_proj is used more than once",
    ),
    "a weight that is shared": (
        changed(FAST, "self.n_head = config.heads", "self.n_head = config.heads\n        self.c_proj.weight = self.other.weight"),
        "uses c_proj, too",
    ),
    "a weight that others take": (
        changed(FAST, "def forward(self, x):\n        B, T", "def size_of(self):\n        return self.c_attn.weight.norm()\n\n    def forward(self, x):\n        B, T"),
        "uses c_attn, too",
    ),
    "a layer by its name": (
        changed(FAST, "y = y.transpose(1, 2)", "y = y * getattr(self, 'c_attn').weight.mean()\n        y = y.transpose(1, 2)"),
        "getattr(self, 'c_attn') uses c_attn, too",
    ),
    "a weight in the forward": (
        changed(FAST, "y = self.resid_dropout(self.c_proj(y))", "y = F.linear(y, self.c_proj.weight)"),
        "its forward takes self.c_proj.weight itself",
    ),
    "another kind of layer": (
        changed(FAST, "self.c_proj = nn.Linear(config.width, config.width)", "self.c_proj = Adapted(config.width, config.width)", "\n\nclass Adapted(nn.Linear):\n    pass\n"),
        "",
    ),
    "with weight norm": (
        changed(FAST, "self.c_proj = nn.Linear(config.width, config.width)", "self.c_proj = nn.utils.weight_norm(nn.Linear(config.width, config.width))"),
        "",
    ),
    "a function that is not seen": (
        changed(FAST, "y = y.transpose(1, 2)", "y = rearrange(y, 'b h t d -> b t (h d)')\n        y = y[:, None].transpose(1, 2)"),
        "rearrange is not followed",
    ),
    "a lambda that is passed on": (
        changed(FAST, "y = y.transpose(1, 2)", "z = call(lambda: y.mean(1))\n        y = y.transpose(1, 2)"),
        "call is not followed",
    ),
    "a loop over heads": (
        changed(FAST, "y = y.transpose(1, 2)", "z = [t.mean() for t in y]\n        y = y.transpose(1, 2)"),
        "ListComp is not followed",
    ),
    "another number of dimensions in each branch": (
        changed(FAST, "y = y.transpose(1, 2)", "if C > 3:\n            y = y[None][0]\n        else:\n            y = x\n        y = y.transpose(1, 2)"),
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), WHOLE_ATTENTION.values(), ids=WHOLE_ATTENTION.keys())
def test_attention_that_stays_whole(text: str, reason: str) -> None:
    plan, said = planned(text)
    assert not re.search(r"att(n|ention)\.", plan), plan
    assert "stay" in said and reason in said
    assert '"rowwise"' in plan  # the feed-forward layers are another matter


ARGUMENTS = {
    "one for all heads": ("nn.Embedding(8, 1)", "bias = self.rel(torch.arange(6)).mean()", "bias"),
    "by name": ("nn.Parameter(torch.ones(1))", "bias = 2 * self.rel", "bias=bias"),
    "in a tuple": ("nn.Linear(1, 1)", "a, bias = 0, self.rel(x[..., :1]).mean()", "bias"),
    "for all heads": ("4", "bias = torch.zeros(1, self.n_heads, 1, 1)", "bias"),
    "for all heads, by a method": ("nn.Linear(1, 1)", "bias = self.table()", "bias"),
    "of a module with parameters": ("nn.Sequential(nn.Linear(1, 1))", "bias = self.rel(x[..., :1]).mean()", "bias"),
}


@pytest.mark.parametrize(("made", "line", "given"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_arguments_of_blocks_that_train(made: str, line: str, given: str) -> None:
    text = changed(
        SLOW.replace("forward(self, x)", "forward(self, x, bias=None)").replace("self.attn(self.ln_1(x))", "self.attn(self.ln_1(x), bias)"),
        "att = F.softmax", "att = att + bias\n            att = F.softmax",
    ).replace("x = layer(x)", f"x = layer(x, {given})")  # fmt: skip
    fixed = text.replace("        for layer in", "        bias = torch.zeros(6, 6)\n        for layer in")
    assert "attn.c_attn" in planned(fixed)[0]
    text = text.replace("        for layer in", f"        {line}\n        for layer in")
    text = text.replace("        self.embedding", f"        self.rel = {made}\n        self.embedding")
    text = text.replace(
        "\n\ndef build", "\n    def table(self):\n        return self.rel(torch.ones(1))\n\n\ndef build"
    )
    plan, said = planned(text)
    assert "attn.c_attn" not in plan and "it meets a whole value that trains" in said


@pytest.mark.parametrize(
    "lines",
    [
        "def mean():\n            return y.mean(1, keepdim=True)\n        y = y - mean()",
        "match C:\n            case 16:\n                y = y.mean(1, keepdim=True)",
    ],
)
def test_statements_that_are_not_followed(lines: str) -> None:
    plan, said = planned(changed(FAST, "y = y.transpose(1, 2)", f"{lines}\n        y = y.transpose(1, 2)"))
    assert "attn" not in plan and "is not followed" in said


LOOKED = {
    "groups of weight decay": "decay = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]\n    return decay",
    "kinds by name": "kinds = (nn.Linear, nn.Embedding)\n    return [n for n, m in model.named_modules() if isinstance(m, kinds)]",
    "a count": "return sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear))",
    "a loop": "found = set()\n    for n, m in model.named_modules():\n        for p, _ in m.named_parameters():\n"
    "            if isinstance(m, (nn.Linear,)):\n                found.add(p)\n    return found",
}
CHANGED = {
    "modules that are handed on": "return [m for m in model.modules() if isinstance(m, nn.Linear)]",
    "weights in place": "for m in model.modules():\n        if isinstance(m, nn.Linear):\n            m.weight.mul_(2)",
    "data": "for m in model.modules():\n        if isinstance(m, nn.Linear):\n            m.weight.data *= 2",
    "another module": "for n, m in model.named_children():\n        if isinstance(m, nn.Linear):\n            setattr(model, n, nn.Identity())",
    "a helper": "for m in model.modules():\n        if isinstance(m, nn.Linear):\n            helper(m)",
    "an attribute": "for m in model.modules():\n        if isinstance(m, nn.Linear):\n            m.seen = True",
    "hooks": "for m in model.modules():\n        if isinstance(m, nn.Linear):\n            m.register_forward_hook(print)",
    "exactly that class": "return [m.weight for m in model.modules() if type(m) is nn.Linear]",
    "a table of classes": "return [{nn.Linear: 1}.get(type(m)) for m in model.modules()]",
    "kinds that are handed on": "kinds = (nn.Linear,)\n    return kinds",
}


@pytest.mark.parametrize("body", LOOKED.values(), ids=LOOKED.keys())
def test_who_only_looks_at_linear_layers(body: str) -> None:
    assert "rowwise" in planned(source(FAST) + f"\n\ndef look(model):\n    {body}\n")[0]


@pytest.mark.parametrize("body", CHANGED.values(), ids=CHANGED.keys())
def test_who_may_change_linear_layers(body: str) -> None:
    plan, said = planned(source(FAST) + f"\n\ndef look(model):\n    {body}\n")
    assert not plan and "code asks which layers are torch.nn.Linear" in said


SUMMED = [
    "sum(p.pow(2).sum() for p in model.parameters())",
    "sum([torch.norm(p) for n, p in model.named_parameters() if n])",
    "torch.stack([(p ** 2).mean() for p in model.parameters()]).sum()",
    "{n: p.data.abs().max() for n, p in model.named_parameters()}",
]
NOT_SUMMED = [
    "sum(p.numel() for p in model.parameters())",
    "sum(p.grad.norm() for p in model.parameters())",
    "[0.9 * p for p in model.parameters()]",
    "[p for p in model.parameters() if p.dim() > 1]",
]


@pytest.mark.parametrize("code", SUMMED + NOT_SUMMED)
def test_parameters_that_are_added_up(code: str) -> None:
    plan, said = planned(source(FAST) + f"\n\ndef penalty(model):\n    return {code}\n")
    assert bool(plan) == (code in NOT_SUMMED) and ("are added up, of which a rank has its share" in said) != bool(plan)


def test_parameters_that_are_added_up_in_a_loop() -> None:
    tail = (
        "\n\ndef penalty(model):\n    total = 0\n    for p in model.parameters():\n        total = total + p.norm()\n"
    )
    assert "are added up" in planned(source(FAST) + tail)[1]


WHOLE_MODELS: dict[str, tuple[str, str]] = {
    "asked which layers are linear": (
        "\n\ndef groups(model):\n    return [m for m in model.modules() if isinstance(m, nn.Linear)]\n",
        "code asks which layers are torch.nn.Linear",
    ),
    "kinds in a tuple": ("\n\nDECAYED = (torch.nn.Linear,)\n", "code asks which layers are torch.nn.Linear"),
    "applied afterwards": (
        "\n\nmodel = Model(Config())\nmodel.apply(start)\n",
        "model.apply(start) goes over the layers",
    ),
    "initialised afterwards": (
        "\n\nmodel = Model(Config())\nfor p in model.parameters():\n    nn.init.xavier_uniform_(p)\n",
        "nn.init.xavier_uniform_(p) gives parameters of a model that is built other values",
    ),
    "a function that initialises, used afterwards": (
        "\n\ndef init(m):\n    if isinstance(m, nn.Linear):\n        m.weight.data.zero_()\n\n\n"
        "def train(model):\n    init(model.head)\n",
        "code asks which layers are torch.nn.Linear",
    ),
    "adapters": ("\n\nfrom peft import get_peft_model\n", "peft puts other layers"),
    "two places": (
        "\n\nclass Pair(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.one = Model(Config())\n\n\nmodel = Model(Config())\n",
        "Model is made by itself, and inside another model, too",
    ),
    "a list of models": (
        "\n\nclass Pair(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.both = nn.ModuleDict({'one': Model(Config())})\n",
        "",
    ),
    "built further": (
        "\n\nclass Larger(Model):\n    def __init__(self, config):\n        super().__init__(config)\n"
        "        self.apply(start)\n",
        "classes that derive from Model go on building it",
    ),
}


@pytest.mark.parametrize(("tail", "reason"), WHOLE_MODELS.values(), ids=WHOLE_MODELS.keys())
def test_models_that_stay_whole(tail: str, reason: str) -> None:
    text = source(FAST)
    if "Pair" in tail:
        text = text.replace("    return Model(Config()), ", "    return Pair(), ")
    plan, said = planned(text + tail)
    assert not plan and "the layers of Model.layers stay whole" in said and reason in said


def test_a_constructor_that_may_end_early() -> None:
    text = source(FAST).replace(
        "self.norm = nn.LayerNorm", "if config is None:\n            return\n        self.norm = nn.LayerNorm"
    )
    plan, said = planned(text)
    assert not plan and "the constructor of Model may end early" in said


def test_a_function_that_initialises_in_the_constructor() -> None:
    text = source(FAST).replace(
        "nn.Linear(config.width, 14)\n", "nn.Linear(config.width, 14)\n        self.apply(init)\n"
    )
    text += "\n\ndef init(m):\n    if isinstance(m, nn.Linear):\n        nn.init.zeros_(m.weight)\n"
    after = converted(text, tensor_parallel=True)
    assert after.index("self.apply(init)") < after.index("parallelize_module")


def test_blocks_of_two_classes() -> None:
    text = source(FAST).replace("Block(config) for", "Block(config) if _ else Other(config) for")
    text += "\n\nclass Other(nn.Module):\n    def forward(self, x):\n        return x\n"
    plan, said = planned(text)
    assert not plan and "its blocks are not of one class" in said


NOT_ASKED = {
    "another loop of heads": MLP + "\n\nclass Attention(nn.MultiheadAttention):\n    pass\n" + BLOCK,
    "no forward": "\n\nclass Block(nn.Module):\n    pass\n",
}


@pytest.mark.parametrize("style", NOT_ASKED.values(), ids=NOT_ASKED.keys())
def test_blocks_without_known_attention(style: str) -> None:
    assert "attn" not in planned(source(style))[0]


@pytest.mark.parametrize("style", STYLES)
def test_without_the_option_nothing_is_split(style: str) -> None:
    after = converted(source(STYLES[style]))
    assert "parallelize_module" not in after and after.count("-1") == source(STYLES[style]).count("-1")


@pytest.mark.parametrize("style", STYLES)
def test_a_second_time_nothing_changes(style: str) -> None:
    assert "parallelize_module" in converted(source(STYLES[style]), tensor_parallel=True)


def attention_of(text: str) -> str:
    return " ".join(planned(text)[0].split())


def attention(style: str) -> str:
    return attention_of(source(style))


def test_plans() -> None:
    assert '"layers.*.attn.c_attn": ("packed_colwise", 3), "layers.*.attn.c_proj": "rowwise"' in attention(FAST)
    assert attention(SLOW) == attention(FAST)
    assert '"layers.*.attention.query_key_value": ("packed_colwise", 1)' in attention(NEOX)
    assert '"layers.*.mlp.w12": ("packed_colwise", 2), "layers.*.mlp.w3": "rowwise"' in attention(CHUNKS)
    assert '"layers.*.attn.q_norm": "replicated_with_grad_allreduce"' in attention(VIT)
    assert '"layers.*.attention.output.dense": "rowwise", "layers.*.attention.self.query": "colwise"' in attention(BERT)
    assert 'heads=["num_heads", "num_key_value_heads"]' in attention(LLAMA)
    assert attention(QWEN3).endswith("divide=[],")


def test_numbers_of_heads_as_they_are_written() -> None:
    assert "heads=[4]" in attention_of(source(FAST).replace("self.n_head, ", "4, "))


def test_widths_are_not_left_to_views() -> None:
    after = converted(source(WHISPER), tensor_parallel=True)
    assert "q.view(*q.shape[:2], -1, self.query.out_features // self.n_head)" in after


def test_what_is_assumed_is_said() -> None:
    assert "taken for (batch, sequence, features)" in planned(source(WHISPER))[1]
    assert planned(source(FAST))[1].splitlines() == [
        "embedding of Model stays whole: embeddings outside of blocks are not planned",
        "head of Model stays whole: linear layers outside of blocks are not planned",
    ]


UNREAD = {
    "heads in a list": (
        "self.heads = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])",
        "mlp.heads.* of Block stays whole: a list or dict holds them",
    ),
    "a dict": (
        "self.d = nn.ModuleDict(dict(fc=nn.Linear(4, 4)))",
        "mlp.d.fc of Block stays whole: a list or dict holds them",
    ),
    "a dict by keys": (
        "self.d = nn.ModuleDict({'fc': nn.Linear(4, 4)})",
        "mlp.d.fc of Block stays whole: a list or dict",
    ),
    "given to another": (
        "self.pre = Pre(Pre(nn.Linear(4, 4)))",
        "mlp.pre.*.* of Block stays whole: a list or dict holds",
    ),
    "a list that is made before": (
        "these = [nn.Linear(4, 4)]\n        self.net = nn.Sequential(*these)",
        "mlp.net.* of Block stays whole: what is in these lists is not seen",
    ),
    "layers of torch": (
        "self.a = nn.MultiheadAttention(4, 2)\n        self.c = nn.Conv1d(4, 4, 1)",
        "mlp.a (MultiheadAttention), mlp.c (Conv1d) of Block stay whole: only layers of torch.nn.Linear",
    ),
    "of another package": (
        "self.k = flash.Attention(4)",
        "mlp.k (flash.Attention) of Block stays whole: only layers of",
    ),
    "derived": (
        "self.low = Low(4, 4)",
        "mlp.low (Low) of Block stays whole: only layers of torch.nn.Linear are planned",
    ),
    "a table": ("self.table = nn.Embedding(4, 4)", "mlp.table of Block stays whole: embeddings inside of blocks"),
}


@pytest.mark.parametrize(("made", "reason"), UNREAD.values(), ids=UNREAD.keys())
def test_layers_that_no_forward_names_are_said(made: str, reason: str) -> None:
    text = changed(FAST, "self.gelu = nn.GELU()", f"self.gelu = nn.GELU()\n        {made}").replace(
        "import torch\n", "import flash\nimport torch\n", 1
    )
    text += "\n\nclass Low(nn.Linear):\n    pass\n\n\nclass Pre(nn.Module):\n    def __init__(self, fn):\n"
    text += "        super().__init__()\n        self.fn = fn\n"
    plan, said = planned(text)
    assert "mlp.c_fc" in plan and reason in said


def test_a_model_inside_another_and_in_another_file(tmp_path: Path) -> None:
    head, _, rest = source(FAST).partition("\n\nclass Model")
    (tmp_path / "parts.py").write_text(head)
    (tmp_path / "model.py").write_text(
        "import torch\nfrom torch import nn\nimport torch.nn.functional as F\nfrom parts import Block, Config\n\n\nclass Model"
        + rest.partition("\n\ndef build")[0]
        + "\n\nclass Whole(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.inner = Model(Config())\n        self.apply(self.start)\n"
    )
    paths = [tmp_path / "parts.py", tmp_path / "model.py"]
    parts, model = convert_paths(paths, CHOSEN, [tmp_path])
    assert ".chunk(3, dim=2)" in parts.after.decode()
    whole = model.after.decode().partition("class Whole")[2]
    assert (
        '"inner.layers.*.attn.c_attn"' in whole
        and "parallelize_module" not in model.after.decode().partition("class W")[0]
    )
    kept = Options(tensor_parallel=True, ignore=("BMT008",))
    assert b"parallelize_module" not in convert_paths(paths, kept, [tmp_path])[1].after


def test_a_plan_waits_for_its_views() -> None:
    marked = source(FAST).replace(".split(self.n_embd, dim=2)", ".split(self.n_embd, dim=2)  # bmt: skip[BMT008]")
    after = convert_text(marked, CHOSEN).after.decode()
    assert ".split(self.n_embd, dim=2)" in after and "parallelize_module" not in after


def test_settings_of_the_project(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text(source(FAST))
    (tmp_path / "pyproject.toml").write_text("[tool.bmt-convert]\ntensor-parallel = true\n")
    assert cli.main([str(tmp_path)]) == 0
    assert "parallelize_module" in capsys.readouterr().out


@pytest.mark.usefixtures("fork_server")
def test_verify_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text(source(FAST))
    assert cli.main([str(tmp_path / "model.py"), "--tensor-parallel", "--verify", "model:build", "--ranks", "2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"2  built +split +\d+ ", out) and "the converted model is the same model" in out


@pytest.mark.usefixtures("fork_server")
def test_verify_wants_something_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text(source(FAST) + "\n\nDECAYED = (torch.nn.Linear,)\n")
    assert cli.main([str(tmp_path / "model.py"), "--tensor-parallel", "--verify", "model:build", "--ranks", "2"]) == 1
    assert "no layer is split over tensor-parallel ranks" in capsys.readouterr().out


SCRIPT = (
    source(FAST).replace("0.1", "0.0")
    + """

torch.manual_seed(3)
model = Model(Config())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
generator = torch.Generator().manual_seed(7)
losses = []
for step in range(4):
    tokens = torch.randint(14, (4, 7), generator=generator)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
state = model.state_dict()
"""
)


def play(text: str) -> tuple[list[float], dict[str, torch.Tensor], bool]:
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(text, "train.py", "exec", dont_inherit=True), space)
    split = any(getattr(p, "_tp_mode", False) for p in space["model"].parameters())
    return space["losses"], {name: value.clone() for name, value in space["state"].items()}, split


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_script_trains_alike(ranks: int) -> None:
    text = converted(SCRIPT, tensor_parallel=True)
    losses, state, _ = play(SCRIPT)
    for found, own, split in run_ranks(
        ranks, play, text, initialize=False, fresh=True, env={"BMTRAIN_TP_SIZE": "2"}, timeout=60
    ):
        assert split and found == pytest.approx(losses, rel=1e-5)
        assert own.keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-5)
