import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrlk.weights import ProtocolError, layout
from pyrlk.weights.layout import Spec

# Ranks 0 to 3 with empty dimensions, every dtype, aliases of an earlier tensor.
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
TENSORS = st.lists(st.tuples(SHAPES, st.sampled_from(layout.DTYPES), st.booleans()), max_size=30)


def specs_of(tensors) -> list[Spec]:
    specs: list[Spec] = []
    for k, (shape, dtype, tied) in enumerate(tensors):
        if tied and specs and specs[-1].nbytes:
            owner = len(specs) - 1 if specs[-1].alias is None else specs[-1].alias
            specs.append(Spec(f"t{k}", specs[owner].shape, specs[owner].dtype, owner))
        else:
            specs.append(Spec(f"t{k}", shape, dtype))
    return specs


@given(TENSORS, st.integers(1, 4000))
@settings(max_examples=150, deadline=None)
def test_every_tensor_has_an_aligned_range_of_its_own(tensors, bucket_bytes):
    specs = specs_of(tensors)
    plan = layout.plan(specs, bucket_bytes)
    assert [(e.name, e.shape, e.dtype) for e in plan.entries] == [
        (s.name, s.shape, s.dtype) for s in specs
    ]
    for bucket, pieces in enumerate(plan.pieces):
        end = 0
        for index in pieces:
            entry = plan.entries[index]
            assert entry.bucket == bucket
            assert entry.offset % layout.ALIGN == 0
            assert entry.offset >= end
            end = entry.offset + entry.nbytes
        assert end == plan.buckets[bucket]
        # Only a tensor that is alone may be larger than a bucket.
        assert end <= bucket_bytes or len(pieces) == 1
    for spec, entry in zip(specs, plan.entries, strict=True):
        if spec.alias is not None:
            owner = plan.entries[spec.alias]
            assert (entry.bucket, entry.offset) == (owner.bucket, owner.offset)
    assert plan.nbytes == sum(s.nbytes for s in specs if s.alias is None)
    assert plan.peak_bytes(2) == max(plan.buckets, default=0) * min(2, len(plan.buckets))


@given(TENSORS, st.integers(1, 4000))
@settings(max_examples=100, deadline=None)
def test_a_manifest_reads_back_as_it_was_written(tensors, bucket_bytes):
    plan = layout.plan(specs_of(tensors), bucket_bytes)
    again = layout.decode(plan.encoded)
    assert again == plan
    assert again.digest == plan.digest
    assert again.pieces == plan.pieces


@given(TENSORS, st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_manifest_is_refused_or_means_what_it_says(tensors, data):
    good = layout.plan(specs_of(tensors), 1000).encoded
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(bad) - 1))
        bad[at] ^= data.draw(st.integers(1, 255))
    cut = bytes(bad[: data.draw(st.integers(0, len(bad)))])
    for damaged in (bytes(bad), cut, good + b"\0"):
        try:
            read = layout.decode(damaged)
        except ProtocolError:
            continue
        assert read.encoded == damaged  # the digest of the BEGIN frame tells it from the good one


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_noise_is_no_manifest(data):
    with pytest.raises(ProtocolError):
        layout.decode(data)


def test_huge_counts_are_refused_before_anything_is_allocated():
    head = layout._HEAD.pack(b"PRLM", 2, 0, 0, 1)
    entry = layout._ENTRY.pack(1, 8, 3, 0, 0)
    sizes = (1 << 62).to_bytes(8, "little") * 3
    with pytest.raises(ProtocolError, match="leaves bucket"):
        layout.decode(head + entry + sizes + b"x")
    with pytest.raises(ProtocolError, match="ends at byte"):
        layout.decode(layout._HEAD.pack(b"PRLM", 2, 0, 0, 1 << 20))
    with pytest.raises(ProtocolError, match="tensors"):
        layout.decode(layout._HEAD.pack(b"PRLM", 2, 0, 0, 0xFFFFFFFF))


def test_overlapping_tensors_are_refused():
    plan = layout.plan([Spec("a", (100,), torch.float32), Spec("b", (100,), torch.float32)], 4096)
    first, second = plan.entries
    moved = layout.Entry("b", (100,), torch.float32, 0, 256, 400)
    with pytest.raises(ProtocolError, match="overlaps"):
        layout.decode(layout.Layout((first, moved), (656,), (0,)).encoded)
    other = layout.Entry("b", (100,), torch.int32, 0, 0, 400)
    with pytest.raises(ProtocolError, match="alias"):
        layout.decode(layout.Layout((first, other), (400,), (0,)).encoded)
    assert second.offset == 512


def test_a_bucket_never_holds_more_sums_than_a_frame():
    specs = [Spec(f"t{k}", (1,), torch.float32) for k in range(layout.MAX_PIECES + 1)]
    plan = layout.plan(specs, 1 << 40)
    assert [len(pieces) for pieces in plan.pieces] == [layout.MAX_PIECES, 1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec("", (1,), torch.float32), "a name has 1 to 1024 bytes"),
        (Spec("x" * 1025, (1,), torch.float32), "a name has 1 to 1024 bytes"),
        (Spec("x", (1,) * 17, torch.float32), "beyond limits"),
        (Spec("x", (1 << 40, 1 << 40), torch.float32), "beyond limits"),
    ],
)
def test_what_a_manifest_cannot_hold_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        layout.plan([spec], 1 << 20)
