"""Two processes (gloo) against one: DistributedDataParallel, FSDP2 and DTensor parameters."""

import os
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from tests.ops import assert_same_bits
from tritonshare import launch, optim
from tritonshare.optim.verify import RULES

pytestmark = [pytest.mark.reference, pytest.mark.interpreter]
STEPS = 3
TWO = ("momentum", "Adam")
PLACEMENTS = ("rows", "columns", "all")
REFUSED = [
    ({"max_norm": 1.0}, "rows", "max_norm"),
    ({"similarity": "tensor"}, "rows", "similarity='tensor'"),
    ({"similarity": "row"}, "columns", "whole rows"),
]


def _begin(rank, rendezvous, results):
    """The body of a process: the answers to all jobs, or what went wrong with them."""
    torch.set_num_threads(1)
    wait = timedelta(days=1)  # for the other process, however busy the machine is
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=wait)
    answers = []
    for job, *args in JOBS:
        try:
            answers.append(job(rank, *args))
        except Exception:
            answers.append(traceback.format_exc())
    torch.save(answers, f"{results}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Of the two processes, by job: they are started once, since that takes longer than all that they do."""
    folder = tmp_path_factory.mktemp("processes")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(_begin, (folder / "rendezvous", folder / "answers"), nprocs=2)
    both = [torch.load(folder / f"answers.{rank}", weights_only=True) for rank in range(2)]
    return list(zip(*both, strict=True))


def of_job(answers, *job):
    found = answers[JOBS.index(job)]
    for answer in found:
        assert not (isinstance(answer, str) and answer.startswith("Traceback")), answer
    return found


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def batch(step):
    """Integers, so that a mean over two halves is that over all in any order."""
    return torch.randint(-2, 3, (8, 4), generator=torch.Generator().manual_seed(step)).float()


def made(rule, parameters, **more):
    cls, options = RULES[rule]
    return cls(parameters, **options, **more)


def one_process(rule, **more):
    model = network()
    optimizer = made(rule, model.parameters(), **more)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def _ddp(rank, rule, attributes):
    model = network()
    parallel = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=attributes)
    optimizer = made(rule, parallel.parameters(), max_norm=0.5)
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=not attributes)
        parallel(batch(step).chunk(2)[rank]).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("views", [False, True], ids=["", "bucket_views"])
@pytest.mark.parametrize("rule", TWO)
def test_ddp(answers, rule, views):
    first, second = of_job(answers, _ddp, rule, views)
    assert_same_bits(zip(first, second, strict=True))
    for found, expected in zip(first, one_process(rule, max_norm=0.5), strict=True):
        torch.testing.assert_close(found, expected)


def _whole(state):
    """A state of plain tensors."""
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}


def _fsdp(rank, rule, similarity):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = made(rule, model.parameters(), similarity=similarity)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step).chunk(2)[rank]).square().mean().backward()
        optimizer.step()
        if step == 0:  # through a checkpoint
            saved = optimizer.state_dict()
            optimizer = made(rule, model.parameters(), similarity=similarity)
            optimizer.load_state_dict(saved)
    states = [_whole(optimizer.state[p]) for p in model.parameters() if p in optimizer.state]
    shapes = [list(p.to_local().shape) for p in model.parameters()]
    return [p.full_tensor().detach() for p in model.parameters()], states, shapes


@pytest.mark.parametrize("similarity", [None, "row"])
@pytest.mark.parametrize("rule", TWO)
def test_fsdp(answers, rule, similarity):
    """Shards of different sizes: 7 rows on two processes."""
    first, second = of_job(answers, _fsdp, rule, similarity)
    assert_same_bits(zip(first[0], second[0], strict=True))
    assert first[1]
    assert first[2] != second[2]
    for found, expected in zip(first[0], one_process(rule, similarity=similarity), strict=True):
        torch.testing.assert_close(found, expected)


def _checkpointed(rank, rule):
    """Every step by another optimizer, into which a checkpoint of the one before was loaded."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    whole = StateDictOptions(full_state_dict=True)
    optimizer = made(rule, model.parameters())
    for step in range(STEPS):
        model(batch(step).chunk(2)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()  # torch loads only where there are no gradients
        saved = get_optimizer_state_dict(model, optimizer, options=whole)
        optimizer = made(rule, model.parameters())
        set_optimizer_state_dict(model, optimizer, saved, options=whole)
    return [p.full_tensor().detach() for p in model.parameters()], saved["state"]


@pytest.mark.parametrize("rule", TWO)
def test_distributed_checkpoints(answers, rule):
    """As torch.distributed.checkpoint writes and loads them, by the names of parameters."""
    model = network()
    optimizer = made(rule, model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
    for weights, states in of_job(answers, _checkpointed, rule):
        for found, (name, p) in zip(weights, model.named_parameters(), strict=True):
            torch.testing.assert_close(found, p.detach())
            torch.testing.assert_close(states[name], dict(optimizer.state[p]))


def _sharded(rank, options, placement):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    of = {"rows": Shard(0), "columns": Shard(1), "all": Replicate()}[placement]
    p = torch.nn.Parameter(distribute_tensor(torch.ones(1, 4), mesh, [of]))
    p.grad = distribute_tensor(torch.arange(4.0).view(1, 4) - 1, mesh, [of])
    optimizer = optim.AdamW([p], lr=0.5, **options)
    try:
        optimizer.step()
    except RuntimeError as error:
        assert not optimizer.state
        return str(error)
    return p.full_tensor().detach()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_dtensors_and_an_empty_shard(answers, placement):
    p = torch.nn.Parameter(torch.ones(1, 4))
    p.grad = torch.arange(4.0).view(1, 4) - 1
    optim.AdamW([p], lr=0.5).step()
    for found in of_job(answers, _sharded, {}, placement):
        torch.testing.assert_close(found, p.detach())


@pytest.mark.parametrize(("options", "placement", "words"), REFUSED, ids=str)
def test_what_needs_whole_tensors_is_refused(answers, options, placement, words):
    for sentence in of_job(answers, _sharded, options, placement):
        assert words in sentence
        assert "\n" not in sentence


def _gathered(rank):
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(2, 4), mesh, [Replicate()]))
    kernels_alone = {"state_dtype": torch.float32} if launch.path(p).kernels else {}
    optimizer = optim.AdamW([p], lr=0.5, **kernels_alone)
    with torch.no_grad():
        shards = distribute_tensor(torch.arange(8.0).view(2, 4) - 1, mesh, [Shard(0)])
        p.grad = shards.redistribute(placements=[Replicate()], async_op=True)
        assert isinstance(p.grad.to_local(), AsyncCollectiveTensor)
    optimizer.step()
    return p.full_tensor().detach()


def test_a_gradient_that_is_still_under_way(answers):
    p = torch.nn.Parameter(torch.ones(2, 4))
    p.grad = torch.arange(8.0).view(2, 4) - 1
    optim.AdamW([p], lr=0.5).step()
    for found in of_job(answers, _gathered):
        torch.testing.assert_close(found, p.detach())


JOBS = [
    (_gathered,),
    *((_ddp, rule, views) for rule in TWO for views in (False, True)),
    *((_fsdp, rule, similarity) for rule in TWO for similarity in (None, "row")),
    *((_checkpointed, rule) for rule in TWO),
    *((_sharded, {}, placement) for placement in PLACEMENTS),
    *((_sharded, options, placement) for options, placement, _ in REFUSED),
]
