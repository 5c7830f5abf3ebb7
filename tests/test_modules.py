"""Every module under torch's own machinery, and what modules refuse: generated from a list of all of them."""

import copy
import inspect
import io

import numpy
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from tests.ops import assert_same_bits, case_of
from tritonshare import gate, nn
from tritonshare.check import ArgumentError, ArgumentTypeError
from tritonshare.compress import similar_filters
from tritonshare.ops.conv2d_act_pool import CONV2D_ACT_POOL
from tritonshare.ops.nearest import NEAREST
from tritonshare.ops.shared_conv2d_act_pool import SHARED_CONV2D_ACT_POOL
from tritonshare.ops.shared_linear import SHARED_LINEAR
from tritonshare.ops.similarity_reduce import SIMILARITY_REDUCE
from tritonshare.ops.similarity_weight import SIMILARITY_WEIGHT

pytestmark = pytest.mark.reference


def tied(rule):
    """A layer some of whose filters are one."""
    layer = torch.nn.Linear(5, 6)
    with torch.no_grad():
        layer.weight[3:] = layer.weight[:3]
    return similar_filters(layer, tie=rule)[0]


def maps(**options):
    return nn.FeatureMaps(4, 3, **options)


# name -> (made anew, the shape of an input without its batch)
MODULES = {
    "block": (lambda: nn.ConvActPool2d(2, 4, 3, padding=1, activation="tanh"), (2, 6, 6)),
    "shared_linear": (lambda: nn.SharedLinear(6, 5, bits=2), (6,)),
    "shared_linear_latent": (lambda: nn.SharedLinear(6, 5, bits=2, reassign_every=2), (6,)),
    "shared_conv": (lambda: nn.SharedConv2d(2, 4, 3, bits=2, pool="max", activation="relu"), (2, 6, 6)),
    "shared_conv_latent": (lambda: nn.SharedConv2d(2, 4, 3, bits=2, reassign_every=2), (2, 6, 6)),
    "maps_mean": (maps, (3,)),
    "maps_learned": (lambda: maps(update="learned"), (3,)),
    "maps_fixed": (lambda: maps(update="fixed", kind="dot"), (3,)),
    "maps_soft": (lambda: maps(assign="soft", kind="sqeuclidean"), (3,)),
    "maps_soft_learned": (lambda: maps(assign="soft", update="learned", kind="cosine"), (3,)),
    "maps_clipped": (lambda: maps(clip=1.0, reseed=0.5), (3,)),
    "maps_private": (lambda: maps(clip=1.0, noise=0.1), (3,)),
    "similarity_linear": (lambda: nn.SimilaritySharedLinear(6, 5, 4, 3), (6,)),
    "ties": (lambda: tied("learned"), (5,)),
    "ties_mean": (lambda: tied("mean"), (5,)),
}
MOVING = ("shared_linear_latent", "shared_conv_latent", "maps_mean", "maps_soft", "maps_clipped", "maps_private")
every = pytest.mark.parametrize("name", MODULES)
moving = pytest.mark.parametrize("name", MOVING)


def made(name, batch=7, dtype=torch.float32):
    torch.manual_seed(0)
    make, shape = MODULES[name]
    return make().to(dtype), torch.randn(batch, *shape, dtype=dtype)


def output(out):
    return out[0] if isinstance(out, tuple) else out


def gradients(module, x, call=None, create_graph=False):
    """Of the input and of all parameters."""
    x = x.detach().requires_grad_()
    out = output((module if call is None else call)(x))
    weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
    of = [x, *(p for p in module.parameters() if p.requires_grad)]
    return torch.autograd.grad((out * weights).sum(), of, create_graph=create_graph)


# Functional transforms, forward mode, double backward, tracing, meta.


@every
def test_functional_transforms(name):
    module, x = made(name)
    module.eval()

    def loss(parameters, x):
        return output(functional_call(module, parameters, (x,))).sin().sum()

    parameters = {key: p.detach() for key, p in module.named_parameters()}
    out = output(module(x))
    torch.testing.assert_close(vmap(lambda x: output(module(x[None]))[0])(x), out)
    if not parameters:
        return
    each = vmap(grad(loss), (None, 0))(parameters, x[:, None])
    together = torch.autograd.grad(output(module(x)).sin().sum(), list(module.parameters()), allow_unused=True)
    for a, b in zip(each.values(), together, strict=True):
        torch.testing.assert_close(a.sum(0), torch.zeros_like(a[0]) if b is None else b, rtol=1e-4, atol=1e-5)


@every
def test_forward_mode_is_the_transposed_of_the_backward(name):
    module, x = made(name, dtype=torch.float64)
    module.eval()
    tangent, weights = torch.randn_like(x), torch.randn_like(output(module(x)))
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad((output(module(leaf)) * weights).sum(), leaf)
    pushed = jvp(lambda x: output(module(x)), (x,), (tangent,))[1]
    torch.testing.assert_close((pushed * weights).sum(), (dx * tangent).sum())
    with forward_ad.dual_level():
        dual = output(module(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, pushed)


@every
def test_gradients_of_gradients(name):
    module, x = made(name, batch=3, dtype=torch.float64)
    module.eval()
    plain, again = gradients(module, x), gradients(module, x, create_graph=True)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradgradcheck(lambda x: output(module(x)), x.requires_grad_(), atol=1e-4)


@every
@pytest.mark.parametrize("training", [False, True])
def test_meta(name, training):
    module, x = made(name)
    expected = output(module.train(training)(x))
    found = output(module.to("meta")(x.to("meta")))
    assert found.shape == expected.shape
    assert found.is_meta


@every
@pytest.mark.filterwarnings("ignore")
def test_traces(name):
    """The trace can be saved, and has the same gradients."""
    module, x = made(name)
    module.eval()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, (x.requires_grad_(),)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    torch.testing.assert_close(output(loaded(x)), output(module(x)))
    torch.testing.assert_close(gradients(loaded, x), gradients(module, x))


@every
@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole(name, training):
    module, x = made(name)
    if training and "latent" in name:
        pytest.skip("counting steps breaks the graph, as is documented")
    twin = copy.deepcopy(module)
    module.train(training), twin.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for batch in (x, x.flip(0), x[:5]):
        torch.testing.assert_close(gradients(module, batch, compiled), gradients(twin, batch))
    torch.testing.assert_close(module.state_dict(), twin.state_dict())


# Activation checkpointing, replicas.


@moving
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", ["one by one", "backward", "forward", "summed"])
def test_checkpoints_change_state_once_and_have_the_same_gradients(name, reentrant, order):
    """Three batches a step, whose backwards come in every order; and each forward of three steps changes the state."""
    module, x = made(name)
    twin = copy.deepcopy(module)
    found = []
    for of, call in (
        (twin, twin),
        (module, lambda x: checkpoint(lambda x: output(module(x)), x, use_reentrant=reentrant)),
    ):
        optimizer = torch.optim.SGD([*of.parameters(), torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        all_of = []
        for step in range(3):
            optimizer.zero_grad()
            losses = []
            for number in range(3):
                leaf = (x * (step + number + 1)).requires_grad_()
                losses.append((leaf, (output(call(leaf)) * torch.arange(1, 8).view(-1, *[1] * (x.dim() - 1))).sum()))
                if order == "one by one":
                    losses[-1][1].backward()
            if order == "summed":
                sum(loss for _, loss in losses).backward()
            elif order != "one by one":
                for _, loss in losses if order == "forward" else losses[::-1]:
                    loss.backward()
            all_of += [leaf.grad for leaf, _ in losses] + [p.grad.clone() for p in of.parameters()]
            optimizer.step()
        found.append(all_of)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(module.state_dict(), twin.state_dict())


@moving
def test_data_parallel_is_refused(name):
    """Its replicas would lose the state. In eval mode they change none."""
    module, x = made(name)
    replica = module._replicate_for_data_parallel()
    replica._parameters = dict(module._parameters)
    with pytest.raises(ArgumentError, match=r"lost in torch\.nn\.DataParallel: use DistributedDataParallel$"):
        replica(x)
    replica.training = False
    module.eval()
    torch.testing.assert_close(output(replica(x)), output(module(x)))


# State.


@every
def test_copies_have_the_state_and_go_on_alike(name):
    module, x = made(name)
    module(x)
    other = made(name)[0]
    other.load_state_dict(module.state_dict())
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    third = made(name)[0]
    third.load_state_dict(torch.load(file, weights_only=True))
    twins = [copy.deepcopy(module), other, third]
    for twin in twins:
        assert_same_bits([(output(twin.eval()(x)), output(module.eval()(x)))])
        assert_same_bits(zip(twin.state_dict().values(), module.state_dict().values(), strict=True))


@every
@pytest.mark.parametrize("alone", [True, False])
def test_symbolic_trace(name, alone):
    """The module alone, and within another: the same results and gradients, and the same state after training."""
    module, x = made(name)
    of = copy.deepcopy(module) if alone else torch.nn.Sequential(torch.nn.Identity(), copy.deepcopy(module))
    graph = torch.fx.symbolic_trace(of)
    assert len(list(graph.parameters())) == len(list(module.parameters()))
    for _ in range(3):
        assert_same_bits(zip(gradients(graph, x), gradients(module, x), strict=True))
    assert_same_bits(zip(of.state_dict().values(), module.state_dict().values(), strict=True))


def test_a_subclass_is_traced_through_its_own_forward():
    class More(nn.ConvActPool2d):
        def forward(self, input):
            return super().forward(input) + 1

    module, x = More(2, 4, 3), torch.randn(2, 2, 6, 6)
    for of in (module, torch.nn.Sequential(module)):
        torch.testing.assert_close(torch.fx.symbolic_trace(of)(x), module(x), rtol=0, atol=0)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_integers_keep_their_dtype_and_values(name, dtype):
    module, x = made(name)
    before = {key: t.clone() for key, t in module.state_dict().items()}
    module.to(dtype).eval()
    for key, t in module.state_dict().items():
        if not before[key].is_floating_point():
            assert_same_bits([(t, before[key])])
    assert output(module(x.to(dtype))).dtype == dtype


class Trained(torch.nn.Module):
    """A module, and a parameter in any case: torch averages no model without one."""

    def __init__(self, module):
        super().__init__()
        self.module, self.scale = module, torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return output(self.module(x)) * self.scale


@every
@pytest.mark.parametrize(
    ("average", "buffers"),
    [(None, False), (get_ema_multi_avg_fn(0.9), False), (None, True), (get_ema_multi_avg_fn(0.9), True)],
    ids=["mean", "moving", "mean with buffers", "moving with buffers"],
)
def test_averages_of_a_model_leave_indices_alone(name, average, buffers):
    module, x = made(name)
    model = Trained(module)
    state = model.state_dict().items()
    indices = [key for key, t in state if key.endswith(("codes", "index")) and not t.is_floating_point()]
    if buffers and indices:
        with pytest.raises(ArgumentError, match=r"which are names of values: without it they are copied$"):
            AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        return
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        model(x).sum().backward()
        optimizer.step()
        averaged.update_parameters(model)
    assert averaged.eval()(x).isfinite().all()
    for key in indices:
        assert_same_bits([(averaged.module.state_dict()[key], model.state_dict()[key])])


@every
def test_exports(name):
    """Saved, loaded and run, with the same names of what it returns."""
    module, x = made(name)
    module.eval()
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (x,)), file)
    file.seek(0)
    found = torch.export.load(file).module()(x)
    assert type(found) is type(module(x))
    torch.testing.assert_close(output(found), output(module(x)))


@pytest.mark.filterwarnings("ignore")
def test_exports_to_onnx():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    names = ("block", "shared_linear", "shared_conv", "maps_mean", "ties")
    modules, inputs = zip(*map(made, names), strict=True)

    class All(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.all = torch.nn.ModuleList(modules)

        def forward(self, *inputs):
            return [output(module(x)) for module, x in zip(self.all, inputs, strict=True)]

    model = All().eval()
    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    for a, b in zip(program(*inputs), model(*inputs), strict=True):
        torch.testing.assert_close(torch.as_tensor(a), b, rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("training", [False, True])
def test_empty_batches(name, training):
    """A batch without inputs gives an output without any, and changes no state."""
    module, x = made(name, batch=0)
    module.train(training)
    before = copy.deepcopy(module.state_dict())
    out = output(module(x.requires_grad_()))
    assert len(out) == 0
    out.sum().backward()
    if name != "maps_private":  # whether a batch was empty is private, too
        assert_same_bits(zip(module.state_dict().values(), before.values(), strict=True))


@pytest.mark.parametrize("shape", [(2, 0, 6), (0, 2, 6), (0, 0, 6), (2, 3, 6), (6,)])
@pytest.mark.parametrize("name", ["shared_linear", "shared_linear_latent", "similarity_linear"])
def test_leading_axes_are_linears(name, shape):
    module = made(name)[0]
    assert module(torch.randn(shape)).shape == torch.nn.Linear(6, 5)(torch.randn(shape)).shape


def test_every_module_is_in_the_list():
    classes = {type(made(name)[0]).__name__ for name in MODULES}
    assert {name for name in nn.__all__ if inspect.isclass(getattr(nn, name))} <= classes


# What modules are made with.

# class -> (what it is made with, the ops whose options are among that)
MADE = {
    nn.ConvActPool2d: ({"in_channels": 4, "out_channels": 8, "kernel_size": 3}, (CONV2D_ACT_POOL,)),
    nn.SharedLinear: ({"in_features": 16, "out_features": 8}, (SHARED_LINEAR,)),
    nn.SharedConv2d: (
        {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "pool": "max"},
        (SHARED_CONV2D_ACT_POOL, CONV2D_ACT_POOL),
    ),
    nn.FeatureMaps: ({"num_features": 4, "dim": 3}, (NEAREST, SIMILARITY_WEIGHT, SIMILARITY_REDUCE)),
    nn.SimilaritySharedLinear: (
        {"in_features": 4, "out_features": 8, "num_features": 3, "dim": 2},
        (SIMILARITY_WEIGHT,),
    ),
}


def of_options(clause, arguments):
    """Whether a clause is broken whatever the tensors are."""
    try:
        return clause.problem({n: a for n, a in arguments.items() if not isinstance(a, torch.Tensor)}) is not None
    except (AttributeError, KeyError, TypeError):
        return False


def breaks():
    """Every way to break a clause of an op's contract by a module's arguments alone."""
    for cls, (valid, ops) in MADE.items():
        names = inspect.signature(cls).parameters
        for op in ops:
            case = case_of(op, "tiny")
            tensors = gate.make_tensors(case, torch.float32)
            arguments = dict(zip(op.arguments, [*tensors, *gate.raw_options(op, case.options)], strict=True))
            for number, clause in enumerate(op.contract):
                for way, change in enumerate(clause.breaks):
                    wrong = change(arguments)
                    if wrong.keys() <= names.keys() - {"bias"} and of_options(clause, arguments | wrong):
                        yield pytest.param(cls, valid | wrong, id=f"{cls.__name__}-{op.name}-{number}-{way}")


def refused(cls, arguments):
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        cls(**arguments)
    assert str(caught.value).startswith(f"{cls.__name__}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(("cls", "arguments"), list(breaks()))
def test_a_module_refuses_when_it_is_made(cls, arguments):
    refused(cls, arguments)


INTEGERS = [
    pytest.param(cls, valid, name, id=f"{cls.__name__}-{name}")
    for cls, (valid, _) in MADE.items()
    for name, parameter in inspect.signature(cls).parameters.items()
    if "int" in str(parameter.annotation).replace("|", " ").split()
]


@pytest.mark.parametrize(("cls", "valid", "name"), INTEGERS)
@pytest.mark.parametrize("wrong", [1.5, True, -1, torch.nn.Parameter(torch.ones(3, 3)), torch.tensor(True), [3] * 9])
def test_what_is_no_integer_is_refused_in_a_line(cls, valid, name, wrong):
    refused(cls, valid | {name: wrong})


@pytest.mark.parametrize(("cls", "valid", "name"), INTEGERS)
@pytest.mark.parametrize("integer", [numpy.int64, numpy.uint8, torch.tensor])
def test_integers_of_numpy_and_of_tensors_are_integers(cls, valid, name, integer):
    default = valid.get(name, inspect.signature(cls).parameters[name].default)
    default = default if isinstance(default, int) else 2
    if name == "bits":
        default = 2
    made = cls(**valid | {name: integer(default)})
    expected = cls(**valid | {name: default})
    assert str(made) == str(expected)
    assert type(getattr(made, name, 0)) is type(getattr(expected, name, 0))
    assert [t.shape for t in made.state_dict().values()] == [t.shape for t in expected.state_dict().values()]


def test_every_module_is_checked():
    assert {cls.__name__ for cls in MADE} == set(nn.__all__)
