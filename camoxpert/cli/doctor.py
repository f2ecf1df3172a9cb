"""``doctor``: check the environment and the data before hours are spent."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camoxpert.cli import no_overrides
from camoxpert.errors import CamoXpertError, ConfigError, DataError
from camoxpert.files import write_rows

if TYPE_CHECKING:
    from camoxpert.doctor import Examination, Finding
    from camoxpert.doctor.inspect import PairFacts

COPIES_SHOWN = 24
FILES_PRINTED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = "Exit code 3: training should not start with this data."
    parser.add_argument("data", nargs="*", help="data set folders or CSV files")
    parser.add_argument(
        "--dataset-path", nargs="+", default=[], metavar="DIR", help="the same, as train spells it"
    )
    parser.add_argument("-o", "--output", default="doctor", help="folder of the page [doctor]")
    parser.add_argument(
        "--clean-list", metavar="FILE", help="write what to leave out, for train and evaluate"
    )
    parser.add_argument("--layout", default="auto", help="name of a known layout [auto]")
    parser.add_argument(
        "--noncam", choices=("exclude", "include"), default="exclude", help="as for train"
    )
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, help="of the training that is planned [0.1]"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the training planned [42]")
    parser.add_argument(
        "--max-pixels", type=int, default=50_000_000, help="larger images are refused [50000000]"
    )
    parser.add_argument(
        "--no-copies",
        dest="copies",
        action="store_false",
        help="look for identical files only, not for copies by content",
    )
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        help="a CSV may name files outside its own folder, as for train",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Examine, print, write the page; the exit code says whether training should start."""
    no_overrides(rest)
    if not 0 <= options.val_fraction <= 0.5:
        raise ConfigError("--val-fraction must be between 0 and 0.5.")
    from camoxpert.console import bar
    from camoxpert.doctor import check_environment, examine_data, write_clean_list

    roots = [*options.data, *options.dataset_path]
    print("environment")
    findings = check_environment(options.device)
    findings.append(_dry_step(options.device))
    _print(findings)
    failed = any(finding.level == "error" for finding in findings)
    if not roots:
        if options.clean_list:
            raise ConfigError("--clean-list needs data to look at: camoxpert doctor DIR.")
        print("\nNo data set given: `camoxpert doctor DIR` looks at one.")
        return DataError.exit_code if failed else 0
    found = examine_data(
        roots,
        layout=options.layout,
        noncam=options.noncam,
        val_fraction=options.val_fraction,
        seed=options.seed,
        max_pixels=options.max_pixels,
        copies=options.copies,
        allow_outside=options.allow_outside,
        track=lambda items, total, description: bar(items, description=description, total=total),
    )
    print("\ndata")
    for line in found.layouts:
        print(f"  {line}")
    _print(found.findings)
    page = _write(Path(options.output), roots, findings, found, options.max_pixels)
    print(f"\npage        {page}")
    if options.clean_list:
        write_clean_list(Path(options.clean_list), found.clean_list)
        print(
            f"clean list  {options.clean_list}: {len(found.clean_list)} images to leave out "
            f"(train and evaluate take it with --clean-list)"
        )
    failed = failed or any(finding.level == "error" for finding in found.findings)
    print("verdict     " + ("training should not start" if failed else "ready to train"))
    return DataError.exit_code if failed else 0


def _dry_step(device: str) -> Finding:
    """Take one training step of a tiny model on the device that training would use."""
    import torch

    from camoxpert.config import load_config
    from camoxpert.doctor import Finding
    from camoxpert.models.camoxpert import build_model
    from camoxpert.runtime.device import check_architecture, choose_device, choose_precision
    from camoxpert.training.prepare import trial_step

    config = load_config(
        flags={"model.backbone": "tiny_test", "model.pretrained": False, "data.img_size": 64}
    )
    try:
        chosen = choose_device(device)
        check_architecture(chosen)
        precision = choose_precision(config.train, chosen)
        trial_step(build_model(config.model).to(chosen), config, chosen, precision, 2)
    except CamoXpertError as error:
        return Finding("error", "step", str(error))
    except (RuntimeError, torch.OutOfMemoryError) as error:
        words = " ".join(str(error).split())[:300]
        return Finding("error", "step", f"A training step of a tiny model fails here: {words}")
    return Finding("note", "step", f"A training step works on {chosen} ({precision.reason}).")


def _print(findings: list[Finding]) -> None:
    for finding in findings:
        print(f"  {finding.level:<8}{finding.check:<10}{finding.text}")
        if finding.level == "note":
            continue
        for file in finding.files[:FILES_PRINTED]:
            print(f"{'':20}{file}")
        if len(finding.files) > FILES_PRINTED:
            print(f"{'':20}... and {len(finding.files) - FILES_PRINTED} more")


def _write(
    folder: Path,
    roots: list[str],
    environment: list[Finding],
    found: Examination,
    max_pixels: int,
) -> Path:
    """Write the page, the findings and a table of all pairs."""
    from camoxpert.data.files.image_io import write_jpeg
    from camoxpert.doctor.inspect import SIZES, small_picture
    from camoxpert.pages.doctor import contact_sheet, write_page
    from camoxpert.runs.log import write_json

    findings = [
        {"level": f.level, "check": f.check, "text": f.text, "files": list(f.files)}
        for f in (*environment, *found.findings)
    ]
    parts: list[dict[str, Any]] = []
    for dataset, split in dict.fromkeys((f.pair.dataset, f.split) for f in found.facts):
        facts = [
            f for f in found.facts if (f.pair.dataset, f.split) == (dataset, split) and not f.faults
        ]
        if not facts:
            continue
        shown = [(f.thumb, f.thumb_mask) for f in facts]
        sheet = contact_sheet([(a, b) for a, b in shown if a is not None and b is not None])
        sizes = [f.size_class for f in facts if f.share > 0]
        groups = [f.pair.group for f in facts if f.pair.group]
        parts.append(
            {
                "title": f"{dataset} {split}",
                "pairs": len(facts),
                "sizes": {name: sizes.count(name) for _, name in SIZES},
                "classes": {name: groups.count(name) for name in dict.fromkeys(sorted(groups))},
                "sheet": sheet,
            }
        )
    copies = [
        {
            "caption": f"{a.pair.name} ({a.split}) and {b.pair.name} ({b.split}): {m.how}, "
            f"similarity {m.similarity:.2f}",
            "pictures": [
                small_picture(f.pair.image, max_pixels=max_pixels)
                for f in (a, b)
                if number < COPIES_SHOWN
            ],
        }
        for number, (m, a, b) in enumerate(found.matches)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts, start=1):
        write_jpeg(folder / f"contact_sheet_{number}.jpg", part["sheet"])
    write_json(folder / "findings.json", {"roots": [str(r) for r in roots], "findings": findings})
    write_rows(folder / "pairs.csv", [_row(facts) for facts in found.facts])
    summary = {"roots": roots, "layouts": found.layouts, "findings": findings}
    return write_page(folder / "doctor.html", summary | {"parts": parts, "copies": copies})


def _row(facts: PairFacts) -> dict[str, Any]:
    """Return a pair's line of the table."""
    pair = facts.pair
    return {
        "dataset": pair.dataset,
        "split": facts.split,
        "name": pair.name,
        "class": pair.group,
        "width": facts.size[1],
        "height": facts.size[0],
        "image": facts.image_format,
        "mask": facts.encoding,
        "object_share": f"{facts.share:.5f}",
        "objects": facts.objects,
        "faults": " ".join(facts.faults),
        "oddities": "; ".join(facts.oddities),
    }
