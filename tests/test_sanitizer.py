"""The sanitizer and the guard bands catch what they are for: each kernel here has one defect, but for the clean one."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

from tests.guard import Guard, GuardError, poisoned_allocations
from tests.sanitizer import Sanitizer, SanitizerError

pytestmark = pytest.mark.interpreter

N, BLOCK = 40, 16
GRID = (triton.cdiv(N, BLOCK),)


@triton.jit
def scale(x_ptr, y_ptr, n, SHIFT: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """y = 2 x. SHIFT moves the load, LIMIT the end of the store: zero is right."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs + SHIFT, mask=offs < n)
    tl.store(y_ptr + offs, x * 2.0, mask=offs < n + LIMIT)


@triton.jit
def all_write_first(y_ptr):
    tl.store(y_ptr, tl.program_id(0).to(tl.float32))


@triton.jit
def shift_in_place(x_ptr, n, BLOCK: tl.constexpr):
    """Reads what the next program writes."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs + 1, mask=offs + 1 < n)
    tl.store(x_ptr + offs, x, mask=offs < n)


@triton.jit
def store_halved(y_ptr, SAME: tl.constexpr, BLOCK: tl.constexpr):
    """Two lanes for every address."""
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs // 2, (offs // 2 if SAME else offs).to(tl.float32))


@triton.jit
def flat_offset(x_ptr, y_ptr, step, WIDE: tl.constexpr):
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    tl.store(y_ptr, tl.load(x_ptr + pid * step))


@triton.jit
def add_atomically(y_ptr):
    tl.atomic_add(y_ptr, 1.0)


@triton.jit
def assert_positive(x_ptr):
    tl.device_assert(tl.load(x_ptr) > 0, "x must be positive")


@triton.jit
def write_neighbour(x_ptr, y_ptr, distance):
    """Reaches y by way of x."""
    tl.store(x_ptr + distance, tl.load(y_ptr))


@triton.jit
def write_column(y_ptr, stride, ROWS: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, ROWS) * stride, 1.0)


@triton.jit
def double_by_table(table_ptr, n, BLOCK: tl.constexpr):
    p = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    offs = tl.arange(0, BLOCK)
    tl.store(p + offs, tl.load(p + offs, mask=offs < n) * 2.0, mask=offs < n)


@triton.jit
def copy_by_descriptor(x_ptr, y_ptr, rows, columns, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [rows, columns], [columns, 1], [BLOCK, BLOCK])
    y = tl.make_tensor_descriptor(y_ptr, [rows, columns], [columns, 1], [BLOCK, BLOCK])
    i, j = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    y.store([i, j], x.load([i, j]))


@pytest.fixture
def x():
    return torch.arange(1.0, N + 1)


def run_scale(x, y, shift=0, limit=0, order=None):
    with Sanitizer(order) as sanitizer:
        scale[GRID](x, y, N, shift, limit, BLOCK)
    return sanitizer


@pytest.mark.parametrize("order", [None, "reverse", 0, 7])
def test_clean_kernel_passes_and_is_counted(x, order):
    y = torch.zeros_like(x)
    sanitizer = run_scale(x, y, order=order)
    torch.testing.assert_close(y, 2 * x, rtol=0, atol=0)
    assert (sanitizer.launches, sanitizer.programs, sanitizer.accesses) == (1, 3, 2 * N)


def test_programs_cover_a_grid_of_three_axes_in_any_order():
    @triton.jit
    def count(y_ptr):
        nx, ny = tl.num_programs(1), tl.num_programs(2)
        number = (tl.program_id(0) * nx + tl.program_id(1)) * ny + tl.program_id(2)
        tl.store(y_ptr + number, number.to(tl.float32))

    for order in (None, "reverse", 3):
        y = torch.full((24,), -1.0)
        with Sanitizer(order) as sanitizer:
            count[(2, 3, 4)](y)
        assert y.tolist() == list(range(24))
        assert sanitizer.programs == 24


def test_descriptors_are_clean_and_counted():
    x = torch.randn(20, 24)
    y = torch.zeros_like(x)
    with Sanitizer() as sanitizer:
        copy_by_descriptor[(2, 2)](x, y, 20, 24, 16)
    assert torch.equal(x, y)
    assert sanitizer.accesses == 2 * x.numel()
    with Sanitizer(), pytest.raises(SanitizerError, match="store outside"):
        copy_by_descriptor[(2, 2)](x, y[:19], 20, 24, 16)


def test_load_past_the_end(x):
    with pytest.raises(SanitizerError, match=r"program \(2, 0, 0\): load outside float32\[40\], at element 40"):
        run_scale(x, torch.zeros_like(x), shift=1)


def test_load_before_the_start(x):
    with pytest.raises(SanitizerError, match=r"load outside.* at element -1"):
        run_scale(x, torch.zeros_like(x), shift=-1)


def test_store_past_the_end(x):
    memory = torch.zeros(N + BLOCK)
    with pytest.raises(SanitizerError, match=r"store outside float32\[40\], at element 40: 1 of 9 lanes"):
        run_scale(x, memory[:N], limit=1)
    assert memory[N] == 0, "the store must be refused, not reported afterwards"


def test_store_reaches_another_argument(x):
    memory = torch.zeros(8)
    with Sanitizer(), pytest.raises(SanitizerError, match=r"store outside float32\[4\]"):
        write_neighbour[(1,)](memory[:4], memory[4:], 5)


def test_store_between_the_elements_of_a_view():
    y = torch.zeros(16, 4)[:, :2]
    with Sanitizer():
        write_column[(1,)](y, 4, 16)
    with Sanitizer(), pytest.raises(SanitizerError, match="store outside"):
        write_column[(1,)](y, 3, 16)


def test_misaligned_access():
    pair = torch.zeros(3, dtype=torch.int16)[1:]
    with Sanitizer(), pytest.raises(SanitizerError, match="not aligned to its 4 bytes"):
        all_write_first[(1,)](triton.reinterpret(pair, tl.float32))


def test_two_programs_write_one_element():
    with Sanitizer(), pytest.raises(SanitizerError, match=r"race: .* writes what another program wrote"):
        all_write_first[(2,)](torch.zeros(1))


@pytest.mark.parametrize(("order", "complaint"), [(None, "program read"), ("reverse", "program wrote")])
def test_one_program_reads_what_another_writes(x, order, complaint):
    with Sanitizer(order), pytest.raises(SanitizerError, match=f"race: .*{complaint}"):
        shift_in_place[GRID](x, N, BLOCK)


def test_race_through_views_of_different_width():
    memory = torch.zeros(4)
    # The second half of the int32 that both programs read is the int16 that both write.
    with Sanitizer(), pytest.raises(SanitizerError, match="reads what another program wrote"):
        write_neighbour[(2,)](memory.view(torch.int16), memory.view(torch.int32), 1)


def test_launches_do_not_race_with_each_other(x):
    y = torch.zeros_like(x)
    with Sanitizer() as sanitizer:
        scale[GRID](x, y, N, 0, 0, BLOCK)
        scale[(1,)](y, x, N, 0, 0, 64)
    assert sanitizer.launches == 2


def test_order_of_programs_changes_a_racy_result(x):
    results = set()
    for order in (None, "reverse", 1, 2):
        y = x.clone()
        with Sanitizer(order, races=False):
            shift_in_place[GRID](y, N, BLOCK)
        results.add(tuple(y.tolist()))
    assert len(results) > 1


def test_duplicate_lanes():
    with Sanitizer(), pytest.raises(SanitizerError, match="duplicate lanes"):
        store_halved[(1,)](torch.zeros(8), False, 16)
    y = torch.zeros(8)
    with Sanitizer():
        store_halved[(1,)](y, True, 16)
    assert y.tolist() == list(range(8))


def test_int32_overflow():
    x, y = torch.zeros(1), torch.zeros(1)
    with Sanitizer("reverse"), pytest.raises(SanitizerError, match="int32 overflow"):
        flat_offset[(3,)](x, y, 2**30, False)


def test_offsets_beyond_two_to_the_31():
    # Untouched memory costs nothing: only the pages read are ever backed.
    x, y = torch.empty(2**31 + 2, dtype=torch.int8), torch.zeros(1, dtype=torch.int8)
    x[2**31] = 5
    with Sanitizer("reverse", races=False) as sanitizer:
        flat_offset[(3,)](x, y, 2**30, True)
    assert sanitizer.accesses == 6
    with Sanitizer("reverse"), pytest.raises(SanitizerError, match="load outside"):
        flat_offset[(3,)](x[: 2**31], y, 2**30, True)


def test_atomic():
    with Sanitizer(), pytest.raises(SanitizerError, match="atomic"):
        add_atomically[(1,)](torch.zeros(1))


def test_device_assert():
    with Sanitizer(), pytest.raises(SanitizerError, match="x must be positive"):
        assert_positive[(1,)](torch.zeros(1))


def test_tensors_behind_an_address_table():
    a, b = torch.ones(8), torch.ones(8)
    table = torch.tensor([a.data_ptr(), b.data_ptr()])
    with Sanitizer(extra=[a, b]):
        double_by_table[(2,)](table, 8, 16)
    assert a.tolist() == b.tolist() == [2.0] * 8
    with Sanitizer(extra=[a[:7], b]), pytest.raises(SanitizerError, match="outside"):
        double_by_table[(2,)](table, 8, 16)
    with Sanitizer(), pytest.raises(SanitizerError, match="no tensor of this launch"):
        double_by_table[(2,)](table, 8, 16)


def test_an_error_of_the_kernel_keeps_its_type(x):
    with Sanitizer(), pytest.raises(InterpreterError, match="power of 2"):
        scale[GRID](x, x, N, 0, 0, 15)


def test_triton_is_restored(x):
    before = dict(vars(InterpreterBuilder)), interpreter_builder.options
    run_scale(x, torch.zeros_like(x))
    with pytest.raises(SanitizerError):
        run_scale(x, torch.zeros_like(x), shift=1)
    assert (dict(vars(InterpreterBuilder)), interpreter_builder.options) == before


# Guard bands


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_guard_of_a_written_tensor_is_content(dtype, memory_format):
    guard = Guard.empty((2, 3, 4, 5), dtype, memory_format)
    assert guard.tensor.shape == (2, 3, 4, 5)
    assert guard.tensor.dtype == dtype
    assert guard.tensor.is_contiguous(memory_format=memory_format)
    assert guard.tensor.data_ptr() % 16 == 0
    assert guard.unwritten() == 120
    assert not dtype.is_floating_point or bool(guard.tensor.isnan().all())
    guard.tensor.copy_(torch.full((2, 3, 4, 5), float("nan")) if dtype.is_floating_point else torch.ones(2, 3, 4, 5))
    guard.check()


def test_guard_sees_a_write_past_the_end(x):
    guard = Guard.empty((N,))
    scale[GRID](x, guard.tensor, N, 0, 1, BLOCK)
    with pytest.raises(GuardError, match="written outside: 4 bytes, the first 160 bytes from its start"):
        guard.check()


def test_guard_sees_a_write_before_the_start_and_in_a_gap():
    for index in (-1, 5):
        guard = Guard((2, 4), (8, 1), torch.int32, offset=1)
        assert guard.tensor.data_ptr() % 16 == 4
        guard.tensor.zero_()
        guard.check()
        guard.tensor.as_strided((1,), (1,), guard.tensor.storage_offset() + index).zero_()
        with pytest.raises(GuardError, match=f"the first {4 * index} bytes from its start"):
            guard.check()


def test_guard_sees_an_unwritten_element(x):
    guard = Guard.empty((N,))
    scale[GRID](x, guard.tensor, N, 0, -1, BLOCK)
    with pytest.raises(GuardError, match="1 of 40 elements were never written"):
        guard.check()
    guard.check(written=False)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, limit):
        y = torch.empty_like(x)
        scale[GRID](x, y, N, 0, limit, BLOCK)
        return y

    @staticmethod
    def backward(ctx, dy):
        dx = torch.empty(dy.shape)
        scale[GRID](dy, dx, N, 0, 0, BLOCK)
        return dx, None


def test_every_kind_of_empty_is_poisoned():
    like = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    with poisoned_allocations() as memory:
        made = [
            torch.empty(3, 5),
            torch.empty((2, 3, 4, 5), memory_format=torch.channels_last),
            torch.empty_like(like),
            torch.empty_strided((3, 4), (8, 2)),
            like.new_empty(7),
            like.new_empty_strided((3, 4), (1, 3), dtype=torch.float16),
        ]
        assert torch.zeros(3).tolist() == [0.0] * 3
        assert torch.empty(0).numel() == torch.empty(3, device="meta").storage_offset() == 0
    assert len(memory.guards) == len(made)
    assert all(bool(tensor.isnan().all()) for tensor in made)
    assert made[2].stride() == like.stride()
    assert made[5].stride() == (1, 3)
    memory.check()
    with pytest.raises(GuardError, match="15 of 15 elements"):
        memory.check_written(made[0])
    with pytest.raises(GuardError, match="does not come from"):
        memory.check_written(like)


def test_outputs_of_an_op_are_guarded_in_both_directions(x):
    with poisoned_allocations() as memory:
        x.requires_grad_()
        y = Doubled.apply(x, 0)
        (dx,) = torch.autograd.grad(y, x, torch.ones(N))
    memory.check()
    memory.check_written(y.detach(), dx)
    assert dx.tolist() == [2.0] * N
    with poisoned_allocations() as memory:
        Doubled.apply(x, 1)
    with pytest.raises(GuardError, match="written outside"):
        memory.check()
    with poisoned_allocations() as memory:
        y = Doubled.apply(x, -1)
    assert bool(y[-1].isnan())
    with pytest.raises(GuardError, match="1 of 40"):
        memory.check_written(y)


def test_sanitizer_and_guard_work_together(x):
    with poisoned_allocations() as memory, Sanitizer(3) as sanitizer:
        y = Doubled.apply(x, 0)
    memory.check_written(y)
    assert sanitizer.accesses == 2 * N
    with poisoned_allocations(), Sanitizer(), pytest.raises(SanitizerError, match="store outside"):
        Doubled.apply(x, 1)
