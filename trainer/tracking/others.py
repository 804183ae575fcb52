"""Trackers other than W&B, by Accelerate's names: how each is started, and how it takes pictures.

Values go through Accelerate's classes. What these do not do, pictures for most, is done with the tracker itself. That
a server may be slow or away is the business of `trainer.tracking.behind`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from numpy.typing import NDArray

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Progress
from trainer.config import Config, flatten
from trainer.errors import UserError, nearest
from trainer.eval_media import EvalMedia

_TAKE_TEXT = ("tensorboard", "comet_ml")
# What takes the arguments of the user's, and what we take ourselves beside.
_TAKERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "tensorboard": ("torch.utils.tensorboard", "SummaryWriter", ()),
    "aim": ("aim", "Run", ("run_name", "repo")),
    "clearml": ("clearml", "Task.init", ()),
    "comet_ml": ("comet_ml", "start", ("project_name",)),
    "dvclive": ("dvclive", "Live", ()),
    "mlflow": ("accelerate.tracking", "MLflowTracker", ()),
    "swanlab": ("swanlab", "init", ()),
    "trackio": ("trackio", "init", ()),
}


def stored_config(config: Config) -> dict[str, Any]:
    """Returns what a tracker is to show of a config: all but `tracking.init`, which may hold secrets."""
    return config.model_dump(mode="json", exclude={"tracking": {"init"}})


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Raises UserError where a tracker's own start does not know an argument, as far as that can be known."""
    module, attribute, ours = _TAKERS[name]
    try:
        taker: Any = importlib.import_module(module)
        for part in attribute.split("."):
            taker = getattr(taker, part)
        parameters = inspect.signature(taker).parameters
    except Exception:  # a package of another version, or one that is broken: its start will tell
        return
    check_names(name, arguments, parameters, ours)


def check_names(
    name: str, arguments: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter], ours: tuple[str, ...] = ()
) -> None:
    """Raises UserError where an argument is none of the parameters."""
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for key in arguments:
        if key not in parameters and key not in ours:
            message = f"{name} takes no such argument{nearest(key, parameters)}"
            raise UserError(message, path=f"tracking.init.{name}.{key}")


class Other:
    """One tracker that is not W&B.

    Args:
        name: Accelerate's name of it.
        config: the whole config; the tracker stores it.
        run_dir: the run folder.
        start: the step that this attempt starts from.
        arguments: of the user's, for its own start.
    """

    def __init__(self, name: str, config: Config, run_dir: Path, start: int, arguments: Mapping[str, Any]) -> None:
        self.name = name
        self._tracker = _build(name, config, run_dir, start, dict(arguments))
        self._tracker.start()
        if name == "comet_ml" and "experiment_config" not in arguments:
            self._tracker.tracker.set_name(config.run.name)
        self._tracker.store_init_configuration(_plain(stored_config(config)))

    def log(self, record: Mapping[str, Any], step: int) -> None:
        self._tracker.log(dict(record), step=step)

    def show(self, media: EvalMedia, step: int) -> None:
        send = _PICTURES.get(self.name)
        if send is None:
            return
        for example in media.examples:
            if example.image is not None:
                send(self._tracker, f"eval/samples/{example.number}", example.image, example.caption, step)
        for name, table in media.tables.items():
            send(self._tracker, f"eval/{name}", _heat_map(table), name, step)

    def end_step(self, step: int) -> None:
        pass  # each record goes out by itself

    def summarise(self, values: Mapping[str, Any], step: int) -> None:
        kinds: tuple[type, ...] = (int, float, str) if self.name in _TAKE_TEXT else (int, float)
        taken = {key: value for key, value in values.items() if isinstance(value, kinds)}
        if taken:
            self._tracker.log(taken, step=step)

    def checkpoint(self, folder: CheckpointFolder, progress: Progress) -> None:
        pass  # uploads are W&B's

    def finish(self, failed: bool, open_step: int | None, seconds: float) -> None:
        if failed and self.name == "mlflow":
            import mlflow

            mlflow.end_run("FAILED")
        elif failed and self.name == "clearml":
            self._tracker.tracker.mark_failed()
        self._tracker.finish()


def _build(name: str, config: Config, run_dir: Path, start: int, arguments: dict[str, Any]) -> GeneralTracker:
    """Returns Accelerate's tracker, told of our project, run and folder as far as the user says nothing else."""
    project, run_name = config.tracking.wandb.project, config.run.name
    make: Callable[..., GeneralTracker] = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        # What an attempt before wrote of the steps after `start` is dropped by whoever reads the files.
        return make("tensorboard", run_dir, **{"purge_step": start + 1, **arguments})
    if name == "aim":
        return make(arguments.pop("run_name", run_name), arguments.pop("repo", str(run_dir)), **arguments)
    if name == "mlflow":
        return make(arguments.pop("experiment_name", project), **{"run_name": run_name, **arguments})
    if name == "clearml":
        return make(**{"project_name": project, "task_name": run_name, **arguments})
    if name == "dvclive":
        ours = {"dir": str(run_dir / "dvclive"), "dvcyaml": None, "save_dvc_exp": False, "resume": start > 0}
        return make(**{**ours, **arguments})
    names = {"swanlab": "experiment_name", "trackio": "name"}
    ours = {names[name]: run_name} if name in names else {}
    first = arguments.pop("project_name" if name == "comet_ml" else "project", project)
    return make(first, **{**ours, **arguments})


# ---- pictures: uint8 (height, width, 3) -------------------------------------------------------------------


def _to_tensorboard(tracker: Any, name: str, image: NDArray[np.uint8], caption: str, step: int) -> None:
    tracker.tracker.add_image(name, image, global_step=step, dataformats="HWC")
    tracker.tracker.add_text(name, caption, global_step=step)


def _to_aim(tracker: Any, name: str, image: NDArray[np.uint8], caption: str, step: int) -> None:
    from PIL import Image

    tracker.log_images({name: (Image.fromarray(image), caption)}, step=step)


def _to_clearml(tracker: Any, name: str, image: NDArray[np.uint8], caption: str, step: int) -> None:
    tracker.log_images({name: image}, step=step)


def _to_comet(tracker: Any, name: str, image: NDArray[np.uint8], caption: str, step: int) -> None:
    tracker.tracker.log_image(image, name=name, step=step, metadata={"caption": caption})


def _to_mlflow(tracker: Any, name: str, image: NDArray[np.uint8], caption: str, step: int) -> None:
    import mlflow

    mlflow.log_image(image, key=name.replace("/", "-"), step=step)


def _to_dvclive(tracker: Any, name: str, image: NDArray[np.uint8], caption: str, step: int) -> None:
    tracker.tracker.log_image(f"{name}.png", image)


def _to_swanlab(tracker: Any, name: str, image: NDArray[np.uint8], caption: str, step: int) -> None:
    import swanlab

    tracker.log({name: swanlab.Image(image, caption=caption)}, step=step)


_PICTURES: dict[str, Callable[[Any, str, NDArray[np.uint8], str, int], None]] = {
    "tensorboard": _to_tensorboard,
    "aim": _to_aim,
    "clearml": _to_clearml,
    "comet_ml": _to_comet,
    "mlflow": _to_mlflow,
    "dvclive": _to_dvclive,
    "swanlab": _to_swanlab,
}


def _heat_map(table: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Returns a picture of a table: each row's shares, dark is all."""
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    scale = max(256 // max(len(table), 1), 1)
    grey = np.kron(255 - np.round(255 * shares), np.ones((scale, scale))).astype(np.uint8)
    return np.stack([grey] * 3, axis=-1)


def _plain(settings: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Returns settings by dotted key as the plain values that all trackers take."""
    flat = flatten(settings)
    return {key: value if isinstance(value, str | int | float | bool) else str(value) for key, value in flat.items()}
