"""Tensors → buckets → one binary manifest.

    offset of a tensor = end of the one before it, rounded up to 256 bytes
    staging bytes      = buffers · largest bucket            (known before anything is allocated)

    manifest := "PRLM" u16 format  u16 zero  u32 buckets  u32 tensors
                u64 bytes · buckets  u32 segment · buckets                     0: staged
                u16 name length  u8 dtype  u8 ndim  u32 bucket  u64 offset     a tensor
                u64 size · ndim  name (UTF-8)
    digest   := SHA-256 of the manifest

Two tensors may name the same range: an alias (tied weights), sent once. All numbers little-endian.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .errors import ProtocolError

ALIGN = 256
MAX_TENSORS = 1 << 20
MAX_BUCKETS = 1 << 16
MAX_NAME = 1024
MAX_NDIM = 16
MAX_MANIFEST = 128 << 20
MAX_BYTES = (1 << 63) - 1
# The checksums of a bucket travel in one frame.
MAX_PIECES = 4096
# Segments of a trainer that one update may name.
MAX_DIRECT = 4096

# Closed: a code means one dtype for ever, new ones go to the end.
DTYPES: tuple[torch.dtype, ...] = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}

_HEAD = struct.Struct("<4sHHII")
_ENTRY = struct.Struct("<HBBIQ")
_MAGIC = b"PRLM"
_FORMAT = 2


@dataclass(frozen=True)
class Spec:
    """Name, shape and dtype of one tensor; `alias`: the index of the one whose memory it shares."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    alias: int | None = None
    direct: tuple[int, int] | None = None  # segment of the trainer and offset in it: not staged

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """A tensor and its place: `offset` bytes into bucket `bucket`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bucket: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Where every tensor of an update lies.

    Attributes
    ----------
    entries : all tensors, in the order they were given
    buckets : bytes of each bucket; of a direct one, of the trainer's segment that it is in
    segments : of each bucket, 0 if it is staged, else 1 + the number of the trainer's segment.
        Staged buckets come first.
    """

    entries: tuple[Entry, ...]
    buckets: tuple[int, ...]
    segments: tuple[int, ...]

    @functools.cached_property
    def staged(self) -> int:
        """Number of staged buckets."""
        return self.segments.count(0)

    def _place(self, entry: Entry) -> tuple:
        """Equal for two entries that are one range: of a staged bucket, at one offset."""
        if self.segments[entry.bucket]:
            return entry.bucket, entry.offset, entry.shape, entry.dtype
        return entry.bucket, entry.offset

    @functools.cached_property
    def pieces(self) -> tuple[tuple[int, ...], ...]:
        """Of each bucket, the entries that own a range: aliases and empty tensors left out."""
        pieces: list[list[int]] = [[] for _ in self.buckets]
        seen: set[tuple] = set()
        for index, entry in enumerate(self.entries):
            if not entry.nbytes:
                continue
            place = self._place(entry)
            if place not in seen:
                seen.add(place)
                pieces[entry.bucket].append(index)
        return tuple(tuple(sorted(p, key=lambda i: self.entries[i].offset)) for p in pieces)

    @functools.cached_property
    def members(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Beside each piece of each bucket, all entries that share its range."""
        sharing: dict[tuple, list[int]] = {}
        for index, entry in enumerate(self.entries):
            if entry.nbytes:
                sharing.setdefault(self._place(entry), []).append(index)
        return tuple(
            tuple(tuple(sharing[self._place(self.entries[i])]) for i in pieces)
            for pieces in self.pieces
        )

    @functools.cached_property
    def ranges(self) -> tuple[array[int], ...]:
        """Of each bucket, offset and bytes of each piece, one after the other."""
        return tuple(
            array("Q", [n for i in p for n in (self.entries[i].offset, self.entries[i].nbytes)])
            for p in self.pieces
        )

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes that are sent; an alias counts once."""
        return sum(self.entries[i].nbytes for pieces in self.pieces for i in pieces)

    @property
    def slot_bytes(self) -> int:
        """Bytes that one staging slot needs."""
        return max(self.buckets[: self.staged], default=0)

    def peak_bytes(self, buffers: int) -> int:
        """Staging memory of an update with `buffers` slots."""
        return self.slot_bytes * min(buffers, self.staged)

    @functools.cached_property
    def encoded(self) -> bytes:
        parts = [_HEAD.pack(_MAGIC, _FORMAT, 0, len(self.buckets), len(self.entries))]
        parts.append(struct.pack(f"<{len(self.buckets)}Q", *self.buckets))
        parts.append(struct.pack(f"<{len(self.buckets)}I", *self.segments))
        for e in self.entries:
            name = e.name.encode()
            code = _CODES[e.dtype]
            parts.append(_ENTRY.pack(len(name), code, len(e.shape), e.bucket, e.offset))
            parts.append(struct.pack(f"<{len(e.shape)}Q", *e.shape))
            parts.append(name)
        return b"".join(parts)

    @functools.cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(self.encoded).digest()


def supported(dtype: torch.dtype) -> bool:
    """Whether a dtype has a code on the wire."""
    return dtype in _CODES


def plan(specs: Sequence[Spec], bucket_bytes: int, segments: Sequence[int] = ()) -> Layout:
    """Put tensors into buckets of at most `bucket_bytes`, in order; a larger one gets its own.

    `segments`: bytes of the trainer's segments that `Spec.direct` names. Their buckets come last.

    Raises
    ------
    ValueError
        More tensors than a manifest holds, or a name, rank or size beyond its limits.
    """
    if len(specs) > MAX_TENSORS:
        raise ValueError(f"named_tensors: at most {MAX_TENSORS} tensors, got {len(specs)}")
    entries: list[Entry] = []
    buckets: list[int] = []
    pieces = 0
    for spec in specs:
        nbytes = spec.nbytes
        if not 0 < len(spec.name.encode()) <= MAX_NAME:
            raise ValueError(f"named_tensors: a name has 1 to {MAX_NAME} bytes, got {spec.name!r}")
        if len(spec.shape) > MAX_NDIM or nbytes > MAX_BYTES:
            raise ValueError(f"named_tensors: {spec.name!r} of shape {spec.shape} is beyond limits")
        if spec.alias is not None:
            owner = entries[spec.alias]
            entries.append(
                Entry(spec.name, spec.shape, spec.dtype, owner.bucket, owner.offset, nbytes)
            )
            continue
        if nbytes == 0:
            entries.append(Entry(spec.name, spec.shape, spec.dtype, 0, 0, 0))
            continue
        if spec.direct is not None:
            # Its bucket is known when the staged ones are; the segment stands in for it.
            segment, offset = spec.direct
            entries.append(Entry(spec.name, spec.shape, spec.dtype, -1 - segment, offset, nbytes))
            continue
        offset = aligned(buckets[-1]) if buckets else 0
        if not buckets or offset + nbytes > bucket_bytes or pieces == MAX_PIECES:
            buckets.append(0)
            offset, pieces = 0, 0
        entries.append(Entry(spec.name, spec.shape, spec.dtype, len(buckets) - 1, offset, nbytes))
        buckets[-1] = offset + nbytes
        pieces += 1
    numbers = [0] * len(buckets)
    return Layout(*_with_direct(entries, buckets, numbers, segments))


def _with_direct(
    entries: list[Entry], buckets: list[int], numbers: list[int], segments: Sequence[int]
) -> tuple[tuple[Entry, ...], tuple[int, ...], tuple[int, ...]]:
    """Give direct entries their buckets: of one segment each, of at most MAX_PIECES tensors."""
    places: dict[tuple, int] = {}  # range → its bucket
    last: dict[int, int] = {}  # segment → the bucket that still takes tensors
    counts: dict[int, int] = {}
    out = []
    for entry in entries:
        if entry.bucket >= 0:
            out.append(entry)
            continue
        segment = -1 - entry.bucket
        place = (segment, entry.offset, entry.shape, entry.dtype)
        if place not in places:
            bucket = last.get(segment, -1)
            if bucket < 0 or counts[bucket] == MAX_PIECES:
                bucket = last[segment] = len(buckets)
                buckets.append(segments[segment])
                numbers.append(1 + segment)
            counts[bucket] = counts.get(bucket, 0) + 1
            places[place] = bucket
        out.append(dataclasses.replace(entry, bucket=places[place]))
    return tuple(out), tuple(buckets), tuple(numbers)


def decode(data: bytes) -> Layout:
    """Read a manifest; the inverse of `Layout.encoded`.

    Raises
    ------
    ProtocolError
        Anything that `plan` would not have written: counts, ranges, alignment, overlaps, names.
    """
    reader = _Reader(data)
    magic, form, zero, n_buckets, n_tensors = reader.take(_HEAD)
    if magic != _MAGIC or form != _FORMAT or zero != 0:
        raise ProtocolError(
            f"manifest: magic {magic!r}, format {form}; wanted {_MAGIC!r}, {_FORMAT}"
        )
    if n_buckets > MAX_BUCKETS or n_tensors > MAX_TENSORS:
        raise ProtocolError(f"manifest: {n_buckets} buckets, {n_tensors} tensors")
    buckets = tuple(reader.sizes(n_buckets))
    segments = struct.unpack(f"<{n_buckets}I", reader.bytes(4 * n_buckets))
    if max(segments, default=0) > MAX_DIRECT or _mixed(segments):
        raise ProtocolError("manifest: staged buckets come first, direct ones name a segment")
    entries: list[Entry] = []
    names: set[str] = set()
    for _ in range(n_tensors):
        length, code, ndim, bucket, offset = reader.take(_ENTRY)
        if not 0 < length <= MAX_NAME or code >= len(DTYPES) or ndim > MAX_NDIM:
            raise ProtocolError(f"manifest: name length {length}, dtype {code}, ndim {ndim}")
        shape = tuple(reader.sizes(ndim))
        try:
            name = reader.bytes(length).decode()
        except UnicodeDecodeError as error:
            raise ProtocolError(f"manifest: {error}") from None
        if name in names:
            raise ProtocolError(f"manifest: {name!r} twice")
        names.add(name)
        spec = Spec(name, shape, DTYPES[code])
        entry = Entry(name, shape, spec.dtype, bucket, offset, spec.nbytes)
        _check_place(entry, buckets, segments)
        entries.append(entry)
    reader.finish()
    layout = Layout(tuple(entries), buckets, segments)
    _check_ranges(layout)
    return layout


def aligned(offset: int) -> int:
    """Where the next tensor may begin."""
    return (offset + ALIGN - 1) // ALIGN * ALIGN


def _mixed(segments: tuple[int, ...]) -> bool:
    """Whether a staged bucket comes after a direct one."""
    staged = segments.count(0)
    return any(segments[:staged])


def _check_place(entry: Entry, buckets: tuple[int, ...], segments: tuple[int, ...]) -> None:
    if entry.nbytes == 0:
        fits = entry.bucket == 0 and entry.offset == 0
    else:
        fits = (
            entry.bucket < len(buckets)
            and entry.offset % (entry.dtype.itemsize if segments[entry.bucket] else ALIGN) == 0
            and entry.offset + entry.nbytes <= buckets[entry.bucket]
        )
    if not fits:
        raise ProtocolError(
            f"manifest: {entry.name!r} of {entry.nbytes} bytes at {entry.offset} leaves bucket "
            f"{entry.bucket}"
        )


def _check_ranges(layout: Layout) -> None:
    """Ranges of a bucket are equal (an alias) or disjoint, and end where the bucket ends."""
    for bucket, pieces in enumerate(layout.pieces):
        if not 0 < len(pieces) <= MAX_PIECES:
            raise ProtocolError(f"manifest: bucket {bucket} has {len(pieces)} tensors")
        if layout.segments[bucket]:
            continue  # views of a trainer's memory may overlap, and need not fill it
        end = 0
        for index in pieces:
            entry = layout.entries[index]
            if entry.offset < end:
                raise ProtocolError(f"manifest: {entry.name!r} overlaps the tensor before it")
            end = entry.offset + entry.nbytes
        if end != layout.buckets[bucket]:
            raise ProtocolError(f"manifest: bucket {bucket} has a tail that no tensor owns")
    for pieces, members in zip(layout.pieces, layout.members, strict=True):
        for index, sharing in zip(pieces, members, strict=True):
            owner = layout.entries[index]
            for other in (layout.entries[i] for i in sharing):
                if (other.shape, other.dtype) != (owner.shape, owner.dtype):
                    raise ProtocolError(f"manifest: {other.name!r} is no alias of {owner.name!r}")


class _Reader:
    """Takes fields off the front of a byte string and never reads past its end."""

    def __init__(self, data: bytes):
        self._data = data
        self._at = 0

    def bytes(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise ProtocolError(f"manifest: ends at byte {len(self._data)}, wanted {end}")
        part = self._data[self._at : end]
        self._at = end
        return part

    def take(self, form: struct.Struct) -> tuple:
        return form.unpack(self.bytes(form.size))

    def sizes(self, count: int) -> tuple[int, ...]:
        values = struct.unpack(f"<{count}Q", self.bytes(8 * count))
        if any(value > MAX_BYTES for value in values):
            raise ProtocolError("manifest: a size of 2^63 or more")
        return values

    def finish(self) -> None:
        if self._at != len(self._data):
            raise ProtocolError(f"manifest: {len(self._data) - self._at} bytes after its end")
