"""A hook of MkDocs: the site's files, each at the place that it has in the repository."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_REPOSITORY = Path(__file__).resolve().parent.parent
_SHOWN = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "docs/*.md",
    "docs/*.svg",
    "docs/images/*",
    "configs/*",
    "examples/*/*.md",
    "examples/*/*.yaml",
    "launch/sweep.yaml",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Puts the repository's files in place of those of `docs_dir`, and keeps the theme's."""
    kept = [file for file in files if file.src_dir != config.docs_dir]
    shown = sorted(path for pattern in _SHOWN for path in _REPOSITORY.glob(pattern))
    names = [path.relative_to(_REPOSITORY).as_posix() for path in shown]
    return Files(kept + [File(name, str(_REPOSITORY), config.site_dir, config.use_directory_urls) for name in names])
