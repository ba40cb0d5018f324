"""One function an engine: build the model of `options.size` and return `step(tokens, targets) -> loss`.

All train the same model with AdamW on fp32 weights; compute and gathered weights are `options.dtype`.
"""

import importlib.util
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from model import SIZES, Config, Decoder, rotations

Step = Callable[[Tensor, Tensor], Tensor]
LEARNING_RATE = 1e-6  # so small that batches which come again are not learnt by heart: losses would part by rounding


def floor(options: Namespace, device: torch.device) -> Step:
    """What the compute alone takes: the weights of one block used for every layer, no communication, no optimizer."""
    c = SIZES[options.size]
    with device:
        model = Decoder(Config(1, c.dim, c.heads, c.hidden, c.vocab)).to(options.dtype)
    model.apply(model._init_weights)
    prepare_blocks(model, options)
    block = model.blocks[0]

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        x = model.embed(tokens)
        cos, sin = rotations(tokens.shape[1], c.dim // c.heads, x)
        for _ in range(c.layers):
            x = block(x, cos, sin)
        loss = model.loss(x, targets)
        loss.backward()
        model.zero_grad()
        return loss.detach()

    return step


def fsdp2(options: Namespace, device: torch.device, reduce_dtype: torch.dtype = torch.float32) -> Step:
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    with torch.device("meta"):
        model = Decoder(SIZES[options.size])
    prepare_blocks(model, options)
    policy = MixedPrecisionPolicy(param_dtype=options.dtype, reduce_dtype=reduce_dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    with torch.no_grad():
        for module in model.modules():
            whole = model.first_weight(module, device)
            if whole is not None:
                parts, own = whole.chunk(dist.get_world_size()), module.weight.to_local()
                own.copy_(parts[dist.get_rank()] if dist.get_rank() < len(parts) else own)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = model(tokens, targets)
        loss.backward()
        if options.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def deepspeed(options: Namespace, device: torch.device) -> Step:
    import deepspeed

    c = SIZES[options.size]
    deepspeed.init_distributed()
    settings = {
        "train_micro_batch_size_per_gpu": options.batch,
        "bf16": {"enabled": options.dtype is torch.bfloat16},
        "gradient_clipping": options.clip,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": 4 * c.dim**2,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 10 * c.dim,
        },
    }
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = Decoder(c)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own:
            with deepspeed.zero.GatheredParameters(own, modifier_rank=0):
                model._init_weights(module)
    prepare_blocks(model, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def prepare_blocks(model: Decoder, options: Namespace) -> None:
    """Compile every block and recompute it in backward, where the options say so."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for i, block in enumerate(model.blocks):
        if options.compile:
            block.compile()
        if options.recompute == "full":
            model.blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False)


def bmtrain(options: Namespace, device: torch.device, rests_in_fp32: bool = False, offloads: bool = False) -> Step:
    import bmtrain as bmt

    # Either a model in options.dtype with fp32 masters, or an fp32 model that is gathered in options.dtype.
    bmt.init_distributed(seed=0, precision=options.dtype if rests_in_fp32 else None)
    with torch.device("meta"):
        model = Decoder(SIZES[options.size]).to(torch.float32 if rests_in_fp32 else options.dtype)
    model = bmt.BMTrainModelWrapper(model)
    for block in model.blocks:
        bmt.Block(block, use_checkpoint={"full": True, "none": False, "auto": None}[options.recompute])
    if options.compile:
        model = bmt.compile(model)
    adam = bmt.optim.AdamOffloadOptimizer if offloads else bmt.optim.AdamOptimizer
    optimizer = adam(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(optimizer)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = model(tokens, targets)
        manager.backward(loss)
        if options.clip:
            manager.clip_grad_norm(optimizer.param_groups, options.clip)
        manager.step()
        manager.zero_grad()
        return loss.detach()

    return step


ENGINES: dict[str, Callable[[Namespace, torch.device], Step]] = {
    "floor": floor,
    "bmtrain": bmtrain,
    "bmtrain-fp32-model": partial(bmtrain, rests_in_fp32=True),
    "bmtrain-offload": partial(bmtrain, offloads=True),
    "fsdp2": fsdp2,
    "fsdp2-bf16-reduce": partial(fsdp2, reduce_dtype=torch.bfloat16),
    "deepspeed": deepspeed,
}


def why_not(engine: str, device: str) -> str | None:
    """Why `engine` cannot run here, or None."""
    if engine == "deepspeed":
        if importlib.util.find_spec("deepspeed") is None:
            return "not measured: DeepSpeed is not installed here (pip install deepspeed)"
        if device == "cpu":
            return "not measured: DeepSpeed is compared on GPUs only"
    return None
