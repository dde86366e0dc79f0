"""fusedit check-data [--report FOLDER] FLAGS: what is wrong with a dataset, before training.

FLAGS are those of fusedit train; nothing is trained and no weights are read. With
--pretrained_model_name_or_path instructions are counted in its tokens; --dataloader_num_workers
read the images. Writes FOLDER/report.json and report.html (default: check-data).

Exit codes: 0 clean, 1 something was found that would stop or spoil training, 2 a mistake in the
flags.
"""

import argparse
import json
import sys
from pathlib import Path

from ..trainer.check_data import KINDS, Survey, survey
from ..trainer.config import RunConfig
from ..trainer.data_report import page
from ..trainer.errors import UsageError
from ..trainer.files import write_text
from ..trainer.pretrained import describe
from .flags import parse
from .train import DONE, MISTAKE, quiet_libraries

FOUND = 1


def main(argv: list[str]) -> int:
    """Reads all pairs, prints and writes what was found; returns the exit code."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--report", type=Path, default=Path("check-data"))
    asked, flags = own.parse_known_args(argv)
    if {"-h", "--help"} & {*flags}:
        print(__doc__)  # then those of FLAGS
    try:
        config = parse(flags).run
        check(config)
        quiet_libraries()
        named = config.model.pretrained_model_name_or_path is not None
        tokenizers = describe(config.model).tokenizers if named else []
        if asked.report.exists() and not asked.report.is_dir():
            raise UsageError(f"--report {asked.report} is a file; give a folder")
        rows, count, found = survey(config, tokenizers)
        source = str(config.data.dataset_name or config.data.train_data_dir)
        report = found.report(source, count)
        write_text(asked.report / "report.json", json.dumps(report, indent=1))
        write_text(asked.report / "report.html", page(report, found, rows))
    except UsageError as error:
        print(f"fusedit: {error}", file=sys.stderr)
        return MISTAKE
    print("\n".join(lines(found, count, named, asked.report)))
    return DONE if found.clean else FOUND


def check(config: RunConfig) -> None:
    """Raises UsageError as `fusedit train`; but no base model is needed."""
    if config.data.dataset_name is None and config.data.train_data_dir is None:
        raise UsageError(
            "--dataset_name or --train_data_dir is missing: a name on the hub or a local folder"
        )
    config.check_together()


def lines(found: Survey, rows: int, counted: bool, folder: Path) -> list[str]:
    """All of it in words."""
    told = [f"{rows} rows, {found.pairs} pairs, {len(found.sizes)} sizes of originals"]
    for kind, (does, means) in KINDS.items():
        count = len(found.found[kind])
        first = f", first {found.found[kind][0].name}" if count else ""
        told.append(f"  {kind:<11}{count:8}  {means} ({does}){first}")
    if not counted:
        told.append("  the lengths of instructions were not checked: no base model was given")
    return [*told, f"{'clean' if found.clean else 'NOT clean'}: {folder / 'report.html'}"]
