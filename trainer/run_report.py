"""What a run's folder tells of it, as one JSON value: what the page of `fusedit report` shows.

Read are run.toml, history.jsonl, log.jsonl and its parts, validation/, best.json, audit.jsonl and
quarantine.jsonl. Any of them may be missing, or end in half a line: the run may not have come to
it, may be at it now, or may have been killed.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import report_charts
from .checkpoint import BEST_FILE
from .config import RunConfig
from .errors import UsageError
from .log import AUDIT_FILE, HISTORY_FILE, LOG_FILE, PICTURES, QUARANTINE, read_lines
from .output_lock import is_held
from .report_pictures import Pictures
from .series import is_number
from .settings import RUN_FILE, flat, from_toml

PAGE = "report.html"
RECENT = 20  # lines of the log that speed and time left go by
MOST_LINES = 200  # of events, of skipped steps and of skipped samples; the newest
MOST_ROWS = 12  # of a step's samples, by name


def read_run(folder: Path, pictures: Pictures | None = None) -> dict[str, Any]:
    """All that the page shows.

    Args:
        pictures: knows those of an earlier reading.

    Raises: UsageError: there is no such folder, or it is of something else.
    """
    _check(folder)
    history = _lines(folder / HISTORY_FILE)
    log = _lines(folder / LOG_FILE)
    numbers = [line for line in log if "event" not in line]
    settings, complaint = _settings(folder)
    started = next((line for line in reversed(history) if line.get("what") == "started"), {})
    since = started.get("time", 0.0)
    versions = started.get("versions")
    state = _state(folder, history, numbers, settings, started)
    spent = report_charts.time_by_phase(numbers, history)
    charts, curves = report_charts.charts(numbers), report_charts.curves(numbers)
    best = _best(folder)
    skipped = _quarantine(folder / QUARANTINE)
    audit = _lines(folder / AUDIT_FILE)
    return {
        "name": folder.resolve().name,
        "made": round(time.time()),
        "state": state,
        "headline": _headline(
            state, numbers, since, charts, best, _seconds(spent, numbers), len(skipped), audit
        ),
        "charts": charts,
        "curves": curves,
        "best": best,
        "time": spent,
        "marks": sorted({int(line["step"]) for line in history if line.get("what") == "started"}),
        "edits": (pictures or Pictures()).read(folder / PICTURES),
        "settings": settings,
        "complaint": complaint,
        "command": str(started.get("command", "")),
        "versions": versions if isinstance(versions, dict) else {},
        "machine": {
            name: started[name]
            for name in ("device", "ranks", "global_batch", "rows")
            if name in started
        },
        "history": [_entry(line, _told(line)) for line in history[-MOST_LINES:]],
        "events": _events(log),
        "audit": [_audited(line) for line in audit[-MOST_LINES:]],
        "audit_count": len(audit),
        "skipped": skipped[-MOST_LINES:],
        "skipped_count": len(skipped),
    }


def moved(folder: Path) -> object:
    """Something that is another once there is something else to tell."""
    names = (RUN_FILE, HISTORY_FILE, LOG_FILE, BEST_FILE, AUDIT_FILE, QUARANTINE, PICTURES)
    found = []
    for name in names:
        with suppress(OSError):
            about = (folder / name).stat()
            found.append((name, about.st_mtime_ns, about.st_size))
    return found, is_held(folder)


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: there is no such folder; give the --output_dir of `fusedit train`"
        )
    files = {path.name for path in folder.iterdir() if path.name[0] != "."} - {PAGE}
    if files and not files & {RUN_FILE, LOG_FILE, HISTORY_FILE}:
        raise UsageError(
            f"{folder} holds no run: there is no {RUN_FILE} and no {LOG_FILE}; give the "
            "--output_dir of `fusedit train`"
        )


def _lines(path: Path) -> list[dict[str, Any]]:
    """Those that are whole and tell a step and, if any, a time."""
    return [
        line
        for line in read_lines(path)
        if is_number(line["step"]) and is_number(line.get("time", 0.0))
    ]


def _settings(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Each setting with its default; what is wrong with the file, if it cannot be read."""
    if not (folder / RUN_FILE).exists():
        return [], ""
    try:
        config = from_toml(folder / RUN_FILE, flag="")
    except UsageError as error:
        return [], str(error)
    defaults = flat(RunConfig())
    return [
        {
            "name": path,
            "value": value,
            "default": defaults[path],
            "differs": value != defaults[path],
        }
        for path, value in flat(config).items()
    ], ""


# The state and the headline.


def _state(
    folder: Path,
    history: Sequence[Mapping[str, Any]],
    numbers: Sequence[Mapping[str, Any]],
    settings: Sequence[Mapping[str, Any]],
    started: Mapping[str, Any],
) -> dict[str, Any]:
    last = history[-1].get("what") if history else None
    step = max((int(line["step"]) for line in (*numbers, *history)), default=0)
    asked = next((one["value"] for one in settings if one["name"] == "loop.max_train_steps"), None)
    total = started.get("total_steps", asked)
    total = total if is_number(total) else None
    detail = ""
    if is_held(folder):
        word = "running"
    elif last == "done" or (not history and total is not None and step >= total):
        word = "finished"
    elif not history and not numbers:
        word, detail = "not begun", "nothing has been trained here yet"
    else:
        word = "stopped"
        ended = "as it was asked to" if last == "stopped" else "without a word: killed, or failed"
        detail = f"it ended {ended}; the same command goes on"
    return {"word": word, "detail": detail, "step": step, "total": total}


def _headline(
    state: Mapping[str, Any],
    numbers: Sequence[Mapping[str, Any]],
    since: float,
    charts: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any] | None,
    spent: float,
    skipped: int,
    audit: Sequence[Mapping[str, Any]],
) -> list[dict[str, str]]:
    """What is read first: each a label, a value and a remark.

    Args:
        since: when the run was last started.
    """
    steps = [line for line in numbers if is_number(line.get("images_per_second"))]
    told = []
    if steps:
        told.append(_fact("images a second", f"{steps[-1]['images_per_second']:.4g}", "the latest"))
        timed = [line for line in steps[-RECENT:] if line.get("time", 0.0) >= since]
        left = _seconds_left(state, timed)
        if left is not None:
            at = time.strftime("%a %H:%M", time.localtime(time.time() + left))
            told.append(_fact("time left", in_words(left), f"ends about {at}"))
        else:
            told.append(_fact("time", in_words(spent), "spent on training"))
    trends = {one["name"]: one for chart in charts for one in chart["series"]}
    for name, label in (("loss", "loss"), ("held_out/full", "held-out loss")):
        if name in trends and trends[name]["values"]:
            values = trends[name]["values"]
            told.append(_fact(label, f"{values[-1]:.4g}", f"lowest {min(values):.4g}"))
    if best is not None:
        told.append(_fact("best", f"step {best['step']}", f"{best['value']:.4g}, {best['by']}"))
    if steps and is_number(steps[-1].get("memory_gib")):
        told.append(_fact("memory", f"{steps[-1]['memory_gib']:.3g} GiB", "peak, rank 0"))
    if skipped:
        told.append(_fact("skipped samples", str(skipped), "rows that could not be read"))
    if audit:
        moved = sum(line.get("applied") is False for line in audit)
        told.append(_fact("unusual steps", str(len(audit)), f"{moved} moved nothing"))
    return told


def _seconds(spent: Mapping[str, Any] | None, numbers: Sequence[Mapping[str, Any]]) -> float:
    """That the run has worked; by the clock, lying still and all, where the log does not say."""
    if spent is not None:
        return sum(phase["seconds"] for phase in spent["phases"])
    times = [line["time"] for line in numbers if "time" in line]
    return max(times) - min(times) if times else 0.0


def _seconds_left(state: Mapping[str, Any], timed: Sequence[Mapping[str, Any]]) -> float | None:
    """By the last lines, pauses for validation and checkpoints among them."""
    if state["word"] != "running" or state["total"] is None or len(timed) < 2:
        return None
    steps = timed[-1]["step"] - timed[0]["step"]
    seconds = timed[-1]["time"] - timed[0]["time"]
    return seconds / steps * (state["total"] - timed[-1]["step"]) if steps > 0 else None


def _fact(label: str, value: str, remark: str) -> dict[str, str]:
    return {"label": label, "value": value, "remark": remark}


def in_words(seconds: float) -> str:
    """As 2 d 4 h, 3 h 12 min, 5 min 9 s or 40 s."""
    left = max(round(seconds), 0)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for index, (unit, size) in enumerate(units):
        if left >= size and unit != "s":
            lower, of = units[index + 1]
            return f"{left // size} {unit} {left % size // of} {lower}"
    return f"{left} s"


# What was unusual.


def _best(folder: Path) -> dict[str, Any] | None:
    try:
        told = json.loads((folder / BEST_FILE).read_text(encoding="utf-8"))
        step = int(told["step"])
        return {"step": step, "by": str(told["by"]), "value": float(told["values"][str(step)])}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _quarantine(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            told = json.loads(line)
            rows.append({name: str(told[name]) for name in ("row", "file", "reason")})
        except (ValueError, LookupError, TypeError):
            continue  # torn by a kill
    return rows


def _events(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = [_entry(line, str(line.get("told", ""))) for line in log if "event" in line]
    return found[-MOST_LINES:]


def _entry(line: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {"step": int(line["step"]), "time": line.get("time"), "text": text}


def _told(line: Mapping[str, Any]) -> str:
    """Of a start: where it was, too."""
    ranks, device = line.get("ranks"), line.get("device")
    where = f" on {ranks} x {device}" if is_number(ranks) and device else ""
    return f"{line.get('what')}{where}"


def _audited(line: Mapping[str, Any]) -> dict[str, Any]:
    rows = line.get("rows")
    rows = rows if isinstance(rows, list) else []
    more = f" and {len(rows) - MOST_ROWS} more" if len(rows) > MOST_ROWS else ""
    return {
        "step": int(line["step"]),
        "text": str(line.get("what", "")),
        "moved": line.get("applied") is not False,
        "loss": str(line.get("loss", "")),
        "rows": ", ".join(map(str, rows[:MOST_ROWS])) + more,
    }
