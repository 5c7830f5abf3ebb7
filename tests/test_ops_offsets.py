"""Offsets beyond 2^31 elements, on memory that is reserved and never touched but where a program looks."""

from contextlib import contextmanager

import pytest
import torch

from tritonshare import launch, plan
from tritonshare.functional import conv2d_act_pool, similarity_weight

pytestmark = pytest.mark.interpreter

BATCH = 2**25 + 40  # with 64 elements a sample: more than 2^31
BLOCKS = {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_C": 64}  # all channels in one program


@contextmanager
def only_the_last_program():
    """Launches run the last program of their grid alone: the one with the largest offsets."""
    from triton.runtime.interpreter import interpreter_builder

    original, builder = launch.Launcher._launch, type(interpreter_builder)
    set_grid_idx = builder.set_grid_idx

    def launch_last(self, grid, args):
        builder.set_grid_idx = lambda b, x, y, z: object.__setattr__(b, "grid_idx", (grid - 1, y, z))
        try:
            original(self, 1, args)
        finally:
            builder.set_grid_idx = set_grid_idx

    launch.Launcher._launch = launch_last
    try:
        yield
    finally:
        launch.Launcher._launch = original


def test_forward_writes_beyond_2_31_elements():
    x = torch.empty(BATCH, 1, 2, 2, dtype=torch.float16)
    tail = torch.randn(64, 1, 2, 2).half()
    x[-64:] = tail
    w, b = torch.randn(64, 1, 1, 1).half(), torch.randn(64).half()
    with only_the_last_program(), plan.using(plan=BLOCKS), torch.no_grad():
        y = conv2d_act_pool(x, w, b)
    last = BATCH % BLOCKS["BLOCK_M"]
    torch.testing.assert_close(y[-last:], conv2d_act_pool(tail[-last:], w, b), rtol=0, atol=0)


def test_backward_reads_and_writes_beyond_2_31_elements():
    x = torch.empty(BATCH, 64, 1, 1, dtype=torch.float16).requires_grad_()
    w = torch.randn(64, 64, 1, 1).half()
    with only_the_last_program(), plan.using(plan=BLOCKS):
        y = conv2d_act_pool(x, w, pool=None, activation="none")
        grad = torch.empty_like(y)
        tail = torch.randn(64, 64, 1, 1).half()
        grad[-64:] = tail
        y.backward(grad)
    last = BATCH % BLOCKS["BLOCK_M"]
    small = torch.zeros(last, 64, 1, 1, dtype=torch.float16, requires_grad=True)
    conv2d_act_pool(small, w, pool=None, activation="none").backward(tail[-last:])
    torch.testing.assert_close(x.grad[-last:], small.grad, rtol=0, atol=0)


def test_every_pass_reads_inputs_beyond_2_31_elements():
    """Few pooled pixels far apart: a stride of 2^14 over three samples of 2^30 elements."""
    x = torch.empty(3, 1, 2**15, 2**15, dtype=torch.float16)
    picked = torch.randn(3, 1, 2, 2).half()
    x[:, :, :: 2**14, :: 2**14] = picked
    w, b = torch.randn(16, 1, 1, 1).half(), torch.randn(16).half()

    def run(x, stride):
        leaves = [w.clone().requires_grad_(), b.clone().requires_grad_()]
        y = conv2d_act_pool(x, *leaves, stride=stride)
        y.sum().backward()
        return [y.detach(), *[t.grad for t in leaves]]

    for found, expected in zip(run(x, 2**14), run(picked, 1), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_similarities_read_and_write_beyond_2_31_elements():
    rows, last = 2**27 + 8, 8
    x = torch.empty(rows, 16, dtype=torch.float16).requires_grad_()
    tail, y = torch.randn(last, 16).half(), torch.randn(16, 16).half()
    x.data[-last:] = tail
    with only_the_last_program():
        w = similarity_weight(x, y)
        grad = torch.empty_like(w)
        grad[-last:] = tail
        w.backward(grad)
    small = tail.clone().requires_grad_()
    expected = similarity_weight(small, y)
    expected.backward(tail)
    torch.testing.assert_close(w[-last:], expected, rtol=0, atol=0)
    torch.testing.assert_close(x.grad[-last:], small.grad, rtol=0, atol=0)
