"""What the model is fed with: each constant with its value, and whether it was measured, published or assumed.

Measured ones are read from `benchmarks/results`. No GPU, no NVLink and no real network was measured for them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.scaling.model import Network, Protocol
from trainer.memory.devices import find_device

RESULTS = Path(__file__).resolve().parent.parent / "results"
_NCCL = "https://github.com/NVIDIA/nccl/blob/b6475625fbcaa2c3c0e50eed2fa1255d7514d4a2/src/graph/tuning.cc"
_LLAMA = "https://arxiv.org/abs/2407.21783"

Kind = Literal["measured", "published", "assumed"]


@dataclass(frozen=True)
class Constant:
    """A number and where it comes from.

    Args:
        name: for the table.
        value: in SI units.
        shown: value and unit, for readers.
        kind: how it is known.
        source: a file of this repository, an address, or why it was assumed.
    """

    name: str
    value: float
    shown: str
    kind: Kind
    source: str


def read(results: Path = RESULTS) -> dict[str, Constant]:
    """Returns all constants by their short names."""
    bf16 = find_device("h100-80g").flops.bfloat16
    assert bf16 is not None
    stall = _stall(results / "checkpoint-cpu.json")
    back = _back_after(results / "chaos-cpu.json")
    gpu_days = 54 * 16384
    mtbf = gpu_days * 86400 / 419
    return {
        "peak": Constant(
            "H100 SXM, bfloat16, dense",
            bf16,
            f"{bf16 / 1e12:.0f} TFLOP/s",
            "published",
            "https://www.nvidia.com/en-us/data-center/h100/ (half of the figure with sparsity)",
        ),
        "inside": Constant(
            "NVLink, per GPU and direction, as NCCL reaches it",
            370e9,
            "370 GB/s (450 on the wire)",
            "published",
            "https://github.com/NVIDIA/nccl-tests/issues/212 (without NVLink SHARP)",
        ),
        "between": Constant(
            "InfiniBand NDR, a card per GPU, per direction",
            0.92 * 50e9,
            "46 GB/s (400 Gbit/s on the wire)",
            "assumed",
            "one ConnectX-7 per GPU is DGX H100's (https://docs.nvidia.com/dgx/dgxh100-user-guide/); 92%: assumed",
        ),
        "ranks_per_node": Constant(
            "GPUs per node", 8, "8", "published", "https://docs.nvidia.com/dgx/dgxh100-user-guide/"
        ),
        "latency": Constant(
            "latencies of a collective's steps",
            14e-6,
            "0.6 to 28 us, by algorithm and protocol",
            "published",
            f"NCCL's own model, without its corrections: [tuning.cc]({_NCCL})",
        ),
        "images_per_second": Constant(
            "ResNet-50, images/s of one GPU",
            2470,
            "2,470 (A100 80GB, mixed precision)",
            "published",
            "https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/Classification/ConvNets/resnet50v1.5"
            " (an H100 is faster, which exposes more: see the sensitivity)",
        ),
        "mfu": Constant(
            "ViT-H/14, share of a GPU's peak while it computes",
            0.4,
            "0.4, counting what is recomputed",
            "assumed",
            f"Llama 3's 405B reached 0.38 to 0.43 on 8,192 to 16,384 H100 ({_LLAMA}, table 4)",
        ),
        "spread": Constant(
            "standard deviation of a rank's step, of its mean",
            0.01,
            "1%, each step and rank by itself",
            "assumed",
            "of GPUs nothing was measured here; see the sensitivity",
        ),
        "stall": Constant(
            "stall of a checkpoint",
            stall,
            f"{stall:.3f} s (3.65 GB a rank)",
            "measured",
            "`checkpoint-cpu.json`, `lockstep, bare` (no part of it behind a step); on a CPU, taken for any size",
        ),
        "back": Constant(
            "a rank is killed: until it trains again, on one machine",
            back,
            f"{back:.1f} s",
            "measured",
            "`chaos-cpu.json`, 2 ranks on a CPU",
        ),
        "start": Constant(
            "to that, for a large job: new nodes, NCCL, reading a checkpoint",
            180,
            "180 s",
            "assumed",
            "see the sensitivity",
        ),
        "mtbf": Constant(
            "mean time between failures, per GPU",
            mtbf,
            f"{mtbf / 3600:,.0f} hours",
            "published",
            f"419 unexpected interruptions in 54 days on 16,384 H100 ({_LLAMA}, section 3.3.4)",
        ),
    }


def network(constants: Mapping[str, Constant]) -> Network:
    """Returns nodes of GPUs on NVLink and a network, with NCCL's protocols: LL, LL128 and Simple.

    Latencies and shares are those of `tuning.cc`; its corrections are left out. Some of these make a collective slower:
    of trees by size (a bandwidth of 0.4 to 1.0) and by pattern (0.85), of the latency of Simple rings over nodes (1.4),
    and of LL128 with one GPU a node (0.7, for 0.92). LL is limited to 19 GB/s everywhere, which `tuning.cc` has for
    several nodes with AMD's processors; for one node it has 87.7. Left out as well: NVLink SHARP, SHARP in switches and
    PAT for gathers, which are faster.
    """
    us, unlimited = 1e-6, float("inf")
    return Network(
        ranks_per_node=int(constants["ranks_per_node"].value),
        inside=constants["inside"].value,
        between=constants["between"].value,
        protocols=(
            Protocol("ring", 0.25, 19e9, 6.6 * us, 0.6 * us, 1.0 * us, 2.7 * us),
            Protocol("ring", 0.92, unlimited, 14.0 * us, 1.9 * us, 1.9 * us, 4.0 * us),
            Protocol("ring", 1.0, unlimited, 8.4 * us, 3.4 * us, 3.4 * us, 14.0 * us),
            Protocol("tree", 0.92 / 3.8, 19e9, 6.8 * us, 0.6 * us, 0.6 * us, 5.0 * us),
            Protocol("tree", 0.92 * 120 / 128, unlimited, 14.0 * us, 1.25 * us, 1.25 * us, 8.5 * us),
            Protocol("tree", 0.92, unlimited, 0.0, 28.0 * us, 28.0 * us, 28.0 * us),
        ),
    )


def _stall(file: Path) -> float:
    entries: list[dict[str, Any]] = json.loads(file.read_text())["entries"]
    return next(entry["stall"]["median"] for entry in entries if entry["name"] == "lockstep, bare")


def _back_after(file: Path) -> float:
    faults: list[dict[str, Any]] = json.loads(file.read_text())["faults"]
    return statistics.median(fault["back_after"] for fault in faults if fault["action"] == "kill")
