"""What of a trainer's tensors may change without a new plan: the addresses, and nothing else."""

import pytest
import torch
from torch import nn

from pyrlk.weights import memory, packing, source


def parameter(data):
    return nn.Parameter(data, requires_grad=False)


def tensors():
    torch.manual_seed(0)
    a, b = torch.randn(4, 4), torch.randn(2, 8)
    return {"a": parameter(a), "b": parameter(b), "tied": parameter(b), "c": torch.ones(3)}


CHANGES = {
    "nothing": (lambda t: None, True),
    "another value": (lambda t: t["a"].data.add_(1), True),
    "another address": (lambda t: setattr(t["a"], "data", torch.zeros(4, 4)), True),
    "another object": (lambda t: t.update(a=parameter(torch.zeros(4, 4))), True),
    "a gradient": (lambda t: t["a"].requires_grad_(), True),
    "another shape": (lambda t: setattr(t["a"], "data", t["a"].data.view(2, 8)), False),
    "other strides": (lambda t: setattr(t["a"], "data", t["a"].data.t()), False),
    "in place, other strides": (lambda t: t["a"].data.t_(), True),  # of another tensor, .data
    "another dtype": (lambda t: setattr(t["a"], "data", t["a"].data.view(torch.int32)), False),
    "the other sign": (lambda t: setattr(t["a"], "data", torch._neg_view(t["a"].data)), False),
    "another class": (lambda t: t.update(a=torch.zeros(4, 4)), False),
    "sparse": (lambda t: t.update(c=torch.ones(3).to_sparse()), False),
    "no longer tied": (lambda t: setattr(t["b"], "data", torch.zeros(2, 8)), False),
    "newly tied": (lambda t: t.update(c=t["b"].data[0, :3]), False),
    "another name": (lambda t: t.update(d=t.pop("c")), False),
    "one less": (lambda t: t.pop("c"), False),
    "another order": (lambda t: t.update(a=t.pop("a")), False),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_is_kept_while_forms_and_owners_are_the_same(change, guarded, mode, monkeypatch):
    if not guarded:
        monkeypatch.setattr(source, "TensorGuards", None)
    named = tensors()
    noted = source.Table(named)
    noted.note()
    alter, kept = CHANGES[change]
    alter(named)
    with mode():
        assert source.Table(named).fits(noted) == kept


def test_torch_has_the_guards_that_make_it_fast():
    # Private to torch: without them an update of thousands of tensors takes twice the time.
    assert source.TensorGuards is not None


def test_nothing_that_was_noted_is_kept_alive():
    import weakref

    named = tensors()
    noted = source.Table(named)
    noted.note()
    noted.forget_tensors()
    alive = [weakref.ref(t) for t in named.values()]
    named.clear()
    assert [ref() for ref in alive] == [None] * 4


def test_a_place_that_no_longer_holds_needs_another_plan(monkeypatch):
    """Memory that an engine could read was found once; it is looked for again when it may move."""
    model = nn.Linear(8, 8)
    memory.share(model)
    named = dict(model.named_parameters())
    looked = []
    find = memory.Exports.find
    monkeypatch.setattr(
        memory.Exports, "find", lambda self, t: looked.append(t.shape) or find(self, t)
    )
    plan = packing.TensorPlan(source.Source(named), 1 << 20, True)
    assert len(plan.segments) == 1
    looked.clear()
    assert plan.fits(source.Source(named), True)
    assert looked == []
    model.weight.data = torch.zeros(8, 8)  # out of the shared memory
    assert not plan.fits(source.Source(named), True)
    assert len(looked) == 2
