"""fusedit report RUN: a run as one HTML page, with nothing outside it.

RUN is the output folder of a run in any state. The page is RUN/report.html, or --out FILE. With
--watch it is written again whenever the run has moved on, and an open page loads itself again,
until the run is done or Ctrl-C. Exit codes: 0 done, 2 a mistake the user can put right.
"""

import base64
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from ..trainer.errors import UsageError
from ..trainer.files import write_text
from ..trainer.report_pictures import Pictures
from ..trainer.run_report import PAGE, moved, read_run
from .train import DONE, MISTAKE

TEMPLATE = Path(__file__).with_suffix(".html")
LOOK_S = 1.0  # between two looks at the run
RELOAD_S = 5.0  # between two loadings of an open page
REST = 10  # times as long as a page took, before the next

Run = Annotated[Path, Positional, arg(metavar="RUN")]


@dataclass(frozen=True, slots=True)
class ReportFlags:
    """Writes a page that shows a run: its numbers, edits, settings and what went wrong."""

    run: Run  # output folder of a run, in any state
    out: Path | None = None  # the page; RUN/report.html where this is left out
    watch: bool = False  # write it again as the run moves on, until it is done


def main(argv: list[str]) -> int:
    """Writes the page and returns the exit code."""
    flags = tyro.cli(
        ReportFlags,
        prog="fusedit report",
        args=argv,
        use_underscores=True,
        config=(FlagCreatePairsOff,),
    )
    try:
        out = _out(flags)
        if flags.watch:
            watch(flags.run, out, lambda: print(f"{out}: watching; Ctrl-C ends it", flush=True))
        else:
            write(flags.run, out)
    except UsageError as error:
        print(f"fusedit: {error}", file=sys.stderr)
        return MISTAKE
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")
    return DONE


def _out(flags: ReportFlags) -> Path:
    out = flags.out or flags.run / PAGE
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give a file, for instance {out / PAGE}")
    return out


def write(
    run: Path, out: Path, reload_s: float = 0.0, pictures: Pictures | None = None
) -> dict[str, Any]:
    """Writes the page whole, or leaves the one before; returns what it tells."""
    told = read_run(run, pictures)
    write_text(out, page(told, reload_s))
    return told


def page(told: dict[str, Any], reload_s: float = 0.0) -> str:
    """The HTML of what `read_run` gives.

    Args:
        reload_s: seconds until it loads itself again; 0: never.
    """
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)[0]
    # The one script that the page's policy lets run.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # What is not finite, as a setting may be, as text: JSON has no such number.
    finite = json.loads(json.dumps({**told, "reload_s": reload_s}), parse_constant=str)
    data = json.dumps(finite, separators=(",", ":"))
    parts = {
        "script_hash": f"sha256-{digest}",
        "title": escape(told["name"]),
        "data": data.replace("<", "\\u003c"),  # no text of the run can end the script element
    }
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], template)


def watch(run: Path, out: Path, began: Callable[[], None], reload_s: float = RELOAD_S) -> None:
    """Writes the page now and whenever the run has moved on, until it is done or interrupted.

    Args:
        began: called when the first page is there.
    """
    pictures = Pictures()
    seen, told = moved(run), write(run, out, reload_s, pictures)
    began()
    try:
        while told["state"]["word"] != "finished":
            time.sleep(LOOK_S)
            now = moved(run)
            if now != seen:
                since = time.monotonic()
                seen, told = now, write(run, out, reload_s, pictures)
                time.sleep(REST * (time.monotonic() - since))
    except KeyboardInterrupt:
        pass
    write(run, out, pictures=pictures)  # which stays as it is


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
