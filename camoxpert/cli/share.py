"""``share``: the weights of a run with a model card, in a folder or on the Hugging Face Hub."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from camoxpert import console, stop
from camoxpert.cli import no_overrides
from camoxpert.cli.outputs import check_folder
from camoxpert.errors import ConfigError

EXAMPLES = """The weights are safetensors, which cannot hold code; paths of this machine are left
out. Every command takes the folder, or hf:USER/NAME, as its model.

examples:
  camoxpert share runs/NAME --save beetle/
  camoxpert share runs/NAME --to hf:USER/NAME --license mit --private
  camoxpert share hf:USER/NAME@v1 --save copy/"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "checkpoint", help="a run folder (its best weights), a .pt file or hf:USER/NAME"
    )
    parser.add_argument("--save", metavar="DIR", help="folder to save it in")
    parser.add_argument(
        "--to",
        metavar="NAME",
        help="hf:USER/NAME or hf:USER/NAME@BRANCH to push it to; both are created if missing",
    )
    parser.add_argument(
        "--license",
        default="",
        metavar="ID",
        help="licence of these weights as the Hub writes it, such as mit or cc-by-nc-4.0 [none]",
    )
    parser.add_argument(
        "--private", action="store_true", help="a repository that is created is private"
    )
    parser.add_argument("--message", default="", metavar="TEXT", help="of the commit of --to")


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Save, push, or both."""
    no_overrides(rest)
    if not options.save and not options.to:
        raise ConfigError("Say where to: --save DIR, --to hf:USER/NAME, or both.")
    if not options.to and (options.private or options.message):
        raise ConfigError("--private and --message belong to --to.")
    if options.license and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", options.license):
        raise ConfigError(
            f"--license {options.license}: write it as the Hub does, in small letters: mit, "
            "apache-2.0, cc-by-nc-4.0, other."
        )
    from camoxpert.runs.hub import hub_name

    target = hub_name(options.to) if options.to else None
    if options.save:
        check_folder("--save", options.save)
    from camoxpert.inference.predictor import load_predictor

    with stop.watch(), stop.outcome("The model was not shared."):
        predictor = load_predictor(Path(options.checkpoint), device="cpu", precision="fp32")
        if options.save:
            repo = "" if target is None else target.repo
            folder = predictor.save_pretrained(options.save, licence=options.license, repo=repo)
            console.say(f"saved       {folder}")
        if target is not None:
            page = predictor.push_to_hub(
                str(target),
                private=options.private,
                licence=options.license,
                message=options.message,
            )
            console.say(f"pushed      {page}")
    return 0
