"""State dicts, files, copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from .registry import idiom
from .user import Net, User


def _stored(value):
    """Through a file and back."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=False)


def _other_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(77)
    return Net().state_dict()


@idiom
def into_plain_torch(k: User):
    """What was trained loads into a model of plain torch and gives the same outputs"""
    model = k.net()
    k.train(model, k.sgd(model))
    plain = Net()
    plain.load_state_dict(k.stored(model.state_dict()))
    x = k.randn(12, 6, seed=5).cpu()
    return {"out": plain(x)}


@idiom
def loaded(k: User):
    """`load_state_dict` of a pretrained file, then training"""
    model = k.net()
    model.load_state_dict(_stored(_other_weights()))
    return k.train(model, k.sgd(model))


@idiom
def what_fits_is_copied(k: User):
    """`own = model.state_dict(); own[name].copy_(value)`, as transformers and timm once did"""
    model, own = k.net(), None
    own = model.state_dict()
    for name, value in _other_weights().items():
        if name in own and not name.startswith("head"):
            own[name].copy_(value)
    return model


@idiom
def what_fits_is_updated(k: User):
    """`own.update(...)`, then `load_state_dict(own)`"""
    model = k.net()
    own = model.state_dict()
    own.update({n: v for n, v in _other_weights().items() if n in own and v.shape == own[n].shape and "head" not in n})
    model.load_state_dict(own)
    return model


@idiom
def what_fits_by_named_parameters(k: User):
    """`p.data.copy_(state[name])` over `named_parameters()`"""
    model, state = k.net(), _other_weights()
    for name, p in model.named_parameters():
        if name in state:
            p.data.copy_(state[name])
    return k.train(model, k.sgd(model))


@idiom
def copied_under_no_grad(k: User):
    """`p.copy_(state[name])` under `no_grad`"""
    model, state = k.net(), _other_weights()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(state[name].to(p.device))
    return model


@idiom
def state_dict_scaled_in_place(k: User):
    """`model.state_dict()[name].mul_(2)`"""
    model = k.net()
    for name, value in model.state_dict().items():
        if "norm" not in name:
            value.mul_(2)
    return model


@idiom(verdicts="said", says="values of then")
def state_dict_follows(k: User):
    """A state dict taken before training shows the weights after it"""
    model = k.net()
    state = model.state_dict()
    k.train(model, k.sgd(model))
    return {"kept": {n: v.clone() for n, v in state.items()}}


@idiom
def not_strict(k: User):
    """`strict=False` with keys missing and too many, which are printed"""
    model, state = k.net(), _other_weights()
    del state["head.weight"]
    state["extra"] = torch.zeros(1)
    result = model.load_state_dict(state, strict=False)
    return {"missing": result.missing_keys, "unexpected": result.unexpected_keys, "weights": k.weights(model)}


@idiom
def another_shape_is_caught(k: User):
    """A head of another size: the error is caught and what fits is loaded"""
    model, state = k.net(), _other_weights()
    state["head.weight"] = torch.zeros(9, 8)
    try:
        model.load_state_dict(state)
    except RuntimeError:
        state.pop("head.weight")
        model.load_state_dict(state, strict=False)
    return model


@idiom
def prefixes_are_stripped(k: User):
    """Keys of DataParallel: `module.` is removed"""
    model = k.net()
    state = {f"module.{n}": v for n, v in _other_weights().items()}
    model.load_state_dict(OrderedDict((n.replace("module.", ""), v) for n, v in state.items()))
    return model


@idiom
def one_part_is_loaded(k: User):
    """`model.layers.load_state_dict` with the keys of a prefix"""
    model, state = k.net(), _other_weights()
    model.layers.load_state_dict({n[len("layers.") :]: v for n, v in state.items() if n.startswith("layers.")})
    return model


@idiom
def from_another_model(k: User):
    """`model.load_state_dict(other.state_dict())`"""
    model, other = k.net(), k.net()
    k.train(other, k.sgd(other))
    model.load_state_dict(other.state_dict())
    return k.train(model, k.sgd(model))


@idiom
def loaded_with_assign(k: User):
    """`load_state_dict(assign=True)`"""
    model = k.net()
    model.load_state_dict({n: v.to(k.device) for n, v in _other_weights().items()}, assign=True)
    return k.train(model, k.sgd(model))


@idiom
def state_with_variables(k: User):
    """`state_dict(keep_vars=True)`: names, shapes and what trains"""
    model = k.net()
    model.enter.requires_grad_(False)
    state = model.state_dict(keep_vars=True)
    return {"seen": [(n, str(tuple(v.shape)), v.requires_grad) for n, v in state.items()]}


@idiom
def state_of_a_part(k: User):
    """`model.head.state_dict()` is saved alone"""
    model = k.net()
    k.train(model, k.sgd(model))
    return {"head": k.stored(model.head.state_dict()), "layer": k.stored(model.layers[0].state_dict())}


@idiom
def trainable_parameters_are_saved(k: User):
    """`{n: p for n, p in model.named_parameters() if p.requires_grad}` is saved"""
    model = k.net()
    model.enter.requires_grad_(False)
    k.train(model, k.sgd([p for p in model.parameters() if p.requires_grad]))
    with k.gathered(model):
        return {"saved": k.stored({n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad})}


@idiom
def saved_as_halves(k: User):
    """The state is saved in half precision, `{n: v.half()}`"""
    model = k.net()
    k.train(model, k.sgd(model))
    return {"saved": k.stored({n: v.half() for n, v in model.state_dict().items()})}


@idiom(tolerance=1e-3)
def resumed(k: User):
    """Model and optimizer are saved, and training goes on in new ones"""
    model = k.net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-4)
    k.train(model, k.manage(optimizer), steps=2)
    saved = k.stored({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 2})
    model = k.net()
    model.load_state_dict(saved["model"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5, eps=1e-4)
    manager = k.manage(optimizer)
    optimizer.load_state_dict(saved["optimizer"])
    return k.train(model, manager, steps=2)


@idiom(tolerance=1e-3)
def resumed_with_adamw(k: User):
    """The same with the converted AdamW"""
    model = k.net()
    optimizer = k.adam(model.parameters())
    k.train(model, k.manage(optimizer), steps=2)
    saved = k.stored({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    model = k.net()
    model.load_state_dict(saved["model"])
    optimizer = k.adam(model.parameters(), lr=0.5)
    optimizer.load_state_dict(saved["optimizer"])
    return k.train(model, k.manage(optimizer), steps=2)


@idiom
def model_is_copied(k: User):
    """`copy.deepcopy(model)` trains apart from the first"""
    model = k.net()
    other = copy.deepcopy(model)
    k.train(other, k.sgd(other))
    return {"first": k.weights(model), "other": k.weights(other)}


@idiom
def copied_in_the_middle(k: User):
    """`copy.deepcopy(model)` between two steps, evaluated"""
    model = k.net()
    manager = k.sgd(model)
    k.train(model, manager, steps=2)
    kept = copy.deepcopy(model).eval()
    k.train(model, manager, steps=2)
    x, _ = k.batch()
    return {"out": k.gather(kept(x)), "weights": k.weights(model)}


@idiom
def block_is_copied(k: User):
    """`copy.deepcopy(model.layers[0])` is a module of its own"""
    model = k.net()
    layer = copy.deepcopy(model.layers[0])
    x = k.share(k.randn(12, 8))
    return {"out": k.gather(layer(x)), "weights": k.weights(layer)}


@idiom
def model_is_saved_by_the_library(k: User):
    """`torch.save(model, path)`, converted, read back, trained on"""
    model = k.net()
    k.train(model, k.sgd(model))
    again = k.shard(k.stored(model).to(k.device))
    return k.train(again, k.sgd(again))


@idiom(verdicts="refused", says="bmt.save_checkpoint")
def model_is_pickled(k: User):
    """`pickle.dumps(model)` and back"""
    model = k.net()
    k.train(model, k.sgd(model))
    again = pickle.loads(pickle.dumps(model))
    return {"weights": k.weights(again)}


@idiom(verdicts="refused", says="bmt.save_checkpoint")
def model_is_saved_whole(k: User):
    """`torch.save(model)`, read back, trained on"""
    model = k.net()
    k.train(model, k.sgd(model))
    again = k.shard(_stored(model).to(k.device))
    return k.train(again, k.sgd(again))


@idiom(verdicts="right refused refused", says="full_tensor")
def part_is_saved_by_torch(k: User):
    """`torch.save(model.head.state_dict())` itself, unconverted"""
    model = k.net()
    return {"head": _stored(model.head.state_dict())}


@idiom
def weights_as_numpy(k: User):
    """Sums of `v.cpu().numpy()` over the state dict"""
    model = k.net()
    k.train(model, k.sgd(model))
    return {"sums": {n: float(v.cpu().numpy().sum()) for n, v in model.state_dict().items()}}


@idiom
def counted(k: User):
    """Counts of parameters, trainable ones and bytes; names of modules"""
    model = k.net()
    model.enter.requires_grad_(False)
    return {
        "all": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "modules": [n for n, _ in model.named_modules()],
        "names": [n for n, _ in model.named_parameters()],
        "kinds": [type(m).__name__ for m in model.modules() if not isinstance(m, nn.ModuleList)],
    }


@idiom
def compared(k: User):
    """Two models' weights are compared with `torch.equal` over state dicts"""
    model, other = k.net(), k.net()
    other.load_state_dict(model.state_dict())
    seen = [
        all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    ]
    k.train(model, k.sgd(model))
    seen.append(any(torch.equal(model.state_dict()[n], other.state_dict()[n]) for n in other.state_dict()))
    return {"seen": seen}


@idiom
def extra_state(k: User):
    """A module with `get_extra_state`, and a hook that renames keys"""

    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

        def get_extra_state(self):
            return {"calls": self.calls}

        def set_extra_state(self, state):
            self.calls = state["calls"]

    model = k.shard(nn.Sequential(Counting(6, 8), nn.Tanh(), nn.Linear(8, 5)))
    k.train(model, k.sgd(model))
    state = copy.deepcopy(model.state_dict())
    again = k.shard(nn.Sequential(Counting(6, 8), nn.Tanh(), nn.Linear(8, 5)))
    again.load_state_dict(state)
    return {"calls": again[0].calls, "weights": k.weights(again)}


@idiom
def keys_are_renamed_by_a_hook(k: User):
    """`register_load_state_dict_pre_hook` renames old keys"""
    model = k.net()

    def rename(module, state, prefix, *_):
        for name in list(state):
            if name.startswith("blocks."):
                state[name.replace("blocks.", "layers.")] = state.pop(name)

    model.register_load_state_dict_pre_hook(rename)
    model.load_state_dict({n.replace("layers.", "blocks."): v for n, v in _other_weights().items()})
    return model


@idiom
def buffers_are_saved(k: User):
    """Statistics of a batch norm in the state dict, loaded elsewhere"""
    model = k.shard(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5)).eval())
    state = model.state_dict()
    state["0.running_mean"] = torch.linspace(-1, 1, 6)
    model.load_state_dict(state)
    x, y = k.batch()
    return {"out": k.gather(model(x)), "loss": k.mean(F.cross_entropy(model(x), y)), "state": k.weights(model)}


@idiom(verdicts="right said said", says="optimizer.state_dict()")
def optimizers_state_dict_is_kept_over_a_step(k: User):
    """`state = optimizer.state_dict()`, a step, and `state` is read: torch shows the moments of now"""
    model = k.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    manager = k.manage(optimizer)
    k.train(model, manager, steps=1)
    state = optimizer.state_dict()
    k.train(model, manager, steps=2)
    return {"moments": {str(number): one["momentum_buffer"] for number, one in state["state"].items()}}


@idiom
def optimizers_state_dict_is_written_to(k: User):
    """`optimizer.state_dict()["state"][n]["exp_avg"].mul_(0.5)`: the optimizer's own moments"""
    model = k.net()
    optimizer = k.adam(model.parameters())
    manager = k.manage(optimizer)
    k.train(model, manager)
    for one in optimizer.state_dict()["state"].values():
        one["exp_avg"].mul_(0.5)
    return k.train(model, manager)


@idiom
def model_and_muon_are_copied(k: User):
    """`copy.deepcopy((model, optimizer))` of Muon, whose states are on one rank each; both go on"""
    model = k.net()
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=1e-2)
    manager = k.manage(optimizer)
    k.train(model, manager)
    other, again = copy.deepcopy((model, optimizer))
    k.train(other, k.manage(again), steps=1)
    return {
        "kept": [one["momentum_buffer"].shape for one in optimizer.state_dict()["state"].values()],
        "moments": [float(one["momentum_buffer"].norm()) for one in again.state_dict()["state"].values()],
    }


@idiom
def state_of_a_parameter_is_a_dict(k: User):
    """`isinstance(optimizer.state[p], dict)`, `{**optimizer.state[p]}`, and a walk over all of it"""
    model = k.net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    k.train(model, k.manage(optimizer))

    def walk(value):
        if isinstance(value, dict):
            return {str(key): walk(one) for key, one in {**value}.items() if isinstance(key, str)}
        return float(value.abs().sum())

    return {"state": [walk(optimizer.state[p]) for p in model.parameters()]}
