"""Run all checks (environment, a training step, the data); print and write the results."""

from __future__ import annotations

from pathlib import Path

from camoxpert import console
from camoxpert.config import DataConfig
from camoxpert.doctor.dataset import examine_data, write_clean_list
from camoxpert.doctor.environment import check_environment
from camoxpert.doctor.report import print_findings, write_report
from camoxpert.doctor.step import check_step


def diagnose(
    data: DataConfig, *, seed: int, copies: bool, device: str, output: Path, clean_list: str = ""
) -> bool:
    """Check everything and return whether training should start.

    Args:
        data: settings of the planned training; without roots only the environment is checked.
        seed: seed of the planned training.
        copies: look for copies by content, not only for identical files.
        device: device of the planned training.
        output: folder for the page and its files.
        clean_list: file for the images to leave out; empty: not written.

    Raises:
        Stopped: Ctrl-C, SIGTERM or the deadline.
    """
    console.say("environment")
    findings = [*check_environment(device), check_step(device)]
    print_findings(findings)
    sound = all(finding.level != "error" for finding in findings)
    if not data.roots:
        console.say("\nNo data set given. Use `camoxpert doctor DIR` to check one.")
        return sound
    found = examine_data(data, seed=seed, copies=copies)
    console.say("\ndata")
    for line in found.layouts:
        console.say(f"  {line}")
    print_findings(found.findings)
    page = write_report(output, data.roots, findings, found, data.max_pixels)
    console.say(f"\npage        {page}")
    if clean_list:
        write_clean_list(Path(clean_list), found.clean_list)
        console.say(
            f"clean list  {clean_list}: {len(found.clean_list)} images to leave out "
            f"(train and evaluate take it with --clean-list)"
        )
    sound = sound and all(finding.level != "error" for finding in found.findings)
    console.say("verdict     " + ("ready to train" if sound else "training should not start"))
    return sound
