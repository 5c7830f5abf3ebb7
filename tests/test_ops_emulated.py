"""Every op's kernels as Triton compiles them, executed: on an emulated GPU, which watches for faults and races. Nothing
here is particular to an op: cases and laws come with its declaration."""

from contextlib import contextmanager

import pytest
import torch

from bench.emulator import emulated_gpu
from bench.launches import NUMBERS, numbers
from tests.guard import poisoned_allocations
from tests.ops import assert_same_bits, cases, laws, pairs_of_law, results
from tritonshare import gate, launch, plan
from tritonshare.optim import verify

pytestmark = [pytest.mark.emulated, pytest.mark.sampled("op.name")]

ARCHES = (90, 80)


@pytest.fixture(autouse=True)
def cpu_tensors_take_the_kernels(monkeypatch, fresh_problems):
    def path_of(device, dtype, cpu=False):
        return launch.Path(launch.KERNELS if dtype in launch.KERNEL_DTYPES else launch.REFERENCE, "an emulated GPU")

    monkeypatch.setattr(launch, "path_of", path_of)


@contextmanager
def on_gpu(arch, **options):
    """Kernels planned and compiled for a chip, and emulated, with no race seen."""
    with emulated_gpu(arch, races=True, **options) as gpu, plan.using(device=plan.DEVICES[f"sm_{arch}"]):
        yield gpu
    assert not gpu.races


def on_chips(parameters, names=tuple(NUMBERS), arches=ARCHES):
    """Parameters (op, case, numbers, arch)."""
    return [
        pytest.param(*p.values, name, arch, id=f"{p.id}-{name}-sm_{arch}")
        for arch in arches
        for name in names
        for p in parameters
    ]


def gated(op, case, name, family="random"):
    """A call through the gate, on poisoned memory, with inputs left as they were."""
    with numbers(name) as dtype:
        tensors = gate.make_tensors(case, dtype, family=family)
        judge = gate.Judge(op, case, tensors, family, on_gpu=True)
        before = [None if t is None else t.clone() for t in judge.tensors]
        with poisoned_allocations() as memory:
            comparisons = judge(lambda *args: gate.call(op, args, case.options))
        memory.check()
        assert [str(c) for c in comparisons if not c.passed] == []
        assert_same_bits((t, b) for t, b in zip(judge.tensors, before, strict=True) if t is not None)


@pytest.mark.sampled("op.name", "name", "arch")
@pytest.mark.parametrize(("op", "case", "name", "arch"), on_chips(cases("tiny", "edge")))
def test_gate(op, case, name, arch):
    with on_gpu(arch):
        gated(op, case, name)


@pytest.mark.parametrize("family", gate.FAMILIES[1:])
@pytest.mark.parametrize(("op", "case", "name", "arch"), on_chips(cases("tiny"), ("bf16",), (90,)))
def test_gate_by_family_of_data(op, case, name, arch, family):
    with on_gpu(arch):
        gated(op, case, name, family)


@pytest.mark.parametrize(("op", "case", "name", "arch"), on_chips(cases("tiny"), ("tf32", "bf16"), (90,)))
def test_copies_that_come_at_once_change_nothing(op, case, name, arch):
    with on_gpu(arch, eager=True):
        gated(op, case, name)


def of_eight_warps(op, case, dtype):
    """[plans by pass]: every plan of eight warps that the tuner would measure is in one. Triton has compiled such loops
    wrongly (pytorch#173068)."""
    tensors = case.empty(dtype)
    heuristic = op.problem(tensors, op.canonical(tensors, *gate.raw_options(op, case.options))).heuristic
    plans = {pass_: [p for p in heuristic.candidates(pass_) if p.num_warps == 8] for pass_ in heuristic.plans}
    rounds = max(map(len, plans.values()))
    return [{pass_: found[i % len(found)] for pass_, found in plans.items() if found} for i in range(rounds)]


@pytest.mark.parametrize(("op", "case", "name", "arch"), on_chips(cases("tiny"), ("bf16", "tf32"), (90,)))
def test_plans_of_eight_warps(op, case, name, arch):
    with on_gpu(arch), numbers(name) as dtype:
        rounds = of_eight_warps(op, case, dtype)
        assert rounds
        for plans in rounds:
            with plan.using(plan=plans):
                gated(op, case, name)


@pytest.mark.parametrize(("op", "case", "name", "arch"), on_chips(cases("tiny"), ("bf16",)))
def test_the_order_of_programs_does_not_matter(op, case, name, arch):
    with numbers(name) as dtype:
        tensors, found = gate.make_tensors(case, dtype), []
        for backwards in (False, True):
            with on_gpu(arch, backwards=backwards):
                found.append(results(op, tensors, family="random", **case.options))
    assert_same_bits(zip(*found, strict=True))


@pytest.mark.parametrize(("op", "case", "law"), laws())
def test_law(op, case, law):
    with on_gpu(90):
        assert_same_bits(pairs_of_law(op, case, law))


@pytest.mark.sampled("arch", "dtype")
@pytest.mark.parametrize("arch", ARCHES, ids="sm_{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", verify.RULES)
def test_steps(rule, dtype, arch):
    with on_gpu(arch):
        comparisons = verify.check(rule, dtype, "cpu")
    assert [str(c) for c in comparisons if not c.passed] == []
