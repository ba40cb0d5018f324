# ruff: noqa: E501 - tables of code are easier to read on one line
"""One rank logs, and warnings of the others are seen, however logging is set up."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from rewriter.convert import convert_paths
from rewriter.plan import Options
from tests.runtime.ranks import run_ranks

from ...helpers import converted

HEAD = """import logging
import os
import sys
import torch

net = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(net.parameters())
"""
TRAIN = """for x in loader:
    loss = net(x).mean()
    loss.backward()
    opt.step()
    opt.zero_grad()
"""
KEPT = [
    "log = logging.FileHandler(os.devnull)",
    "logging.basicConfig(level=logging.ERROR)",
    "logging.getLogger('PIL').setLevel('warning')",
    "logging.getLogger('PIL').setLevel(40)",
    "log = logging.StreamHandler()",
    "if rank == 0:\n    log = logging.FileHandler('x')",
    "import logging.config\nif rank == 0:\n    logging.config.dictConfig(d)",
    "from loguru import logger\nlogger.remove()\nlogger.add(sys.stderr, level='ERROR')",
    "import structlog\nstructlog.configure(logger_factory=structlog.stdlib.LoggerFactory())",
    "import structlog\nstructlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))",
    "from rich.console import Console\nconsole = Console(quiet=args.quiet)",
    "class Shown(logging.Handler):\n    def emit(self, record):\n        print(self.format(record))",
    "from tqdm import tqdm\nclass Shown(logging.StreamHandler):\n    def emit(self, record):\n        tqdm.write(self.format(record))",
]


@pytest.mark.parametrize("text", KEPT)
def test_kept(text: str) -> None:
    assert f"\n{text}\n" in converted(HEAD + text + "\n" + TRAIN)


ONE = "bmt.rank() == 0 else"
WARNED = '[{"sink": sys.stderr, "level": "WARNING"}]'
FILTER = "structlog.make_filtering_bound_logger"
PRINTED = "logging.getLogger().addHandler(logging.StreamHandler())\n"
CASES = {
    "levels": ("logging.basicConfig(level=logging.INFO)", f"level=logging.INFO if {ONE} logging.WARNING)"),
    "a logger's level": ("net.log.setLevel(logging.DEBUG)", f"logging.DEBUG if {ONE} logging.WARNING)"),
    "a level's name": ("log.setLevel('INFO')", f"setLevel('INFO' if {ONE} logging.WARNING)"),
    "a number": ("logging.basicConfig(level=20)", f"level=20 if {ONE} logging.WARNING)"),
    "an option": ("logging.basicConfig(level=args.level)", f"level=args.level if {ONE} logging.WARNING)"),
    "by name": ("log.setLevel(getattr(logging, name.upper()))", f"(getattr(logging, name.upper()) if {ONE} logging.WARNING)"),
    "from a table": ("log.setLevel(levels[verbosity])", f"(levels[verbosity] if {ONE} logging.WARNING)"),
    "a log file": ("log = logging.FileHandler(d)", f"log = logging.FileHandler(d) if {ONE} logging.StreamHandler()"),
    "by keyword": ("log = logging.FileHandler(mode='w', filename=d)", f"filename=d) if {ONE} logging.StreamHandler()"),
    "turned": ("from logging.handlers import RotatingFileHandler as F\nlog.addHandler(F(d, maxBytes=9))", f"F(d, maxBytes=9) if {ONE} logging.Stream"),
    "a log file beside what is printed": (PRINTED + "log = logging.FileHandler(d)", f"logging.FileHandler(d if {ONE} os.devnull)"),
    "both handlers": ("logging.basicConfig(handlers=[logging.FileHandler(d), logging.StreamHandler()])", f"FileHandler(d if {ONE} os.devnull), "),
    "the root's": ("logging.basicConfig(filename=d, filemode='w')", f"(filename=d if {ONE} None, filemode='w')"),
    "the root's, and printed": (PRINTED + "logging.basicConfig(filename=d)", f"(filename=d if {ONE} os.devnull)"),
    "loguru": ("from loguru import logger\nlogger.add(d / 'a.log')", f"logger.add(d / 'a.log' if {ONE} os.devnull)"),
    "loguru by keyword": ("import loguru\nloguru.logger.add(sink=d)", f"(sink=d if {ONE} os.devnull)"),
    "loguru printed": ("from loguru import logger\nlogger.add(sys.stderr)", f'(sys.stderr, level="DEBUG" if {ONE} "WARNING")'),
    "loguru's level": ("from loguru import logger\nlogger.add(sys.stdout, level='INFO')", f"level='INFO' if {ONE} \"WARNING\")"),
    "loguru's settings": ("from loguru import logger\nlogger.configure(handlers=d, extra=e)", f"(handlers=d if {ONE} {WARNED}, extra=e)"),
    "loguru's settings in a dict": ("import loguru\nloguru.logger.configure(**d)", f'(**{{**d, **({{}} if {ONE} {{"handlers": {WARNED}}})}})'),
    "structlog's settings": ("import structlog\nstructlog.configure(processors=d)", f"(processors=d, wrapper_class={FILTER}(logging.NOTSET if {ONE} logging.WARNING))"),
    "structlog's class": ("import structlog as s\ns.configure(wrapper_class=s.BoundLogger)", f"=s.BoundLogger if {ONE} {FILTER}(logging.WARNING))"),
    "structlog's level": ("from structlog import configure, make_filtering_bound_logger as f\nb = f(20)\nconfigure(wrapper_class=b)", f"b = f(20 if {ONE} logging.WARNING)\nconfigure(wrapper_class=b)"),
    "structlog's settings in a dict": ("import structlog\nstructlog.configure(**d)", f"structlog.configure(**d)\nif bmt.rank() != 0:\n    structlog.configure(wrapper_class={FILTER}(logging.WARNING))"),
    "structlog's own settings": ("import structlog\nstructlog.stdlib.recreate_defaults()", f"recreate_defaults(log_level=logging.NOTSET if {ONE} logging.WARNING)"),
    "a logger of structlog's": ("import structlog\nlog = structlog.wrap_logger(a, d, structlog.BoundLogger)", f"(a, d, structlog.BoundLogger if {ONE} {FILTER}(logging.WARNING))"),
    "absl": ("from absl import logging as log\nlog.set_verbosity(log.INFO)", f"(log.INFO if {ONE} log.WARNING)"),
    "coloured": ("import coloredlogs\ncoloredlogs.install()", f'install(level="INFO" if {ONE} "WARNING")'),
    "a console": ("from rich.console import Console\nout = Console(width=80)", "out = Console(width=80, quiet=bmt.rank() != 0)"),
    "rich's bar": ("from rich.progress import track\nfor x in track(data):\n    pass", "track(data, disable=bmt.rank() != 0)"),
    "settings": ("import logging.config\nlogging.config.dictConfig(d)", "\nbmt.on_rank_0(logging.config.dictConfig)(d)"),
    "settings of a file": (
        "from logging.config import fileConfig as configure\ndef log():\n    configure('log.ini', None)\nlog()",
        "\n    bmt.on_rank_0(configure)('log.ini', None)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), CASES.values(), ids=CASES.keys())
def test_one_rank_logs(text: str, wanted: str) -> None:
    assert wanted in converted(HEAD + text + "\n" + TRAIN)


def test_logging_is_imported_where_only_its_names_were() -> None:
    head = HEAD.replace("import logging", "from logging import INFO, getLogger")
    after = converted(head + "getLogger().setLevel(INFO)\n" + TRAIN)
    assert f"setLevel(INFO if {ONE} logging.WARNING)" in after and "\nimport logging\n" in after


@pytest.mark.parametrize(
    ("text", "set_up", "wanted"),
    [
        ("from loguru import logger\nlogger.info('starts')", "logger.remove()", f"loguru.logger.configure(handlers={WARNED})"),
        ("from loguru import logger\nlogger.info('starts')", "logger.configure(handlers=[])", f"loguru.logger.configure(handlers={WARNED})"),
        ("import structlog\nlog = structlog.get_logger()", "structlog.configure()", f"structlog.configure(wrapper_class={FILTER}(logging.WARNING))"),
    ],
)  # fmt: skip
def test_what_prints_by_itself_is_one_rank_s(text: str, set_up: str, wanted: str) -> None:
    after = converted(f"{HEAD}{text}\n{TRAIN}")
    assert f"\nbmt.init_distributed()\nif bmt.rank() != 0:\n    {wanted}\n" in after
    assert converted(after) == after
    assert "!= 0" not in converted(f"{HEAD}{text}\n{set_up}\n{TRAIN}")


def test_the_ranks_are_there_before_a_log_file_is_opened() -> None:
    for made in ("logging.basicConfig(filename='x')", "Log()"):
        log = "class Log:\n    def __init__(self):\n        self.file = logging.FileHandler('x')\n\n\n"
        after = converted(HEAD.replace("net =", f"{log}{made}\nnet =") + TRAIN)
        assert after.index("bmt.init_distributed()") < after.index(f"\n{made[:12]}", after.index("class Log"))


# On two ranks -----------------------------------------------------------------------------------------------------

SETUPS = {
    "a file": 'logging.basicConfig(filename="a.log", level=logging.INFO, force=True)\n',
    "a handler": 'log.setLevel("INFO")\nlog.addHandler(logging.FileHandler("a.log"))\n',
    "several": 'log.setLevel(levels["info"])\nlog.addHandler(logging.FileHandler("a.log"))\nlog.addHandler(logging.StreamHandler())\n',
}
PROGRAM = """import logging
import torch

levels = {{"info": logging.INFO}}
log = logging.getLogger("play")
{setup}
net = torch.nn.Linear(4, 1, device="cpu")
opt = torch.optim.SGD(net.parameters(), lr=0.1)
log.info("a line")
net(torch.ones(2, 4, device="cpu")).mean().backward()
opt.step()
if bad:
    log.warning("a bad thing")
"""


def play(text: str, folder: str) -> tuple[str, str]:
    """What a rank's program leaves in its log file, and prints; the second rank has something to warn of."""
    own = Path(folder) / os.environ["RANK"]
    own.mkdir()
    os.chdir(own)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        exec(compile(text, "program.py", "exec"), {"bad": os.environ["RANK"] == "1", "__name__": "__main__"})
    held: list[Any] = [*logging.getLogger("play").handlers, *logging.getLogger().handlers]
    for handler in held:
        handler.close()
    return (own / "a.log").read_text() if (own / "a.log").exists() else "", said.getvalue()


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
def test_one_rank_writes_the_file_and_the_other_warns(setup: str, tmp_path: Path) -> None:
    text = converted(PROGRAM.format(setup=setup))
    (file, said), (other_file, other_said) = run_ranks(2, play, text, str(tmp_path), initialize=False, fresh=True)
    assert "a line" in file and not other_file
    assert other_said.count("a bad thing") == 1 and "a line" not in other_said and "a bad thing" not in said


PACKAGES = {
    "loguru": ("loguru", "from loguru import logger as log"),
    "loguru's sinks": ("loguru", "from loguru import logger as log\nlog.configure(handlers=[{'sink': sys.stderr}])"),
    "structlog": ("structlog", "import structlog\nstructlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))\nlog = structlog.get_logger()"),
}  # fmt: skip


@pytest.mark.parametrize(("package", "setup"), PACKAGES.values(), ids=PACKAGES.keys())
def test_packages_that_log_do_so_on_one_rank(package: str, setup: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    text = (
        HEAD
        + setup
        + "\nlog.info('a line')\nif bad:\n    log.warning('a bad thing')\nloader = [torch.ones(2, 4)]\n"
        + TRAIN
    )
    (_, said), (_, other_said) = run_ranks(2, play, converted(text), str(tmp_path), initialize=False, fresh=True)
    assert said.count("a line") == 1 and "a line" not in other_said and other_said.count("a bad thing") == 1


def test_a_logger_that_another_file_makes_starts_no_ranks(tmp_path: Path) -> None:
    """``bmt.rank()`` of its level is known before; a second conversion finds nothing to start."""
    (tmp_path / "logger.py").write_text(
        "import logging\n\nlogging.basicConfig(level=logging.DEBUG)\nlog = logging.getLogger()\n"
    )
    (tmp_path / "train.py").write_text(
        "import torch\nfrom logger import log\n\n\ndef train(net, opt, batches):\n    for x in batches:\n"
        "        opt.zero_grad()\n        net(x).mean().backward()\n        opt.step()\n        log.info('step')\n\n\n"
        "if __name__ == '__main__':\n    torch.manual_seed(0)\n    net = torch.nn.Linear(4, 1)\n"
        "    train(net, torch.optim.SGD(net.parameters(), lr=0.1), batches)\n"
    )
    paths = [tmp_path / "logger.py", tmp_path / "train.py"]
    for result in convert_paths(paths, Options(), [tmp_path]):
        result.path.write_bytes(result.after)
    assert "level=logging.DEBUG if bmt.rank() == 0" in paths[0].read_text()
    assert not any(result.changed for result in convert_paths(paths, Options(), [tmp_path]))


@pytest.mark.parametrize("line", ["print('on a CPU')", "tell('on a CPU')", "for _ in range(2): print('on a CPU')"])
def test_what_another_file_prints_when_it_is_imported_starts_no_ranks(line: str, tmp_path: Path) -> None:
    """Not in a second conversion either, where ``bmt.print_rank`` stands there."""
    (tmp_path / "agent.py").write_text(
        f"import torch\n\n\ndef tell(text):\n    print(text)\n\n\n{line}\n\n\n"
        "class Agent:\n    def __init__(self):\n        self.net = torch.nn.Linear(4, 1)\n"
        "        self.opt = torch.optim.SGD(self.net.parameters(), lr=0.1)\n\n    def learn(self, x):\n"
        "        self.opt.zero_grad()\n        self.net(x).mean().backward()\n        self.opt.step()\n"
    )
    (tmp_path / "train.py").write_text(
        "import torch\nfrom agent import Agent\n\n\ndef train():\n    agent = Agent()\n    for x in batches:\n"
        "        agent.learn(x)\n    print('done')\n\n\nif __name__ == '__main__':\n    train()\n"
    )
    paths = [tmp_path / "agent.py", tmp_path / "train.py"]
    for result in convert_paths(paths, Options(), [tmp_path]):
        result.path.write_bytes(result.after)
    assert "print_rank" in paths[0].read_text() and "init_distributed" not in paths[0].read_text()
    assert not any(result.changed for result in convert_paths(paths, Options(), [tmp_path]))
