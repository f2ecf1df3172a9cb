"""The command line: one module per command, imported only when its command is typed.

Every expected fault ends in one readable paragraph and its exit code; ``--debug`` shows the
traceback.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from camoxpert import __version__
from camoxpert.errors import CamoXpertError, ConfigError, Stopped
from camoxpert.files import expand_user
from camoxpert.runtime.host import wait_passively
from camoxpert.text import did_you_mean

# Command -> what it does. The module camoxpert.cli.<command> has add_arguments() and run().
COMMANDS = {
    "train": "train a model, then score it and write its report",
    "crossval": "train K folds and score every image by a model that never saw it",
    "evaluate": "score a checkpoint or any model's maps with the field's measures",
    "predict": "find the hidden objects in images, videos, folders and lists",
    "export": "write a model as ONNX, OpenVINO or torch file, proved to be the same",
    "share": "save a model to give away, or push it to the Hugging Face Hub",
    "serve": "open a page where an image is dropped and its mask is shown",
    "doctor": "check the environment and the data before hours are spent",
    "profile": "show where a training step goes, what bounds it and which flag helps",
    "benchmark": "measure ours against the baseline in one run",
    "sweep": "search settings on the validation images, in ordinary runs",
    "report": "write a page about one run or several, or print a ledger as a table",
    "synthesize": "generate image and mask pairs with hidden objects",
}
# How the overview arranges them; a command that is in no group stands under the last title.
GROUPS = {
    "data": ("doctor", "synthesize"),
    "models": ("train", "crossval", "sweep", "evaluate", "report"),
    "use": ("predict", "serve", "export", "share"),
    "speed": ("profile", "benchmark"),
    "more": (),
}
# Kinds of a command that have flags of their own: command and kind -> module, what it does.
KINDS = {
    ("benchmark", "quality"): (
        "quality",
        "which decoder is best on your own data, fairly compared",
    ),
    ("benchmark", "export"): ("export_speed", "what each format of a model costs and changes"),
    ("synthesize", "relight"): ("relight", "put the objects of your images into other light"),
    ("synthesize", "compose"): (
        "compose",
        "put objects before backgrounds that resemble them",
    ),
    ("synthesize", "counterfactual"): (
        "counterfactual",
        "take the objects out of your images, to train the presence head",
    ),
}


class Parser(argparse.ArgumentParser):
    """argparse that answers a typo with the nearest flag and raises instead of exiting."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        # Examples are lines to paste, not a paragraph to wrap.
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with argparse's message, made a sentence."""
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        hint = did_you_mean(wrong[1], re.findall(r"[^\s',]+", wrong[2])) if wrong else ""
        raise ConfigError(
            f"{message[:1].upper()}{message[1:]}.{hint} `{self.prog} --help` lists the flags."
        )

    def parse_checked(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse; return the namespace and the arguments that are not flags (dotted overrides).

        Raises:
            ConfigError: an unknown flag, with the nearest known one.
        """
        namespace, rest = self.parse_known_args(list(arguments))
        known = [option for action in self._actions for option in action.option_strings]
        for argument in rest:
            if argument.startswith("-") and not _is_number(argument):
                flag = argument.partition("=")[0]
                otherwise = f" `{self.prog} --help` lists them."
                hint = did_you_mean(flag, known, otherwise=otherwise)
                raise ConfigError(f"Unknown flag {flag}.{hint}")
        return namespace, rest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    Args:
        arguments: what was typed after the program's name; None reads ``sys.argv``.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in typed
    typed = [argument for argument in typed if argument != "--debug"]
    open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show an arrow or an accent shows its code instead of failing.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    wait_passively()
    try:
        return run_command(typed)
    except (CamoXpertError, Stopped) as error:
        if debug:
            raise
        prefix = "" if isinstance(error, Stopped) else "error: "
        if not error.quiet:
            print_paragraph(str(error), prefix=prefix)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print_paragraph("Stopped (Ctrl-C) before anything needed saving.")
        return 130
    except BrokenPipeError:
        # The reader of our output left (`| head`); the interpreter must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A full disk, a folder without permission: the system says what and where.
        if debug:
            raise
        where = f": {error.filename}" if error.filename else ""
        print_paragraph(f"error: {error.strerror or error}{where}.")
        return 3


def open_missing_streams() -> None:
    """Open streams that a daemon or ``2>&-`` closed, so that what is printed goes nowhere.

    Without this, printing fails, and the next file that is opened, such as a checkpoint, gets
    number 2 and receives what libraries write to the standard error.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken: this one.
            os.open(os.devnull, os.O_RDWR)
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115


def run_command(typed: list[str]) -> int:
    """Dispatch to the command's module."""
    if typed[:1] == ["help"] and len(typed) > 1:
        typed = [*typed[1:], "--help"]
    if not typed or typed[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if typed else 2
    if typed[0] in ("-V", "--version"):
        print(f"camoxpert {__version__}")
        return 0
    name = typed[0]
    if name.startswith("-"):
        hint = did_you_mean(name, ("--help", "--version"))
        raise ConfigError(
            f"{name} stands before any command.{hint} The command comes first, as in `camoxpert "
            f"train --dataset-path DIR`. Commands: {', '.join(COMMANDS)}."
        )
    if name not in COMMANDS:
        raise ConfigError(
            f"Unknown command {name!r}.{did_you_mean(name, COMMANDS)} Commands: "
            f"{', '.join(COMMANDS)}. `camoxpert --help` says what each does."
        )
    parser, module, words = command_parser(typed)
    options, rest = parser.parse_checked([_at_home(word) for word in typed[words:]])
    result: int = module.run(options, rest, typed)
    return result


def command_parser(typed: Sequence[str]) -> tuple[Parser, ModuleType, int]:
    """Return a command's parser, its module, and how many words of ``typed`` name the command.

    Args:
        typed: what was typed after the program's name; the first word is a key of ``COMMANDS``.
    """
    name = typed[0]
    kind = (name, typed[1] if len(typed) > 1 else "")
    words = 2 if kind in KINDS else 1
    module_name, description = KINDS.get(kind, (name, COMMANDS[name]))
    module = importlib.import_module(f"camoxpert.cli.{module_name}")
    parser = Parser(prog=f"camoxpert {' '.join(typed[:words])}", description=f"{description}.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    module.add_arguments(parser)
    return parser, module, words


def _at_home(word: str) -> str:
    """Return an argument with the home folder for ``~``; shells leave ``--flag=~/x`` as it is."""
    flag, equals, value = word.partition("=")
    if word.startswith("--") and equals:
        return f"{flag}={expand_user(value)}"
    return expand_user(word)


def overview() -> str:
    """Return the text of ``--help`` without a command."""
    return "\n".join(
        [
            "CamoXpert finds what hides: mixture-of-experts segmentation of camouflaged objects.",
            "",
            "usage: camoxpert COMMAND ...    (or: python train_ultimate.py COMMAND ...)",
            "",
            *_grouped(),
            "`camoxpert COMMAND --help` lists a command's flags and gives examples.",
            "",
            "exit codes: 0 done, 2 usage or settings, 3 data, 4 checkpoint or disk, 5 numeric",
            "failure, 6 another process of the run ended, 75 stopped at the deadline (run the same",
            "command again), 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.",
        ]
    )


def _grouped() -> list[str]:
    """Return the lines of the commands and their kinds, a paragraph for each of ``GROUPS``."""
    *_, last = GROUPS
    placed = {name for names in GROUPS.values() for name in names}
    lines = []
    for title, names in GROUPS.items():
        listed = [*names, *(name for name in COMMANDS if title == last and name not in placed)]
        rows = [
            row
            for name in listed
            for row in (
                (f"  {name}", COMMANDS[name]),
                *((f"    {kind}", text) for (of, kind), (_, text) in KINDS.items() if of == name),
            )
        ]
        if rows:
            lines += [f"{title}:", *(f"{label:<20}{text}" for label, text in rows), ""]
    return lines


def print_paragraph(text: str, *, prefix: str = "") -> None:
    """Print a message to stderr, wrapped to 100 columns; line breaks in it stay."""
    lines = [
        textwrap.fill(line, 100, break_long_words=False, break_on_hyphens=False)
        for line in f"{prefix}{text}".splitlines()
    ]
    print("\n".join(lines), file=sys.stderr)


def no_overrides(rest: list[str]) -> None:
    """Raise ConfigError for arguments a command does not take."""
    if rest:
        raise ConfigError(f"Unexpected argument {rest[0]!r}.")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
