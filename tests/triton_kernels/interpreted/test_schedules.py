"""Every schedule gives the bits of every other, and reads no row more often than it says."""

import mmap

import pytest
import schedules as cases
import torch
import triton
from triton.runtime import interpreter

from pyrlk.triton_kernels import policy_loss, row, schedule
from pyrlk.triton_kernels.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def neighbours(monkeypatch):
    """Lets programs that wait for each other run one after another: the same launch, twice.

    In the first every program finds what the later ones have not yet written; the second gives the
    same statistics again, and nobody has to wait for them.
    """

    @triton.jit
    def meet(arrived_ptr, row, parts):
        pass

    def run(b, terms, *, inplace=False):
        room = schedule.empty_exchange(b.logits)
        with monkeypatch.context() as patch:
            patch.setattr(policy_loss, "meet", meet)
            patch.setattr(schedule, "empty_exchange", lambda _: room)
            # Room for four rows at once: programs come back for the rest.
            alone = Schedule("cooperative", 4 * row.parts(b.logits.shape[-1]))
            cases.learn(b, terms, alone)
            return cases.learn(b, terms, alone, inplace=inplace)

    return run


# Small tiles make rows of five groups: the last a part of a tile, whole, and beside padding; the
# loss takes seconds a case, and dtype and place are independent of the length.
SMALL = [
    (1100, None, torch.float32, False),
    (1280, None, torch.float16, True),
    (1025, 1296, torch.float32, True),
    (1000, 1280, torch.float16, False),
]


@pytest.mark.parametrize(("vocab", "width", "dtype", "inplace"), SMALL)
def test_schedules_have_the_same_bits(small_tiles, neighbours, vocab, width, dtype, inplace):
    compare(neighbours, cases.batch(vocab, dtype, width=width), "dapo+k3+entropy", inplace)


def test_schedules_have_the_same_bits_on_real_tiles(neighbours):
    compare(neighbours, cases.batch(20000, torch.float16), "dapo", inplace=True)


# A column, two, a tile and around it, two groups.
@pytest.mark.parametrize("vocab", [1, 2, 4095, 4096, 4097, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_split_scores_have_the_same_bits(vocab, dtype):
    b = cases.batch(vocab, dtype)
    cases.assert_same_bits(cases.score(b, Schedule("rows")), cases.score(b, Schedule("split")))


def compare(neighbours, b, name, inplace):
    terms = cases.TERMS[name]
    rows = cases.learn(b, terms, Schedule("rows", 0))
    cases.assert_sound(rows)
    # Three programs that come back for more rows.
    cases.assert_same_bits(rows, cases.learn(b, terms, Schedule("rows", 3), inplace=inplace))
    cases.assert_same_bits(rows, cases.learn(b, terms, Schedule("split"), inplace=inplace))
    cases.assert_same_bits(rows, neighbours(b, terms, inplace=inplace))


def test_the_gradient_of_reinforce_has_the_same_bits_too(small_tiles):
    b = cases.batch(1100, torch.float32)
    outs = [torch.full_like(b.logits, cases.NAN) for _ in range(2)]
    for out, kind in zip(outs, ("rows", "split"), strict=True):
        policy_loss.reinforce_grad(b.logits, b.tokens, b.weight, 0.8, out, Schedule(kind))
    torch.testing.assert_close(*outs, rtol=0, atol=0, equal_nan=True)
    assert (outs[0].reshape(cases.ROWS, -1)[0] != 0).any()


@pytest.fixture
def reads(monkeypatch):
    """How often each element of a tensor of logits is loaded, by a function of that tensor."""
    load = interpreter.InterpreterBuilder.create_masked_load
    addresses = []

    def create_masked_load(self, ptrs, mask, *rest):
        addresses.append(torch.from_numpy(ptrs.data[mask.data].astype("int64").reshape(-1)))
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", create_masked_load)

    def count(x):
        size = x.untyped_storage().nbytes() // x.element_size()
        at = (torch.cat(addresses) - x.untyped_storage().data_ptr()) // x.element_size()
        at = at[(at >= 0) & (at < size)]
        counts = torch.zeros(size, dtype=torch.int64).index_add_(0, at, torch.ones_like(at))
        return counts.as_strided(x.shape, x.stride(), x.storage_offset()).reshape(cases.ROWS, -1)

    return count


@pytest.mark.parametrize("kind", ["rows", "split"])
def test_masked_rows_are_not_read_and_still_rows_are_read_once(small_tiles, reads, kind):
    b = cases.batch(1100, torch.float32)
    out = cases.learn(b, cases.TERMS["dapo"], Schedule(kind))
    # Columns of no action: z_a itself is read on its own.
    column = next(i for i in range(1100) if i not in b.tokens.tolist())
    counts = reads(b.logits)[:, column]
    assert (counts[cases.MASKED] == 0).all()
    assert (counts[cases.STILL] == 1).all()
    assert (out.grad.reshape(cases.ROWS, -1)[cases.STILL] == 0).all()
    assert counts[0] == 2


@pytest.mark.parametrize("parts", [1, 10])
def test_few_rows_are_split_and_many_are_not(parts):
    kinds = [schedule.choose(rows, parts, 132).kind for rows in (1, 16, 66, 67, 8192)]
    few = "split" if parts > 1 else "rows"
    assert kinds == [few, few, few, "rows", "rows"]


def test_programs_of_a_launch(monkeypatch):
    monkeypatch.setattr(schedule, "processors", lambda _: 132)
    x = torch.empty(0)
    assert schedule.programs(Schedule("rows"), 8192, 1, x) == 264
    assert schedule.programs(Schedule("rows"), 100, 1, x) == 100
    assert schedule.programs(Schedule("rows", 0), 8192, 1, x) == 8192
    assert schedule.programs(Schedule("split"), 3, 10, x) == 30
    # All programs of a row run at once, or none of them may start.
    assert schedule.programs(Schedule("cooperative", 2), 8192, 10, x) == 260
    assert schedule.programs(Schedule("cooperative", 2), 8192, 7, x) == 259
    assert schedule.programs(Schedule("cooperative"), 8192, 10, x) == 260
    assert schedule.programs(Schedule("cooperative", 1), 8192, 10, x) == 130
    assert schedule.programs(Schedule("cooperative"), 3, 10, x) == 30
    with pytest.raises(ValueError, match="133 groups, 132 programs"):
        schedule.programs(Schedule("cooperative", 1), 8192, 133, x)
    assert [schedule.registers(Schedule("rows", n)) for n in (0, 1, 2, 3)] == [128, 255, 128, 80]


@pytest.mark.parametrize("kind", ["rows", "split"])
def test_rows_lie_beyond_2_31_elements(small_tiles, kind):
    # 12 GB of address space, of which three rows are touched.
    stride, columns = 2**31 + 8, 300
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, (2 * stride + columns) * 2, flags=flags)
    except OSError:
        pytest.skip("this system reserves memory that is mapped")
    logits = torch.frombuffer(memory, dtype=torch.float16).as_strided((3, columns), (stride, 1))
    logits.copy_(torch.randn(3, columns, generator=torch.Generator().manual_seed(0)))
    tokens, advantages = torch.tensor([3, 5, 299]), torch.tensor([1.0, 2.0, -1.0])
    truth = torch.empty(3, columns, dtype=torch.float16)
    policy_loss.reinforce_grad(
        logits.contiguous(), tokens, advantages, 1.0, truth, Schedule("rows")
    )
    policy_loss.reinforce_grad(logits, tokens, advantages, 1.0, logits, Schedule(kind))
    assert torch.equal(logits, truth)
