"""The run's data sets, from its config, on all ranks together.

Owns the order of the steps that ranks take together: build, pack, open. What the data sets are is
`trainer.data.datasets`; the packed cache, `trainer.data.packing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from trainer.config import DataConfig
from trainer.data.datasets import ImageFolder, RankOrder, SizedDataset, build_dataset, build_eval_dataset
from trainer.data.packed import PackedImages
from trainer.data.packing import cache_key, open_or_pack
from trainer.errors import UserError, place_at

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
    """Builds the training and the evaluation data set; makes their packed copies first where `data.cache` asks.

    Raises:
        UserError: one of them cannot be built or packed; on all ranks alike.
    """
    train = ranks.agree(lambda: build_dataset(config.train, "data.train", ranks))
    evaluation = ranks.agree(lambda: build_eval_dataset(config, train, ranks))
    if config.cache is None:
        return train, evaluation
    train = _packed(train, config, "data.train", ranks)
    return train, None if evaluation is None else _packed(evaluation, config, "data.eval", ranks)


def _packed(dataset: SizedDataset, config: DataConfig, path: str, ranks: Ranks) -> PackedImages:
    cache = config.cache
    assert cache is not None
    if not isinstance(dataset, ImageFolder):
        raise UserError(f"only an image_folder is packed, and {path} is none", path="data.cache", agreed=True)
    # Rank 0 lists the files, the others take its word: a listing is slow on a network file system.
    listed = ranks.agree(lambda: cache_key(dataset, cache) if ranks.rank == 0 else "")
    key = ranks.from_main(lambda: listed)

    def pack() -> PackedImages:
        try:
            return open_or_pack(
                dataset,
                cache,
                rank=ranks.rank,
                num_ranks=ranks.num_ranks,
                barrier=ranks.barrier,
                num_workers=ranks.num_cores,
                on_error=config.on_error,
                key=key,
                read_ahead=ranks.local_rank == 0,
            )
        except UserError as error:
            raise place_at("data.cache", error) from None

    return ranks.agree(pack)
