"""What kind of work a GPU kernel or a CPU operator does, by its name and by where in the loop it was called."""

from __future__ import annotations

import re
from functools import lru_cache

from trainer.faults.judging import AFTER_STEP, EVALUATION, LOADING, METRICS

# In the order in which they are shown.
KINDS = {
    "matmul": "matrix products, convolutions, attention",
    "normalisation": "normalisation",
    "elementwise": "elementwise, reductions, fused",
    "copies": "copies",
    "communication": "communication",
    "optimizer": "optimizer",
    "data": "data",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "python": "Python and the rest",
    "other": "other operators",
}

_BY_PLACE = {
    LOADING: "data",
    "optimizer": "optimizer",
    EVALUATION: "evaluation",
    METRICS: "evaluation",
    "saving a checkpoint": "checkpoint",
    "report": "python",  # such as a step that is simulated for advice
}
_EXCHANGES = (AFTER_STEP, "report")  # what these wait for is the other ranks

_ATEN = {
    "copies": "copy_ _to_copy to clone contiguous cat _foreach_copy_ pin_memory _pin_memory index_select",
    "matmul": "mm bmm addmm baddbmm addmv mv dot",
    "elementwise": "add sub mul div neg pow exp log sqrt rsqrt abs sin cos sum mean max min amax argmax where eq ne lt "
    "gt le ge all any clamp clamp_min clamp_max fill zero zeros ones masked_fill isfinite bernoulli uniform normal "
    "random lerp addcmul addcdiv logical_and logical_not bitwise_and",
}
_BY_OPERATOR = {
    f"aten::{name}{end}": kind for kind, names in _ATEN.items() for name in names.split() for end in ("", "_")
}

# The first that is found in a name wins. The names are those of NCCL, cuBLAS, cuDNN, CUTLASS, Triton and ATen.
_PATTERNS = (
    ("communication", r"nccl|rccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|param_comms|wait_tensor|multimem"),
    ("optimizer", r"multi_tensor_apply|fused_?(adam|sgd|adagrad)|^optimizer\.step"),
    ("copies", r"^memcpy|^memset|_copy_kernel|CatArrayBatchedCopy|nchwToNhwc|nhwcToNchw"),
    ("normalisation", r"(batch|layer|group|instance|rms)_?norm|bn_(fw|bw)|RowwiseMoments|welford|GammaBeta"),
    ("matmul", r"gemm|gemv|cutlass|xmma|nvjet|winograd|wgrad|dgrad|fprop|cudnn|cublas|splitK|triton_tem"),
    ("matmul", r"conv(?!ert)|fmha|flash|attention|matmul|linear(?!alg)"),
    (
        "elementwise",
        r"elementwise|reduce_kernel|softmax|dropout|pool|triton_(poi|per|red)|nll_loss|cross_entropy",
    ),
    ("elementwise", r"threshold|relu|gelu|silu|sigmoid|tanh|vector_norm|distribution|_foreach_|CompiledFxGraph"),
)
_COMPILED = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _PATTERNS)


@lru_cache(maxsize=100_000)
def kind_of(name: str, place: str | None) -> str:
    """Returns the kind of a kernel or an operator.

    Args:
        name: of it.
        place: of the loop where it was called, if known. There the optimizer's additions are the optimizer's.
    """
    by_name = _BY_OPERATOR.get(name) or next((kind for kind, pattern in _COMPILED if pattern.search(name)), "other")
    if by_name == "communication" or (by_name == "copies" and place == LOADING):
        return by_name
    return _BY_PLACE.get(place or "", by_name)


def kind_outside(place: str | None, is_alone: bool) -> str:
    """Returns the kind of the host's time between operators, in a place of the loop.

    Args:
        place: if it is in one.
        is_alone: there is no other rank.
    """
    if place in _EXCHANGES and not is_alone:
        return "communication"
    by_place = _BY_PLACE.get(place or "", "python")
    return "python" if by_place == "optimizer" else by_place
