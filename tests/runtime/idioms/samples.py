"""One idiom for each verdict: what ``verdicts`` must tell apart.  No theme of the table."""

from __future__ import annotations

import warnings

import torch
from torch.nn import functional as F

import bmtrain as bmt
from bmtrain.errors import ConfigurationError

from .registry import idiom
from .user import User


@idiom
def right(k: User):
    """Trains"""
    model = k.net()
    return k.train(model, k.sgd(model))


@idiom
def other_numbers(k: User):
    """Gives another number on the last rank"""
    return {"number": 1.0 + 1e-2 * k.sharded * (k.rank == k.ranks - 1)}


@idiom(verdicts="said", says="divide by")
def other_numbers_with_a_warning(k: User):
    """Gives another number and says so"""
    if k.sharded:
        warnings.warn("This is a mean of means; divide by the whole count.", stacklevel=1)
    return {"number": 1.0 + 0.1 * k.sharded}


@idiom
def not_a_number(k: User):
    """Gives NaN"""
    return {"tensor": torch.tensor([1.0, float("nan") if k.sharded else 1.0])}


@idiom
def other_names(k: User):
    """Misses a value"""
    return {"a": 1.0} if k.sharded else {"a": 1.0, "b": 2.0}


@idiom
def raises(k: User):
    """Another error"""
    if k.sharded:
        raise RuntimeError("not one of ours")
    return {}


@idiom
def raises_as_torch_does(k: User):
    """An error that plain torch raises too"""
    return {"out": torch.zeros(2) @ torch.zeros(3)}


@idiom
def raises_on_one_rank(k: User):
    """One of ours, but on the last rank alone"""
    if k.sharded and k.rank == k.ranks - 1:
        raise ConfigurationError("Do something else.")
    return {}


@idiom(verdicts="refused", says="something else")
def refuses(k: User):
    """One of ours on all ranks"""
    if k.sharded:
        raise ConfigurationError("Do something else.")
    return {}


@idiom(verdicts="refused", says="a way out")
def refuses_without_a_way_out(k: User):
    """One of ours that does not say what it should"""
    if k.sharded:
        raise ConfigurationError("No.")
    return {}


@idiom(verdicts="refused", says="something else")
def refuses_too_late(k: User):
    """One of ours after weights were changed"""
    model = k.net()
    with k.gathered(model, write=True):
        model.head.bias.data.fill_(3.0)
    if k.sharded:
        raise ConfigurationError("Do something else.")
    return {}


@idiom
def waits_for_ever(k: User):
    """A collective that one rank does not enter"""
    if k.sharded and k.rank == 0:
        bmt.synchronize()
    return {}


@idiom
def dies(k: User):
    """A rank ends"""
    import os

    if k.sharded and k.rank == k.ranks - 1:
        os._exit(3)
    return {}


@idiom
def right_after_all(k: User):
    """Trains, on ranks that the ones before have ended"""
    model = k.net()
    x, y = k.batch()
    k.step(k.sgd(model), F.cross_entropy(model(x), y))
    return model
