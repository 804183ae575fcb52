"""A run folder with every file that a run may leave behind, made up: four ranks, a killed attempt, a slow rank."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_digits

START = 1_790_000_000.0
NUM_RANKS = 4
SPLIT = {
    "data_wait": 0.21,
    "h2d": 0.02,
    "forward": 0.22,
    "backward": 0.37,
    "communication": 0.08,
    "optimizer": 0.03,
    "checkpoint": 0.01,
    "evaluation": 0.02,
    "host": 0.04,
}
ADVICE = [
    {
        "rule": "data_wait",
        "text": "The devices waited 21% of the time for data. 4 workers deliver 1,900 images/s, the model can take "
        "2,750.",
        "settings": {"data.workers": 6},
        "gain": 0.26,
    },
    {
        "rule": "memory_unused",
        "text": "13.1 of 40 GiB were never used (`python -m launch plan` says what fits): a "
        "larger micro-batch needs fewer, larger kernels.",
        "settings": {"train.micro_batch_size": 128, "memory.checkpointing": "none"},
        "gain": None,
    },
]


def make_run(folder: Path, name: str = "photos", steps: int = 2400, every: int = 10, **changes: Any) -> Path:
    """Writes a run folder and returns it.

    Args:
        folder: to make.
        name: of the run.
        steps: of the run.
        every: steps between reports.
        changes: `lr`, `speed` (samples per second), `ranks`, `notes`, `classes`, `seed`.
    """
    folder.mkdir(parents=True)
    draw = random.Random(changes.get("seed", 0))
    num_ranks = changes.get("ranks", NUM_RANKS)
    lr, speed = changes.get("lr", 0.1), changes.get("speed", 2150.0)
    config = {
        "run": {"name": name, "dir": str(folder)},
        "model": {"name": "resnet50"},
        "optim": {"name": "sgd", "lr": lr, "args": {"momentum": 0.9}},
        "train": {"steps": steps, "batch_size": 256},
        "tracking": {"wandb": {"notes": changes.get("notes", "The baseline, with the data on the slow disk.")}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    _write(folder / "environment.json", _environment(num_ranks))
    now, best, best_step = START + 41, 0.0, 0
    with open(folder / "metrics.jsonl", "w") as metrics, open(folder / "ranks.jsonl", "w") as ranks:
        for step in range(every, steps + 1, every):
            done = step / steps
            now += every * 256 / speed
            position = {"step": step, "epoch": step / 390, "samples": step * 256}
            record = _report(draw, step, steps, lr, speed, num_ranks)
            metrics.write(json.dumps({**position, **record, "time": now}) + "\n")
            if num_ranks > 1:
                ranks.write(json.dumps({"step": step, "time": now, **_ranks(draw, num_ranks)}) + "\n")
            if step % (steps // 10 // every * every or every) == 0:
                accuracy = 0.93 * (1 - math.exp(-4 * done)) + draw.gauss(0, 0.006)
                loss = 2.3 * math.exp(-2.4 * done) + 0.28 + draw.gauss(0, 0.02)
                evaluation = {"eval/loss": loss, "eval/accuracy": accuracy}
                now += 9
                metrics.write(json.dumps({**position, **evaluation, "time": now}) + "\n")
                if accuracy > best:
                    best, best_step = accuracy, step
    took = now - START
    _write(
        folder / "summary.json",
        _summary(steps, num_ranks, {"step": best_step, "metric": "accuracy", "value": best}, speed, took),
    )
    _write(folder / "attempts.json", _attempts(steps, num_ranks, took))
    _make_faults(folder)
    _make_evaluation(folder / "eval" / f"step-{steps:08d}", draw, changes.get("classes"))
    for path in ("checkpoints/step-00001200", f"checkpoints/step-{steps:08d}", "checkpoints/best", "profile", "logs"):
        (folder / path).mkdir(parents=True)
    for rank in range(num_ranks):
        (folder / "logs" / f"rank-{rank}.log").touch()
        (folder / "profile" / f"rank-{rank}.trace.json.gz").touch()
    return folder


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def _environment(num_ranks: int) -> dict[str, Any]:
    return {
        "command": ["train.py", "--config", "photos.yaml", "run.name=with spaces"],
        "host": "node-a",
        "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
        "python": "3.11.9",
        "versions": {"torch": "2.11.0", "accelerate": "1.15.0", "wandb": None},
        "device": "NVIDIA A100-SXM4-40GB",
        "num_processes": num_ranks,
        "git_commit": "07c4a1f4fd0f8d4a3c0ad6ed2a4b6f1cf4b9f1e2",
    }


def _report(
    draw: random.Random, step: int, steps: int, lr: float, speed: float, num_ranks: int
) -> dict[str, float | None]:
    done = step / steps
    warm = min(step / (0.05 * steps), 1)
    rate = lr * warm * 0.5 * (1 + math.cos(math.pi * done))
    loss = 2.3 * math.exp(-3 * done) + 0.12 + draw.gauss(0, 0.05)
    norm = 40.0 if 0.612 < done <= 0.618 else 1.4 * math.exp(-done) + abs(draw.gauss(0, 0.2))
    is_bad = 0.618 < done < 0.634
    waits = SPLIT["data_wait"] * (1.6 if 0.3 < done < 0.45 else 0.85) * draw.uniform(0.85, 1.15)
    split = {**SPLIT, "data_wait": waits}
    split = {part: share * draw.uniform(0.9, 1.1) for part, share in split.items()}
    total = sum(split.values())
    now = speed * (1 - waits) / (1 - SPLIT["data_wait"]) * draw.uniform(0.97, 1.03)
    return {
        "train/loss": None if is_bad else loss + (2.0 if 0.612 < done <= 0.618 else 0),
        "train/lr": rate,
        "train/grad_norm": None if is_bad else norm,
        "train/samples_per_second": now,
        "train/samples_per_second_per_device": now / num_ranks,
        "train/mfu": 0.34 * now / speed,
        **({"train/straggler_wait": 0.06 + draw.gauss(0, 0.01)} if num_ranks > 1 else {}),
        "goodput": 0.5 + 0.3 * min(done * 3, 1),
        **{f"time/{part}": share / total for part, share in split.items()},
        "memory/allocated_gib": 17.2 + draw.gauss(0, 0.1),
        "memory/reserved_gib": 24.5 + (1.5 if done > 0.4 else 0),
        "memory/peak_gib": 23.8 + (1.4 if done > 0.4 else 0),
        "memory/workers_gib": 3.1 + 1.2 * done,
        **{
            f"system/{node}/{key}": value
            for node in range(2)
            for key, value in {
                "cpu_percent": 55 + 8 * node + draw.gauss(0, 4),
                "memory_percent": 31 + 4 * node + 3 * done,
                "gpu0_percent": 78 + draw.gauss(0, 3),
                "gpu1_percent": 76 + draw.gauss(0, 3),
                "gpu0_power_w": 312 + draw.gauss(0, 8),
                "gpu1_power_w": 304 + draw.gauss(0, 8),
                "sent_mib_per_second": 940 + draw.gauss(0, 30),
            }.items()
        },
    }


def _ranks(draw: random.Random, num_ranks: int) -> dict[str, Any]:
    slow = num_ranks - 2
    seconds = [0.083 * (1.17 if rank == slow else 1) * draw.uniform(0.98, 1.03) for rank in range(num_ranks)]
    return {
        "seconds_to_exchange": seconds,
        "communication": [(0.02 if rank == slow else 0.1) * draw.uniform(0.9, 1.1) for rank in range(num_ranks)],
        "data_wait": [0.2 * draw.uniform(0.9, 1.1) for _ in range(num_ranks)],
        "peak_gib": [25.2 - 0.3 * (rank % 3) for rank in range(num_ranks)],
        "hosts": [f"node-{'ab'[rank * 2 // num_ranks]}" for rank in range(num_ranks)],
    }


def _summary(steps: int, num_ranks: int, best: dict[str, Any], speed: float, took: float) -> dict[str, Any]:
    parts = {"train": 0.71, "data_wait": 0.17, "startup": 0.04, "evaluation": 0.03, "checkpoint": 0.01}
    parts |= {"lost": 0.025, "restarts": 0.015}
    return {
        "status": "finished",
        "error": None,
        "step": steps,
        "total_steps": steps,
        "epoch": steps / 390,
        "samples": steps * 256,
        "metrics": {"eval/loss": 0.481, "eval/accuracy": 0.9144},
        "best": best,
        "skipped_steps": 0,
        "bad_steps": 2,
        "num_rollbacks": 1,
        "avoided_steps": [1484],
        "samples_per_second": speed * 0.94,
        "mfu": 0.331,
        "goodput": 0.71,
        "goodput_seconds": {part: share * took for part, share in parts.items()},
        "num_attempts": 3,
        "peak_memory_bytes": int(25.2 * 2**30),
        "num_processes": num_ranks,
        "time_split": SPLIT,
        "advice": ADVICE,
    }


def _attempts(steps: int, num_ranks: int, took: float) -> list[dict[str, Any]]:
    third = steps // 3

    def attempt(number: int, status: str, span: tuple[float, float], first: int, last: int) -> dict[str, Any]:
        began, ended = (START + share * took for share in span)
        life = ended - began
        shares = {"train": 0.72, "data_wait": 0.17, "lost": 0.04 if status == "killed" else 0.0}
        shares |= {"evaluation": 0.03, "checkpoint": 0.01}
        seconds = {"startup": 25.0, **{part: share * life for part, share in shares.items()}}
        return {
            "number": number,
            "started": began,
            "last_seen": ended,
            "status": status,
            "num_processes": num_ranks,
            "first_step": first,
            "step": last,
            "counted_step": last,
            "saved_step": last // 100 * 100,
            "seconds": seconds,
            "passed": [],
        }

    return [
        attempt(1, "killed", (0, 0.33), 0, third),
        attempt(2, "failed", (0.37, 0.66), third - 30, 2 * third),
        attempt(3, "finished", (0.68, 1), 2 * third - 40, steps),
    ]


def _make_faults(folder: Path) -> None:
    fault: dict[str, Any] = {"rank": 2, "kind": "lost", "message": "its process is gone (signal 9)", "step": 1600}
    fault |= {"place": "backward", "samples": [], "host": "node-b", "pid": 4242, "restart": True, "time": START}
    _write(folder / "faults" / "attempt-002" / "first.json", fault)
    bad = [
        {"step": 1484, "ranks": [1], "message": "the loss of rank 1 is nan", "samples": [1207, 88, 4031]},
        {"step": 1485, "ranks": [0, 1], "message": "the norm of the gradients is inf", "samples": list(range(40))},
    ]
    (folder / "faults" / "bad-steps.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in bad))


def _make_evaluation(folder: Path, draw: random.Random, classes: list[str] | None) -> None:
    names = classes or ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    num = len(names)
    digits = load_digits()
    folder.mkdir(parents=True)
    samples: list[dict[str, Any]] = []
    for i in range(24):
        picture = Image.fromarray((digits.images[i] * 15.9).astype(np.uint8))
        picture.resize((32, 32), Image.Resampling.NEAREST).save(folder / f"{i}.png")
        target = int(digits.target[i]) % num
        prediction = draw.randrange(num) if i % 7 == 5 else target
        sample = {"image": f"{i}.png", "target": names[target], "prediction": names[prediction]}
        samples.append({**sample, "confidence": draw.uniform(0.5, 1)})
    samples.append({"image": None, "target": names[0], "prediction": names[-1], "confidence": 0.41})
    _write(folder / "samples.json", samples)
    counts = [[max(0, round(draw.gauss(-1, 2.2))) for _ in names] for _ in names]
    for i, row in enumerate(counts):
        row[i] = round(draw.gauss(90, 4))
    _write(folder / "confusion.json", {"classes": names, "counts": counts})
