"""The run's data sets, from its config, on all ranks together.

Owns the order of the steps that ranks take together: build, pack, open. What the data sets are is
`trainer.data.datasets`; the packed cache, `trainer.data.packing`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

from trainer.config_data import DataConfig
from trainer.data.datasets import (
    ImageFolder,
    RankOrder,
    SizedDataset,
    build_dataset,
    build_eval_dataset,
    gives_encoded,
)
from trainer.data.held_out import hold_out
from trainer.data.listing import cache_key
from trainer.data.packed import PackedImages
from trainer.data.packing import OtherRankFailed, pack_folder
from trainer.errors import UserError, place_at

logger = logging.getLogger("lockstep")

T = TypeVar("T")


class Ranks(RankOrder, Protocol):
    """What we need of the processes that train together; `trainer.runtime.Runtime` is it."""

    rank: int
    local_rank: int
    num_ranks: int
    num_cores: int

    def agree(self, build: Callable[[], T]) -> T: ...
    def from_main(self, value: Callable[[], T]) -> T: ...
    def barrier(self) -> None: ...


def build_data(config: DataConfig, ranks: Ranks) -> tuple[SizedDataset, SizedDataset | None]:
    """Builds the training and the evaluation data set.

    Raises:
        UserError: one of them cannot be built, or there is nothing to pack; on all ranks alike.
    """
    train = ranks.agree(lambda: build_dataset(config.train, "data.train", ranks))
    evaluation: SizedDataset | None
    if (share := config.eval_share) is not None:
        whole = train
        train, evaluation = ranks.agree(lambda: hold_out(whole, share))
        logger.info("held out   %d of %d samples for evaluation", len(evaluation), len(whole))
    else:
        evaluation = ranks.agree(lambda: build_eval_dataset(config, train, ranks))
    if config.cache is not None and not is_packable(train) and not is_packable(evaluation):
        message = "image folders are packed, and neither data.train nor data.eval is one"
        raise UserError(message, path="data.cache", agreed=True)
    return train, evaluation


def packed(dataset: SizedDataset, config: DataConfig, ranks: Ranks) -> SizedDataset:
    """Returns the packed copy of a data set, which all ranks make first; the data set itself where it is no folder.

    Raises:
        UserError: it cannot be packed; on all ranks alike.
    """
    cache = config.cache
    if cache is None or not isinstance(dataset, ImageFolder) or not is_packable(dataset):
        return dataset
    # Rank 0 lists the files, the others take its word: a listing is slow on a network file system.
    listed = ranks.agree(lambda: cache_key(dataset, cache) if ranks.rank == 0 else "")
    key = ranks.from_main(lambda: listed)

    def pack() -> PackedImages | None:
        try:
            folder = pack_folder(
                dataset,
                cache,
                rank=ranks.rank,
                num_ranks=ranks.num_ranks,
                barrier=ranks.barrier,
                num_workers=ranks.num_cores,
                on_error=config.on_error,
                key=key,
            )
            return PackedImages(folder, read_ahead=ranks.local_rank == 0)
        except OtherRankFailed:
            return None  # that rank says why
        except UserError as error:
            raise place_at("data.cache", error) from None

    copy = ranks.agree(pack)
    if copy is None:
        message = f"the packed copy in '{cache.path}' is not complete, or this host does not see it"
        raise UserError(message, path="data.cache")
    return copy


def is_packable(dataset: SizedDataset | None) -> bool:
    """Tells whether `data.cache` has an effect on a data set."""
    return isinstance(dataset, ImageFolder) and gives_encoded(dataset)
