"""Disks as the run would use them: reading its data, writing a checkpoint, and a run folder that all machines see."""

from __future__ import annotations

import mmap
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from launch.doctor.situation import Situation
from launch.doctor.verdicts import TRANSFER, Finding, Judgement, Reading, Skip, Values, Verdict, find_slow, span
from trainer.checkpoint.folder import location
from trainer.checkpoint.requests import Span
from trainer.checkpoint.storage import open_storage
from trainer.config import Config
from trainer.errors import one_line_text
from trainer.units import format_bytes

NO_CONFIG = "no config was given"
_LISTED, _SAMPLED = 5000, 200  # files of a folder that are looked at, and read
_READ_BYTES, _READ_SECONDS = 256 << 20, 3.0  # at most, for each place
_PIECE = 4 << 20
_SLOW_READ = 20e6  # bytes per second
_CHECKPOINT_BYTES = 32 << 20
_SLOW_WRITE = 20e6
_LOW_SPACE, _NO_SPACE = 10 << 30, 256 << 20  # bytes
_SEEN_SECONDS = 5.0  # in which a file appears elsewhere: file systems keep listings for a while
_NEEDED = {"image_folder": ("root",), "torch_file": ("path",)}  # what built-in data sets do not make themselves


# ---- data ---------------------------------------------------------------------------------------------------------


def data_places(config: Config) -> dict[str, tuple[str, bool]]:
    """Returns, by config path, the files and folders that data sets are built from, and whether they must be there."""
    found: dict[str, tuple[str, bool]] = {}
    for split, component in (("train", config.data.train), ("eval", config.data.eval)):
        if component is not None:
            needed = _NEEDED.get(component.name, ())
            for path, text in _texts(component.args, f"data.{split}.args"):
                name = path.split(".")[3]
                if name in needed or ((os.sep in text or name in ("root", "path")) and "://" not in text):
                    found[path] = (text, name in needed)
    if config.data.cache is not None:
        found["data.cache.path"] = (config.data.cache.path, False)
    return found


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{path}.{i}")


def measure_reading(situation: Situation) -> Values:
    """Returns how fast a sample of the data comes from where it is, past the cache of this machine."""
    if situation.config is None:
        raise Skip(NO_CONFIG)
    places = data_places(situation.config)
    if not places:
        raise Skip("the config names no data folder")
    read: dict[str, Values] = {}
    by_file: dict[str, Values] = {}
    for path, (text, is_needed) in places.items():
        situation.now(f"reading {text}")
        if text not in by_file:
            by_file[text] = read_sample(Path(text).expanduser(), situation.patience / 4)
        read[path] = {"place": text, "needed": is_needed, **by_file[text]}
    return {"places": read}


def read_sample(place: Path, most_seconds: float = _READ_SECONDS) -> Values:
    """Reads a sample of a folder, or the beginning of a file."""
    if not place.exists():
        return {"exists": False}
    try:
        files = sample_of(place)
        read = cached = asked = num_files = 0
        buffer = bytearray(_PIECE)
        began = time.perf_counter()
        spent = 0.0
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                in_cache = first_page_is_cached(descriptor)
                asked, cached = asked + (in_cache is not None), cached + bool(in_cache)
                start = time.perf_counter()
                while read < _READ_BYTES and (count := os.readv(descriptor, [buffer])):
                    read += count
                    if time.perf_counter() - began > min(_READ_SECONDS, most_seconds):
                        break
                spent += time.perf_counter() - start
            finally:
                os.close(descriptor)
            num_files += 1
            if read >= _READ_BYTES or time.perf_counter() - began > min(_READ_SECONDS, most_seconds):
                break
    except OSError as error:
        return {"exists": True, "error": one_line_text(error)}
    return {
        "exists": True,
        "files": num_files,
        "bytes": read,
        "seconds": spent,
        "bytes_per_s": read / spent if read and spent else None,
        # None: this file system does not tell.
        "cached_share": round(cached / asked, 3) if asked else None,
    }


def sample_of(place: Path) -> list[Path]:
    """Returns a file, or files from all over a folder."""
    if place.is_file():
        return [place]
    walk = (Path(folder, name) for folder, _, names in os.walk(place) for name in sorted(names))
    files = list(islice(walk, _LISTED))
    return files[:: max(1, len(files) // _SAMPLED)]


def first_page_is_cached(descriptor: int) -> bool | None:
    """Tells whether a file's first page is in memory; None where that cannot be asked."""
    with suppress(OSError, AttributeError):
        try:
            return os.preadv(descriptor, [bytearray(mmap.PAGESIZE)], 0, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False
    return None


def judge_reading(readings: Sequence[Reading]) -> Judgement:
    """Wants the data to be there, on every machine and about as fast."""
    findings: list[Finding] = []
    summaries = []
    for path in readings[0].values["places"]:
        here = [(r.place, r.values["places"][path]) for r in readings]
        text = here[0][1]["place"]
        seen = [place for place, values in here if values["exists"]]
        for place, values in here:
            if not values["exists"] and (seen or values["needed"]):
                message = f"{place.host}: {path}: there is no '{text}'" + (
                    f", and {seen[0].host} has it" if seen else ""
                )
                findings.append(Finding(Verdict.FAIL, message, "mount it, or copy it there"))
            elif "error" in values:
                message = f"{place.host}: {path}: {values['error']}"
                findings.append(Finding(Verdict.FAIL, message, "see who may read it"))
        rates = {place: v["bytes_per_s"] for place, v in here if v.get("bytes_per_s")}
        slow = find_slow(rates, TRANSFER)
        for place, found in slow.items():
            message = f"{place.host}: {path}: {_speed(found.rate)}, {found.percent}% less than elsewhere"
            findings.append(Finding(Verdict.WARN, message, "see its mount, and what else reads there"))
        for place, rate in rates.items():
            if rate < _SLOW_READ and place not in slow:
                message = f"{place.host}: {path}: {_speed(rate)}"
                findings.append(
                    Finding(Verdict.WARN, message, "the feed will wait for it; data.cache packs small files")
                )
        if not seen:
            summaries.append(f"'{text}' is not there yet")
        elif rates:
            cached = max((v.get("cached_share") or 0.0) for _, v in here)
            note = f" ({100 * cached:.0f}% still in the cache)" if cached else ""
            summaries.append(f"{span(list(rates.values()), _speed)} from '{text}'{note}")
        else:
            summaries.append(f"'{text}' is empty")
    return Judgement("; ".join(dict.fromkeys(summaries)), tuple(findings))


# ---- checkpoints --------------------------------------------------------------------------------------------------


def measure_writing(situation: Situation) -> Values:
    """Writes, syncs and renames something like a checkpoint where checkpoints go, reads it back and removes it."""
    if situation.config is None:
        raise Skip(NO_CONFIG)
    folder = location(situation.config)
    values: Values = {"location": folder, "bytes": _CHECKPOINT_BYTES, "free": None}
    try:
        if "://" not in folder:
            folder = str(Path(folder).expanduser())
            situation.make_folder(Path(folder))
            values["free"] = shutil.disk_usage(folder).free
        values.update(try_writing(f"{folder}/.doctor-{uuid.uuid4().hex[:12]}"))
    except OSError as error:
        values["error"] = error.strerror or one_line_text(error)
    return values


def try_writing(root: str, num_bytes: int = _CHECKPOINT_BYTES) -> Values:
    """Writes a file and publishes its folder below `root`, which is gone afterwards, and returns how long that took.

    Raises:
        OSError: one of it is not possible.
    """
    storage = open_storage(root)
    data = os.urandom(1 << 20) * (num_bytes >> 20)
    staged = None
    try:
        began = time.perf_counter()
        staged = storage.begin("trial")
        storage.write(staged, "data", [memoryview(data)])
        written = time.perf_counter()
        storage.publish(staged, "trial", b"{}")
        published = time.perf_counter()
        size = 1 << 20
        if b"".join(storage.read("trial", [Span("data", num_bytes - size, size)])) != data[-size:]:
            raise OSError(f"'{root}' does not give back what was written")
        storage.remove("trial")
        staged = None
    finally:
        with suppress(OSError):
            if staged is not None:
                storage.remove(staged)
        if "://" not in root:
            shutil.rmtree(root, ignore_errors=True)
    return {
        "write_seconds": written - began,
        "publish_seconds": published - written,
        "bytes_per_s": num_bytes / (published - began),
    }


def judge_writing(readings: Sequence[Reading]) -> Judgement:
    """Wants checkpoints to be possible on every machine, with room for several, and about as fast."""
    findings = []
    for reading in readings:
        values, host = reading.values, reading.place.host
        if "error" in values:
            message = f"{host}: no checkpoint can be written to '{values['location']}': {values['error']}"
            findings.append(
                Finding(Verdict.FAIL, message, "run.dir or checkpoint.dir says where; see who may write there")
            )
        if values["free"] is not None and values["free"] < _LOW_SPACE:
            verdict = Verdict.FAIL if values["free"] < _NO_SPACE else Verdict.WARN
            message = f"{host}: {format_bytes(values['free'])} free in '{values['location']}'"
            findings.append(Finding(verdict, message, "make room, or keep fewer checkpoints (checkpoint.keep)"))
    rates = {r.place: r.values["bytes_per_s"] for r in readings if "bytes_per_s" in r.values}
    slow = find_slow(rates, TRANSFER)
    for place, rate in rates.items():
        if place in slow or rate < _SLOW_WRITE:
            less = f", {slow[place].percent}% less than elsewhere" if place in slow else ""
            message = f"{place.host}: a checkpoint is written at {_speed(rate)}{less}"
            findings.append(Finding(Verdict.WARN, message, "a faster file system, or checkpoint.every less often"))
    if not rates:
        return Judgement("", tuple(findings))
    publish = max(r.values.get("publish_seconds", 0.0) for r in readings)
    text = (
        f"{span(list(rates.values()), _speed)} to '{readings[0].values['location']}', {1e3 * publish:.0f} ms to publish"
    )
    return Judgement(text, tuple(findings))


# ---- the run folder -----------------------------------------------------------------------------------------------


def measure_sharing(situation: Situation) -> Values:
    """Leaves a file in the run folder, and looks for those of the other machines."""
    if situation.config is None:
        raise Skip(NO_CONFIG)
    folder, meeting, me = situation.config.run_dir, situation.meeting, situation.place
    name = meeting.from_main("sharing/name", uuid.uuid4().hex[:12])
    files = {place.rank: folder / f".doctor-{name}-{place.node}" for place in situation.hosts}
    values: Values = {"folder": str(folder), "unseen": []}
    if me.is_first:
        try:
            situation.make_folder(folder)
            files[me.rank].write_text(me.host)
        except OSError as error:
            values["error"] = error.strerror or one_line_text(error)
    wrote = meeting.collect("sharing/wrote", "error" not in values)
    if me.is_first and "error" not in values:
        values["unseen"] = _unseen({p.host: files[p.rank] for p in situation.hosts if wrote.get(p.rank)})
    meeting.gather("sharing/looked")
    if me.is_first:
        with suppress(OSError):
            files[me.rank].unlink()
        return values
    raise Skip("the first rank of each machine looks")


def _unseen(files: dict[str, Path]) -> list[str]:
    """Returns the names whose files do not appear here in a while."""
    end = time.monotonic() + _SEEN_SECONDS
    while left := [name for name, file in files.items() if not file.exists()]:
        if time.monotonic() > end:
            return left
        with suppress(OSError):
            os.listdir(next(iter(files.values())).parent)  # which has NFS look again
        time.sleep(0.1)
    return []


def judge_sharing(readings: Sequence[Reading]) -> Judgement:
    """Wants one run folder, which all machines can write to."""
    findings = []
    for reading in readings:
        values, host = reading.values, reading.place.host
        if "error" in values:
            message = f"{host}: the run folder '{values['folder']}' cannot be written to: {values['error']}"
            findings.append(Finding(Verdict.FAIL, message, "run.dir says where it is"))
        elif values["unseen"]:
            message = f"{host}: does not see what {', '.join(values['unseen'][:3])} left in '{values['folder']}'"
            findings.append(Finding(Verdict.FAIL, message, "run.dir must be on a file system that all machines share"))
    where = f"'{readings[0].values['folder']}'"
    return Judgement(
        f"{where} is the same on {len(readings)} machines" if len(readings) > 1 else f"{where} can be written to",
        tuple(findings),
    )


def _speed(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:.0f} MB/s" if bytes_per_s >= 1e7 else f"{bytes_per_s / 1e6:.2f} MB/s"
