"""What the doctor's ranks and whoever starts them have agreed on. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from trainer.config import Config

BARE = Path(__file__).with_name("bare.yaml").resolve()  # stands in for a config where none is given
RANK_SCRIPT = str(Path(__file__).with_name("rank.py").resolve())
FOLDER_VARIABLE = "LOCKSTEP_DOCTOR_FOLDER"  # where rank 0 leaves the verdict for whoever started it
DEFAULT_TIMEOUT = 60.0


def is_bare(file: str) -> bool:
    """Tells whether a config is the stand-in."""
    return Path(file).resolve() == BARE


def default_json(file: str, config: Config) -> Path:
    """Returns where the report goes."""
    return Path("doctor.json") if is_bare(file) else config.run_dir / "doctor.json"


def verdict_file(folder: Path) -> Path:
    """Returns where rank 0 leaves the exit code, for an agent on its machine."""
    return folder / "verdict"
