"""Scripts that name their GPU by a number: each rank sees its own as that one."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options
from rewriter.types import Remark

from ...helpers import IMPORTS, NET, converted

LINE = "import bmtrain.own_gpu  # a rank sees one GPU, as cuda:0\n"
SCRIPT = (
    IMPORTS
    + NET
    + """
{made}
net = Net(){placed}
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x, y in DataLoader(data, batch_size=8):
    x, y = {given}
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    opt.step()
"""
)
DEVICE, GIVEN = ".to(device)", "x.to(device), y.to(device)"


def script(made: str, placed: str = DEVICE, given: str = GIVEN) -> str:
    return SCRIPT.format(made=made, placed=placed, given=given)


NO_NUMBER = {
    "none": script("", "", "x, y"),
    "the kind of device": script('device = torch.device("cuda" if torch.cuda.is_available() else "cpu")'),
    "the kind as text": script('device = "cuda"'),
    "no argument": script("", ".cuda()", "x.cuda(non_blocking=True), y.cuda()"),
    "a device": script('device = torch.device("cuda")', ".cuda(device)", "x.cuda(device), y.cuda(device)"),
    "the processor": script('device = torch.device("cpu")'),
    "a tensor's device": script('device = "cuda"', DEVICE, "x.to(net.device), y.to(x.device)"),
    "an option of a kind": script(
        'parser.add_argument("--device", default="cuda")\nargs = parser.parse_args()',
        ".to(args.device)",
        "x.to(args.device), y.to(args.device)",
    ),
    "an object's": script("", ".to(self.device)", "x.to(self.device), torch.zeros(8, device=x.device)"),
    "a kind by name": script("", '.to(device="cuda")', 'x.to(dtype=torch.float32, device="cuda"), y.to(torch.long)'),
    "words": script('device = "cuda"\nprint("cuda: it trains on a GPU")'),
}


@pytest.mark.parametrize("text", NO_NUMBER.values(), ids=NO_NUMBER.keys())
def test_what_names_no_gpu_is_left(text: str) -> None:
    assert "own_gpu" not in converted(text)


RANKS = {
    "the launch says it": script('import os\ndevice = torch.device("cuda", int(os.environ["LOCAL_RANK"]))'),
    "as text": script("import os\ndevice = f\"cuda:{os.environ['LOCAL_RANK']}\""),
    "an option of the launcher": script('device = torch.device("cuda:%d" % args.local_rank)'),
    "its own processes": script("device = f'cuda:{gpu}'\ntorch.distributed.init_process_group('nccl')"),
    "a scheduler says it": script(
        'import os\nrank = int(os.environ["SLURM_PROCID"])\ndevice = f"cuda:{rank % torch.cuda.device_count()}"'
    ),
    "an environment of ranks": script('import os\ndevice = torch.device("cuda", int(os.environ["RANK"]))'),
    "asked of torch": script('import torch.distributed as dist\ndevice = "cuda:{}".format(dist.get_rank())'),
    "asked of messages": script("gpu = MPI.COMM_WORLD.Get_rank() % 8\ntorch.cuda.set_device(gpu)", ".cuda()"),
    "asked of a state": script('device = "cuda:" + str(PartialState().process_index)'),
    "an option of a rank": script('device = torch.device("cuda:%d" % cfg.rank)'),
    "its argument": script("", ".cuda(rank)", "x.cuda(rank), y.cuda(rank)"),
    "written for bmtrain": script("import bmtrain as bmt\nbmt.init_distributed()\ndevice = torch.device('cuda:0')"),
}


@pytest.mark.parametrize("text", RANKS.values(), ids=RANKS.keys())
def test_programs_that_know_of_ranks_name_their_own(text: str) -> None:
    assert "own_gpu" not in convert_text(text).after.decode()


NAMED = {
    "a device": script('device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")'),
    "text": script('device = "cuda:0"'),
    "two arguments": script('device = torch.device("cuda", 0)'),
    "a number as a device": script("device = torch.device(0)"),
    "by name": script('device = torch.device(type="cuda", index=0)'),
    "an option": script("", ".cuda(args.gpu)", "x.cuda(args.gpu), y.cuda(args.gpu)"),
    "an option in text": script('device = f"cuda:{args.gpu}"'),
    "formatted": script('device = "cuda:{}".format(args.gpu)'),
    "by percent": script('device = "cuda:%d" % args.gpu'),
    "put together": script('device = "cuda:" + str(args.gpu)'),
    "an option that is a device": script("device = torch.device(args.device)"),
    "a default": script('parser.add_argument("--device", default="cuda:0")\ndevice = parser.parse_args().device'),
    "a number": script("", ".to(0)", "x.to(0), y.to(0)"),
    "a number by name": script("", ".cuda(device=0)", "x.to(device=0), y.cuda(device=0)"),
    "an option by name": script("", ".cuda(device=args.gpu_id)", "x.to(device=args.gpu_id), y.cuda(gpu)"),
    "what an option says": script("", ".to(args.device)", "x.to(args.device), y.to(args.device)"),
    "what a file says": script("", '.to(config["device"])', 'x.to(config["device"]), y.to(config["device"])'),
    "what settings say": script("", ".to(cfg.train.device)", "x.to(cfg.train.device), y.to(cfg.train.device)"),
    "chosen": script("torch.cuda.set_device(0)", ".cuda()", "x.cuda(), y.cuda()"),
    "several at once": script('device = torch.device("cuda:0")\nif many:\n    net = nn.DataParallel(net)'),
    "where it is loaded": script(
        'device = "cuda"\nstate = torch.load("net.pt", map_location="cuda:0")'
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", NAMED.values(), ids=NAMED.keys())
def test_the_first_line_lets_each_rank_see_its_own(text: str) -> None:
    after = converted(text)
    assert after.startswith(LINE) and after.count("own_gpu") == 1
    assert "import bmtrain as bmt" in after


def test_it_comes_behind_what_must_be_first() -> None:
    head = '"""Trains."""\n\nfrom __future__ import annotations\n\n'
    assert converted(head + NAMED["a device"]).startswith(head + LINE)
    comment = "#!/usr/bin/env python\n# Licence\n"
    assert converted(comment + NAMED["a device"]).startswith((comment + LINE, LINE + comment, comment + "\n" + LINE))


OTHER = {
    '"cuda:1"': script('device = torch.device("cuda:1")'),
    "'cuda:3'": script("device = torch.device('cuda:3' if torch.cuda.is_available() else 'cpu')"),
    "a number": script("torch.cuda.set_device(2)", ".cuda(2)", "x.cuda(2), y.cuda(2)"),
}


@pytest.mark.parametrize("text", OTHER.values(), ids=OTHER.keys())
def test_another_number_becomes_that_of_the_only_one(text: str) -> None:
    after = converted(text)
    assert after.startswith(LINE)
    after = after.removeprefix(LINE)
    assert not any(name in after for name in ("cuda:1", "cuda:3", "(2)"))
    assert ("cuda:0" in after) == ("cuda:" in text)


ASKED = {
    "how much it holds": ("torch.cuda.memory_allocated(1)", "torch.cuda.memory_allocated(0)"),
    "its name": ("torch.cuda.get_device_name(1)", "torch.cuda.get_device_name(0)"),
    "that it is done": ("torch.cuda.synchronize(device=1)", "torch.cuda.synchronize(device=0)"),
    "another's name": ("torch.cuda.get_device_name(0)", "torch.cuda.get_device_name(0)"),
    "no GPU": ("torch.cuda.manual_seed(1)", "torch.cuda.manual_seed(1)"),
}


@pytest.mark.parametrize(("asks", "then"), ASKED.values(), ids=ASKED.keys())
def test_what_is_asked_of_a_gpu_is_asked_of_the_only_one(asks: str, then: str) -> None:
    text = script(f'device = torch.device("cuda:1")\nprint({asks})')
    after = converted(text)
    assert then in after and '"cuda:0"' in after
    assert not any(finding.code == "BMT048" for finding in convert_text(text).reported)


SAME = {
    "where a file's tensors were": 'device = "cuda:0"\nstate = torch.load("a.pt", map_location={"cuda:1": "cuda:0"})',
    "what an option allows": 'parser.add_argument("--device", default="cuda:0", choices=["cuda:0", "cuda:1"])\n'
    "device = parser.parse_args().device",
}


@pytest.mark.parametrize("made", SAME.values(), ids=SAME.keys())
def test_one_that_is_used_and_others_that_are_not(made: str) -> None:
    text = script(made)
    assert made.splitlines()[-1] in converted(text) and "cuda:1" in converted(text)
    assert not any(finding.code == "BMT048" for finding in convert_text(text).reported)


def test_several_are_reported() -> None:
    text = script('one, two = "cuda:0", "cuda:1"', ".to(one)", "x.to(one), y.to(two)")
    result = convert_text(text)
    (remark,) = (finding for finding in result.reported if isinstance(finding, Remark) and finding.code == "BMT048")
    assert "GPU 0 and 1" in remark.message and remark.differs


def test_the_script_gets_the_line_and_not_the_file_that_names(tmp_path: Path) -> None:
    tmp_path.joinpath("settings.py").write_text('import torch\n\ndevice = torch.device("cuda:0")\n')
    tmp_path.joinpath("train.py").write_text("from settings import device\n" + script(""))
    results = {result.path.name: result for result in convert_paths(sorted(tmp_path.glob("*.py")), Options())}
    assert results["train.py"].after.decode().startswith(LINE + "from settings")
    assert not results["settings.py"].changed
