"""Every flag is declared once, and every command of the docs works: pytest tests/test_flags.py.

The commands are parsed and checked exactly as they stand there, as on a machine with CUDA and as on
one without.
"""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

import train as train_script
from runtime import checkpoint
from runtime.flags import (
    IGNORE,
    LOG,
    REFUSE,
    ArgumentParser,
    between,
    inside,
    non_negative,
    positive,
)
from runtime.options import PATHS
from tools import check_data, predict
from utils import UserError

# The commands of docs/forking.md are for the forks that its diffs make: tests/test_forking.py.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs" / "forking.md")


def commands_of(page: Path) -> list[list[str]]:
    """Return the words after `train.py` of every command of a page, as a shell splits them."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4}.*\b(?:torchrun|python3?|uv run)\b.*?train\.py(.*)$", text, re.M)
    return [shlex.split(line, comments=True) for line in lines]


COMMANDS = [(page.name, words) for page in PAGES for words in commands_of(page)]


@pytest.mark.parametrize("has_cuda", [False, True], ids=["cpu", "cuda"])
@pytest.mark.parametrize("page, words", COMMANDS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_command_of_the_docs_is_accepted_as_written(
    page: str,
    words: list[str],
    has_cuda: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.chdir(tmp_path)
    if "--test-only" in words and "--resume" in words:  # the run that the page speaks of
        path = Path(words[words.index("--resume") + 1])
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save({"args": {"dataset": "coco", "data_path": "/coco"}}, path)
    args = train_script.parse_args(words)
    if not has_cuda and (args.sync_bn or args.device == "cuda"):
        with pytest.raises(UserError, match="CUDA"):
            train_script.check_flags(args)
    else:
        train_script.check_flags(args)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr abc", "--lr: 'abc' is not a number; give one greater than 0"),
        ("--lr 0", "--lr: 0 is out of range; give a number greater than 0"),
        ("--epochs 1.5", "--epochs: '1.5' is not a whole number; give one greater than 0, at most"),
        ("--wd x", "--wd/--weight-decay: 'x' is not a number; give one of at least 0"),
        ("--momentum x", "--momentum: 'x' is not a number; give one from 0 to 1"),
        ("--momentun 0.9", "arguments: --momentun 0.9; did you mean --momentum? (--help"),
        ("--zzz=1", "unrecognized arguments: --zzz=1 (--help lists all flags)"),
    ],
)
def test_a_wrong_flag_is_refused_with_the_right_one(words: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        train_script.parse_args(words.split())
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("page", ["README.md", "docs/own_data.md", "docs/data.md"])
def test_a_command_for_user_data_has_weights_or_adamw_with_clipping(page: str) -> None:
    text = (ROOT / page).read_text().replace("\\\n", " ")
    commands = [
        train_script.build_parser().parse_args(shlex.split(line)[2:])
        for line in text.splitlines()
        if re.match(r" {4}python train\.py .*--data-path (?!/coco)", line)
    ]
    assert commands
    for args in commands:
        is_safe = args.opt == "adamw" and args.clip_grad_norm == 1 and args.wd == 0.05
        assert args.weights or args.weights_backbone or args.test_only or is_safe, args


def test_the_docs_have_commands() -> None:
    assert len(COMMANDS) > 15
    assert any("--sync-bn" in words for _, words in COMMANDS)


# --- ranges ---------------------------------------------------------------------------------------

NEVER = ["nan", "-nan", "inf", "-inf", "", "x", "1e999"]
TOO_LARGE = {
    "--seed": "18446744073709551616",
    "--epochs": "1000000000000000000",
    "--batch-size": "1000000000000",
    "--workers": "1000000",
    "--trainable-backbone-layers": "7",
    "--momentum": "1.1",
    "--lr-gamma": "1.5",
    "--ema-decay": "1",
}


def numeric_flags() -> list[argparse.Action]:
    parser = train_script.build_parser()
    wordless = (Path, None)
    flags = [action for group in parser.groups.values() for action in group]
    return [action for action in flags if action.type not in wordless]


def test_every_number_has_a_range() -> None:
    for action in numeric_flags():
        assert action.type not in (int, float), action.dest
    assert len(numeric_flags()) > 25


@pytest.mark.parametrize("action", numeric_flags(), ids=lambda action: action.dest)
def test_no_range_has_nan_or_infinity_and_each_has_an_end(action: argparse.Action) -> None:
    flag = action.option_strings[-1]
    wrong = [*NEVER, "-2"]
    if flag in TOO_LARGE:
        wrong.append(TOO_LARGE[flag])
    for value in wrong:
        with pytest.raises(UserError, match=f"{flag}.*(out of range|is not a)"):
            train_script.parse_args(["--dataset", "shapes", f"{flag}={value}"])


def test_the_sixth_layer_is_for_mobilenet() -> None:
    words = ["--dataset", "shapes", "--trainable-backbone-layers", "6", "--model"]
    train_script.check_flags(train_script.parse_args([*words, "ssdlite320_mobilenet_v3_large"]))
    with pytest.raises(UserError, match="retinanet_resnet50_fpn has 5; give 0 to 5"):
        train_script.check_flags(train_script.parse_args([*words, "retinanet_resnet50_fpn"]))


@given(st.integers(-(2**70), 2**70), st.floats())
def test_ranges_accept_and_refuse_what_they_state(whole: int, number: float) -> None:
    for parse, value, is_in in (
        (positive(int), whole, 0 < whole < 2**31),
        (non_negative(int, at_most=9), whole, 0 <= whole <= 9),
        (between(float, 0, 1), number, 0 <= number <= 1),
        (inside(0, 1), number, 0 < number < 1),
    ):
        if is_in:
            assert parse(repr(value)) == value
        else:
            with pytest.raises(argparse.ArgumentTypeError):
                parse(repr(value))


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--batch-size", "17"), "--batch-size 17 is more than the 16 images to train on"),
        (
            ("--accumulate-steps", "100000000"),
            "of 100000000 batches, and an epoch has 8",
        ),
    ],
)
def test_a_size_beyond_the_data_is_refused(flags: tuple[str, str], message: str) -> None:
    args = train_script.parse_args(["--dataset", "shapes", *flags])
    with pytest.raises(UserError, match=message):
        train_script.check_sizes(args, num_train=16, num_val=8, num_processes=1)


# --- declared once --------------------------------------------------------------------------------


def test_every_flag_is_read() -> None:
    source = (ROOT / "train.py").read_text() + (ROOT / "runtime" / "options.py").read_text()
    read = {n.attr for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)}
    parser = train_script.build_parser()
    for title in re.findall(r'parser\.values\(args, "(.+?)"\)', source):
        read |= {action.dest for action in parser.groups[title]}
    run = "".join(path.read_text() for path in (ROOT / "runtime").glob("*.py"))
    read |= set(re.findall(r'settings\["(\w+)"\]', run))
    read |= set(PATHS)
    flags = set(vars(train_script.parse_args([])))
    assert flags <= read, flags - read


def test_a_resume_compares_each_flag_that_affects_the_numbers() -> None:
    parser = train_script.build_parser()
    assert set(parser.on_resume) == set(vars(train_script.parse_args([])))
    of = {
        what: {k for k, v in parser.on_resume.items() if v == what}
        for what in (REFUSE, LOG, IGNORE)
    }
    assert {"seed", "batch_size", "model", "wd", "amp", "ema_decay", "opt"} <= of[REFUSE]
    assert {"lr", "epochs", "lr_steps", "clip_grad_norm", "compile"} <= of[LOG]
    assert {"workers", "output_dir", "print_freq", "max_steps"} <= of[IGNORE]
    assert sum(map(len, of.values())) == len(parser.on_resume)


def test_help_can_be_read_line_by_line() -> None:
    parser = train_script.build_parser()
    text = parser.format_help()
    for words in ("(default: None)", "(default: False)", "likewise", " in all", "of RetinaNet"):
        assert words not in text
    for group in parser.groups.values():
        assert all(action.help and len(action.help) > 5 for action in group)


def small_parser() -> ArgumentParser:
    parser = ArgumentParser("test")
    add = parser.group("a", on_resume=REFUSE)
    add("--folder", type=Path, remember=True)
    add("--size", type=positive(int), default=3, remember=True)
    add("--ratios", type=positive(float), nargs="+", remember=True)
    add("--layout", choices=("coco", "voc"), default="coco", remember=True)
    add("--other", default="x", on_resume=LOG)
    return parser


def test_a_checkpoint_replaces_the_defaults() -> None:
    parser = small_parser()
    saved = {"folder": "f", "size": 7, "ratios": [0.1, 2], "layout": "voc", "other": "y"}
    recalled = parser.recall({**saved, "unknown": 1}, "c.pth")
    args = parser.parse_args(["--size", "9"], recalled)
    values = {"folder": Path("f"), "size": 9, "ratios": [0.1, 2.0], "layout": "voc", "other": "x"}
    assert vars(args) == parser.values(args, "a") == values
    assert parser.recall({"folder": None, "ratios": None}, "c.pth") == argparse.Namespace()
    defaults = {"folder": None, "size": 3, "ratios": None, "layout": "coco", "other": "x"}
    assert parser.defaults() == defaults


@pytest.mark.parametrize(
    "name, value",
    [
        ("size", []),
        ("size", "abc"),
        ("size", True),
        ("size", -1),
        ("size", 1.5),
        ("ratios", []),
        ("ratios", "abc"),
        ("ratios", [0.5, "--help"]),
        ("ratios", [float("nan")]),
        ("ratios", {"a": 1}),
        ("layout", "disk"),
        ("layout", ["coco"]),
    ],
)
def test_a_value_in_a_checkpoint_that_no_command_line_gives_is_refused(
    name: str, value: object
) -> None:
    with pytest.raises(UserError, match=f"^--resume c.pth: damaged, its flags: .*--{name}: "):
        small_parser().recall({name: value}, "--resume c.pth")


def test_the_command_line_refuses_damaged_flags_of_a_checkpoint_by_name(tmp_path: Path) -> None:
    for name, value in (("min_size", []), ("score_thresh", "high"), ("dataset", "coco_kp")):
        checkpoint.save({"args": {"data_path": "/coco", name: value}}, tmp_path / "c.pth")
        flag = name.replace("_", "-")
        with pytest.raises(UserError, match=rf"c\.pth: damaged, its flags: .*--{flag}: "):
            train_script.parse_args(["--test-only", "--resume", str(tmp_path / "c.pth")])


@pytest.mark.parametrize("tool", [check_data, predict])
def test_every_number_of_a_tool_has_a_range(tool: ModuleType) -> None:
    for action in tool.build_parser()._actions:
        assert action.type not in (int, float), action.option_strings
