"""The C++ extension: raw addresses (tensor.data_ptr(), 0 for none) and sizes, nothing of torch."""

from array import array
from collections.abc import Sequence

# kernels: row statistics, losses, sampling (csrc/kernels).

# (address, dtype, rows, vocab, width, inner, stride_outer, stride_inner)
_Rows = tuple[int, int, int, int, int, int, int, int]
# (number, address of a per-token array or 0)
_Temperature = tuple[float, int]
# CSR of kept ids: (address of ids or 0, address of offsets)
_Kept = tuple[int, int]
# (clipped, eps_low, eps_high, dual_clip, delta, kl, kl_coef, kl_importance, entropy_coef)
_Terms = tuple[bool, float, float, float, float, int, float, bool, float]

def cpu_isa() -> str: ...
def set_isa(name: str) -> bool: ...
def token_logprobs(
    logits: _Rows,
    tokens: int,
    kept: _Kept,
    temperature: _Temperature,
    logprob: int,
    entropy: int,
    stats: int,
    threads: int,
) -> int: ...
def token_logprobs_backward(
    logits: _Rows,
    tokens: int,
    kept: _Kept,
    temperature: _Temperature,
    stats: int,
    grad_logprob: int,
    grad_entropy: int,
    grad: _Rows,
    threads: int,
) -> None: ...
def policy_loss(
    logits: _Rows,
    tokens: int,
    kept: _Kept,
    old_logprobs: int,
    advantages: int,
    weight: int,
    ref_logprobs: int,
    temperature: _Temperature,
    terms: _Terms,
    loss: int,
    logprob: int,
    entropy: int,
    grad: _Rows | None,
    threads: int,
) -> int: ...
def reinforce_grad(
    logits: _Rows,
    tokens: int,
    advantages: int,
    temperature: _Temperature,
    out: _Rows,
    threads: int,
) -> int: ...
def scale(x: int, dtype: int, count: int, factor: float, threads: int) -> None: ...

class KeptSets:
    def __init__(self, rows: int) -> None: ...
    def total(self) -> int: ...
    def write(
        self,
        ids: int,
        capacity: int,
        offsets: int,
        bits: int,
        words: int,
        status: int,
        threads: int,
    ) -> None: ...

def sample(
    logits: _Rows,
    temperature: int,
    top_k: int,
    top_p: int,
    min_p: int,
    seed: int,
    position: int,
    allowed: int,
    joint: bool,
    keep_ties: bool,
    token: int,
    logprob: int,
    full_logprob: int,
    kept: int,
    status: int,
    support: KeptSets | None,
    threads: int,
) -> int: ...

# (logits, first, temperature, top_k, top_p, min_p, seed, position, allowed, words, joint,
# keep_ties)
_Shard = tuple[_Rows, int, int, int, int, int, int, int, int, int, bool, bool]
shard_header: int

_Known = tuple[int, int, int]  # (max, status, vocab) of the whole rows

def shard_candidates(
    shard: _Shard, rows: int, count: int, known: _Known, capacity: int, out: int, threads: int
) -> None: ...
def shard_select(
    shard: _Shard,
    parts: int,
    ranks: int,
    rows: int,
    capacity: int,
    vocab: int,
    row_mass: int,
    token: int,
    logprob: int,
    full_logprob: int,
    kept: int,
    status: int,
    state: int,
    max: int,
    log_sum: int,
    support: KeptSets | None,
    threads: int,
) -> None: ...
def shard_masses(
    shard: _Shard, rows: int, count: int, known: _Known, mass: int, threads: int
) -> None: ...
def shard_draw(
    shard: _Shard,
    rows: int,
    count: int,
    max: int,
    masses: int,
    ranks: int,
    rank: int,
    found: int,
    threads: int,
) -> None: ...
def verify_draft(
    target: _Rows,
    draft: _Rows | None,
    draft_tokens: int,
    depth: int,
    temperature: int,
    top_k: int,
    top_p: int,
    min_p: int,
    seed: int,
    position: int,
    token: int,
    accepted: int,
    logprob: int,
    full_logprob: int,
    status: int,
    support: KeptSets | None,
    threads: int,
) -> int: ...

# memory: warm pages for large gradients (csrc/memory/warm_pages.h).
def warm_tensor(shape: Sequence[int], dtype: int) -> object | None: ...
def release_warm_pages() -> int: ...
def warm_pages() -> tuple[int, int]: ...

# memory: the hand-over of weights (csrc/memory).
# forms, an array("Q"): of each tensor offset, itemsize, ndim, sizes, strides in elements.
_Numbers = array[int]

class CudaError(RuntimeError): ...

def usable_threads(requested: int) -> int: ...
def pack(
    buffer: int,
    buffer_bytes: int,
    forms: _Numbers,
    addresses: _Numbers,
    checksum: bool,
    threads: int,
) -> list[int]: ...
def unpack(
    buffer: int,
    buffer_bytes: int,
    forms: _Numbers,
    addresses: _Numbers,
    checksum: bool,
    threads: int,
) -> list[int]: ...

# forms: of each whole tensor offset, itemsize, ndim, parts, sizes, and behind it of each part
# starts, sizes, strides in elements; addresses: of the parts.
def assemble(
    buffer: int,
    buffer_bytes: int,
    forms: _Numbers,
    addresses: _Numbers,
    checksum: bool,
    threads: int,
) -> list[int]: ...
def checksum(buffer: int, buffer_bytes: int, ranges: _Numbers, threads: int) -> list[int]: ...

class Replay:
    # dense: address, offset, itemsize, ndim, sizes, strides of the destination; strided: address,
    # offset, itemsize, from, to, ndim, sizes, source strides, destination strides.
    def __init__(self, dense: array[int], strided: array[int]) -> None: ...
    def run(self, buffer: int, buffer_bytes: int, checksum: bool, threads: int) -> list[int]: ...

def segment_create(bytes: int, inherit: bool = False) -> tuple[int, int]: ...
def segment_open(fd: int, bytes: int) -> int: ...
def segment_close(address: int, bytes: int) -> None: ...
def cuda_unavailable() -> str: ...
def cuda_device_count() -> int: ...
def cuda_device_uuid(device: int) -> bytes: ...
def cuda_device_by_uuid(uuid: bytes) -> int: ...
def cuda_alloc(device: int, bytes: int) -> int: ...
def cuda_free(device: int, address: int) -> None: ...
def cuda_ipc_export(device: int, address: int) -> tuple[bytes, int, int]: ...
def cuda_ipc_open(device: int, handle: bytes) -> int: ...
def cuda_ipc_close(device: int, base: int) -> None: ...
def cuda_copy_to_host(device: int, dst: int, src: int, bytes: int) -> None: ...
def cuda_copy_to_device(device: int, dst: int, src: int, bytes: int) -> None: ...
def cuda_synchronize(device: int) -> None: ...
