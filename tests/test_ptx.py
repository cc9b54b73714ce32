"""The machine that kernels run on where there is no GPU: what it computes, and the faults that it has to find."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton

import fastddim
import ptx
from fastddim import Clip, DDIMConfig, DynamicThreshold, Guidance, Schedule, StepTable
from fastddim.kernels import Workspace
from fastddim.noise import seed_tensor
from ptx.instructions import ALLOWED_INEXACT, ARITHMETIC
from ptx.launcher import Machine

SCHEDULE = Schedule(DDIMConfig())
TABLE = StepTable.build(SCHEDULE, SCHEDULE.pairs(10))
REGISTERS = ".reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<32>; .reg .b64 %rd<32>;"
# The element of each thread of the grid: `%rd1` of the first tensor, `%rd2` of the second one, of 32-bit cells.
INDEX = """
    ld.param.b64 %rd10, [k_param_0];
    ld.param.b64 %rd11, [k_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %nctaid.x;
    mad.lo.s32 %r4, %r2, {threads}, %r1;
    mad.wide.s32 %rd1, %r4, 4, %rd10;
    mad.wide.s32 %rd2, %r4, 4, %rd11;
"""


def source(body, threads=64, index=INDEX):
    """A kernel of two tensors and an integer."""
    return f"""//
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
    .param .u64 .ptr .global .align 1 k_param_0,
    .param .u64 .ptr .global .align 1 k_param_1,
    .param .u32 k_param_2
)
.reqntid {threads}
{{
{REGISTERS}
{index.format(threads=threads)}
{body}
    ret;
}}
"""


def run(text, first, second, blocks=1, shared=0, seed=None, unwritten=()):
    """Launch a kernel on two arrays, in place."""
    memory = ptx.Memory()
    for k, array in enumerate((first, second)):
        memory.add(array.ctypes.data, array.nbytes, written=k not in unwritten)
    program = ptx.prepare(ptx.load(text))
    return ptx.launch(program, (blocks, 1, 1), (first.ctypes.data, second.ctypes.data, 7), shared, memory, seed)


def refused(message, body, *, blocks=1, size=None, **options):
    threads = options.pop("threads", 64)
    size = blocks * threads if size is None else size
    with pytest.raises(ptx.PtxError, match=message):
        run(source(body, threads), np.ones(size, np.uint32), np.ones(size, np.uint32), blocks, **options)


def nearest(exact):
    """A fraction as the nearest float32, ties to even."""
    guess = np.float32(float(exact))
    near = [guess, np.nextafter(guess, np.float32(-np.inf)), np.nextafter(guess, np.float32(np.inf))]
    return min(near, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.int32)) & 1))


def test_a_fused_multiplication_and_addition_is_rounded_once():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3000)).astype(np.float32)
    # Sums that nearly cancel, that lie half way between two float32 up to a last bit of float64, and below the normal numbers.
    near = -(a.astype(np.float64) * b).astype(np.float32) * rng.choice([1, 1 + 2**-12], 3000).astype(np.float32)
    half_way = (
        np.float32([1 + 2**-23, 1 + 2**-12, 3.0]),
        np.float32([2**-24, 2**-12, 2**-25]),
        np.float32([1, 1, 2**-24]),
    )
    tiny = rng.standard_normal((3, 500)).astype(np.float32) * np.float32([[2**-70], [2**-70], [2**-140]])
    for x, y, z in ((a, b, near), (a, b, rng.standard_normal(3000).astype(np.float32)), half_way, tuple(tiny)):
        actual = ARITHMETIC["fma.rn.f32"].function(x, y, z)
        exact = [Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r)) for p, q, r in zip(x, y, z, strict=True)]
        assert all(one == nearest(other) for one, other in zip(actual, exact, strict=True))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_half_precision_is_rounded_as_torch_rounds(kind):
    values = np.concatenate([np.random.default_rng(1).standard_normal(4000) * 10.0**np.arange(-8, 0).repeat(500),
                             [np.inf, -np.inf, 65519, 65520, 3.4e38, 0.0, -0.0]]).astype(np.float32)  # fmt: skip
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    expected = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
    with np.errstate(over="ignore"):
        assert np.array_equal(ARITHMETIC[f"cvt.rn.{kind}.f32"].function(values).view(np.uint16), expected)
        packed = ARITHMETIC[f"cvt.rn.{kind}x2.f32"].function(values[1:], values[:-1])
    assert np.array_equal(packed >> 16, expected[1:]) and np.array_equal(packed & 0xFFFF, expected[:-1])


INTEGERS = {
    "mul.hi.u32": lambda a, b: (a % 2**32) * (b % 2**32) >> 32,
    "mul.wide.s32": lambda a, b: a * b,
    "div.s32": lambda a, b: abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1),
    "shr.s32": lambda a, b: a >> min(b % 2**32, 31),
    "shr.u32": lambda a, b: (a % 2**32) >> min(b % 2**32, 32),
    "shl.b32": lambda a, b: (a << min(b % 2**32, 32)) % 2**32,
}


@pytest.mark.parametrize("opcode", INTEGERS)
def test_integers_are_pythons(opcode):
    values = [0, 1, 2, 31, 32, 33, 7, -1, -2, 2**31 - 1, -(2**31) + 1, 123456789, -987654321]
    known = ARITHMETIC[opcode]
    pairs = [(a, b) for a in values for b in values if b or opcode != "div.s32"]
    a, b = (
        np.array(each, np.int32).view(kind) for each, kind in zip(zip(*pairs, strict=True), known.operands, strict=True)
    )
    bits = 8 * np.dtype(known.result).itemsize
    expected = [INTEGERS[opcode](*pair) % 2**bits for pair in pairs]
    assert [int(x) % 2**bits for x in known.function(a, b)] == expected


def test_bytes_are_picked_as_cudas_manual_describes():
    """CUDA's integer intrinsics, `__byte_perm`, and the sign of PTX's own most significant bit."""
    cells = np.zeros(64, np.uint32)
    picks = {
        "0x3210U": 0x84838281,
        "0x7654U": 0x14131211,
        "0x3340U": 0x84841181,
        "0x5410U": 0x12118281,
        "0xC8F1": 0x00FF0082,
    }
    for selector, expected in picks.items():
        body = f"mov.b32 %r5, 0x84838281; mov.b32 %r6, 0x14131211; prmt.b32 %r7, %r5, %r6, {selector};"
        run(source(body + "st.global.b32 [%rd2], %r7;"), np.zeros(64, np.uint32), cells)
        assert set(cells.tolist()) == {expected}, selector


def test_branches_meet_again_and_a_warp_exchanges():
    first, second = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    body = """
        ld.global.b32 %r5, [%rd1];
        and.b32 %r6, %r5, 1;
        setp.eq.b32 %p1, %r6, 0;
        mov.u32 %r7, 0;
        @%p1 bra $even;
        add.s32 %r7, %r5, 100;
        bra.uni $end;
$even:
        setp.lt.s32 %p2, %r7, 5;
        add.s32 %r7, %r7, 1;
        @%p2 bra $even;
$end:
        shfl.sync.bfly.b32 %r8, %r7, 1, 31, -1;
        st.global.b32 [%rd2], %r8;
    """
    run(source(body), first, second, seed=3)
    kept = [6 if k % 2 == 0 else k + 100 for k in range(64)]
    assert second.tolist() == [kept[k ^ 1] for k in range(64)]


def test_the_instructions_of_all_threads_are_counted():
    # In INDEX and before the loop, in the loop as often as it is gone through, and the `ret`.
    body = """
        and.b32 %r5, %r1, 3;
        setp.eq.b32 %p1, %r5, 0;
$again:
        add.s32 %r5, %r5, 1;
        @%p1 add.s32 %r6, %r1, 1;
        setp.lt.s32 %p2, %r5, 4;
        @%p2 bra $again;
    """
    for seed in (None, 0):
        executed = run(source(body), *np.zeros((2, 3 * 64), np.uint32), 3, seed=seed)
        before = len([line for line in INDEX.splitlines() if line.strip()]) + 2
        assert executed == sum(before + 4 * (4 - k % 4) + 1 for k in range(64)) * 3


def test_blocks_run_in_order_or_in_an_order_drawn_from_the_seed():
    # A block's first thread takes the next number.
    body = """
        setp.eq.b32 %p1, %r1, 0;
        mov.b32 %r6, 1;
        mov.u32 %r5, 0;
        @%p1 atom.global.gpu.relaxed.add.u32 %r5, [%rd10], %r6;
        mul.wide.s32 %rd3, %r2, 4;
        add.s64 %rd4, %rd11, %rd3;
        @%p1 st.global.b32 [%rd4], %r5;
    """
    orders = []
    for seed in (None, 1, 1, 2):
        counter, taken = np.zeros(1, np.uint32), np.full(40, 99, np.uint32)
        run(source(body, index=INDEX), counter, taken, 40, seed=seed)
        assert counter[0] == 40 and sorted(taken) == list(range(40))
        orders.append(taken.tolist())
    assert orders[0] == list(range(40)) and orders[1] == orders[2] != orders[3] != orders[0]


def test_what_is_no_kernel_or_no_grid_is_refused():
    with pytest.raises(ptx.PtxError, match=r"^ptx: 0 kernels with a body"):
        ptx.load(".version 8.7\n.target sm_90a")
    with pytest.raises(ptx.PtxError, match=r"^k: no block size; a kernel needs"):
        ptx.load(source("").replace(".reqntid 64", ""))
    program, memory = ptx.prepare(ptx.load(source(""))), ptx.Memory()
    cells = np.zeros(64, np.uint32)
    memory.add(cells.ctypes.data, cells.nbytes)
    given = (cells.ctypes.data, cells.ctypes.data, 7)
    for grid in ((0, 1, 1), (1, 1)):
        with pytest.raises(ValueError, match=r"^grid: "):
            ptx.launch(program, grid, given, 0, memory)
    with pytest.raises(ValueError, match=r"^parameters: 2 values; k has 3"):
        ptx.launch(program, (1, 1, 1), given[:2], 0, memory)
    with pytest.raises(ptx.PtxError, match="no memory was given at"):
        ptx.launch(program, (1, 1, 1), (cells.ctypes.data + cells.nbytes, *given[1:]), 0, memory)


def test_a_pointer_may_lead_into_the_middle_of_memory():
    cells, memory = np.zeros(100, np.uint32), ptx.Memory()
    memory.add(cells.ctypes.data, cells.nbytes)
    program = ptx.prepare(ptx.load(source("st.global.b32 [%rd1], %r1;")))
    ptx.launch(program, (1, 1, 1), (cells.ctypes.data + 4 * 36, 0, 7), 0, memory)
    assert cells.tolist() == [0] * 36 + list(range(64))
    with pytest.raises(ptx.PtxError, match="outside a tensor of 400 bytes, by 4 bytes"):
        ptx.launch(program, (1, 1, 1), (cells.ctypes.data + 4 * 37, 0, 7), 0, memory)


@pytest.mark.parametrize(
    ("instruction", "why"),
    [
        ("vote.sync.any.pred %p1, %p2, -1", "unknown instruction$"),
        ("sqrt.approx.f32 %r5, %r1", "unknown instruction: .approx is not correctly rounded"),
        ("add.rn.ftz.f32 %r5, %r1, %r1", "unknown instruction: .ftz is not correctly rounded"),
        ("add.f32 %r5, %r1, %r1", "without .rn the assembler may contract it"),
        ("add.s32 %r5, %r1, %rd1", "%rd1 has 64 bits, the instruction takes 32"),
        ("shfl.sync.bfly.b32 %r5, %r1, 1, 31, 65535", "only whole warps take part"),
        ("bar.sync 1", "unknown form"),
    ],
)
def test_what_the_machine_does_not_know_is_an_error_with_its_line(instruction, why):
    text = source(f"    {instruction};")
    line = next(k for k, each in enumerate(text.splitlines(), 1) if instruction in each)
    with pytest.raises(ptx.PtxError, match=rf"^PTX line {line}, {re.escape(instruction)}: .*{why}"):
        ptx.prepare(ptx.load(text))


def test_no_other_inexact_arithmetic_is_allowed():
    inexact = {opcode for opcode in ARITHMETIC if {"approx", "full", "ftz"} & set(opcode.split("."))}
    assert inexact == set(ALLOWED_INEXACT)


def test_memory_beyond_a_tensor_or_misaligned_is_refused():
    # The tensors lie side by side.
    both = np.ones(128, np.uint32)
    with pytest.raises(ptx.PtxError, match=r"st\.global\.b32 .* outside a tensor of 256 bytes, by 4 bytes"):
        run(source("st.global.b32 [%rd1+4], %r1;"), both[:64], both[64:])
    assert both.all()
    refused("outside a tensor of 256 bytes, by -4 bytes", "ld.global.b32 %r5, [%rd1+-4];")
    refused("an address that is no multiple of 4", "ld.global.b32 %r5, [%rd1+2];", size=65)
    refused("an address that is no multiple of 8", "ld.global.v2.b32 {%r5, %r6}, [%rd1];", size=66)
    refused("the address is made of no pointer", "mov.b64 %rd3, 64; ld.global.b32 %r5, [%rd3];")
    refused(
        "outside shared memory of 252 bytes, by 4 bytes", "shl.b32 %r5, %r1, 2; st.shared.b32 [%r5], %r1;", shared=252
    )


def test_what_was_not_written_is_not_read():
    refused("memory is read before it was written", "ld.global.b32 %r5, [%rd1];", unwritten=(0,))
    fill = "setp.ne.b32 %p1, %r1, 9; @%p1 st.global.b32 [%rd1], %r1; ld.global.b32 %r5, [%rd1];"
    refused("memory is read before it was written", fill, unwritten=(0,))
    run(source("st.global.b32 [%rd1], %r1; ld.global.b32 %r5, [%rd1];"), *np.zeros((2, 64), np.uint32), unwritten=(0,))
    shared = "shl.b32 %r5, %r1, 2; st.shared.b16 [%r5], %rs1; bar.sync 0; ld.shared.b32 %r6, [%r5];"
    refused("memory is read before it was written", "mov.u16 %rs1, 1;" + shared, shared=256)
    guarded = "setp.lt.s32 %p1, %r1, 40; @%p1 mov.b32 %r5, 1;"
    refused("a register is read before it was written", guarded + "add.s32 %r6, %r5, 1; st.global.b32 [%rd2], %r6;")
    refused("a register is read before it was written", "setp.lt.s32 %p1, %r9, 40;\n@%p1 bra $end;\n$end:")
    # A half that nothing uses may be rubbish.
    pair = "mov.b64 %rd3, {%r1, %r9}; add.rn.f32x2 %rd4, %rd3, %rd3; mov.b64 {%r5, %r6}, %rd4; st.global.b32 [%rd2], "
    run(source(pair + "%r5;"), *np.zeros((2, 64), np.uint32))
    refused("a register is read before it was written", pair + "%r6;")
    # Those that have it do.
    run(source(guarded + "@%p1 st.global.b32 [%rd2], %r5;"), *np.zeros((2, 64), np.uint32))


def test_a_barrier_is_for_a_whole_block():
    refused(
        r"bar\.sync 0: only part of a block reaches this barrier",
        "setp.lt.s32 %p1, %r1, 32;\n@%p1 bra $end;\nbar.sync 0;\n$end:",
    )
    refused("only part of a warp gets here", """
        setp.lt.s32 %p1, %r1, 3;
        @%p1 bra $end;
        shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;
$end:""")  # fmt: skip


HAND_OVER = """
        setp.ne.b32 %p1, %r1, 0;
        setp.eq.b32 %p4, %r1, 0;
        st.global.b32 [%rd2], %r1;
        {barrier}
        mov.b32 %r6, 1;
        mov.u32 %r5, 0;
        @%p4 atom.global.gpu.{order}.add.u32 %r5, [%rd10], %r6;
        @%p4 st.shared.b32 [global_smem], %r5;
        bar.sync 0;
        ld.shared.b32 %r7, [global_smem];
        add.s32 %r8, %r3, -1;
        setp.ne.b32 %p2, %r7, %r8;
        @%p2 bra $end;
        ld.global.b32 %r9, [%rd11+128];
        mad.wide.s32 %rd5, %r8, 256, %rd11;
        ld.global.b32 %r10, [%rd5+128];
        @%p4 st.global.b32 [%rd10], %r10;
$end:
"""


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize(
    ("barrier", "order", "race"),
    [
        ("bar.sync 0;", "acq_rel", None),
        ("bar.sync 0;", "relaxed", "read of block"),
        ("bar.sync 0;", "acquire", "read of block"),
        ("bar.sync 0;", "release", "read of block"),
        ("", "acq_rel", "read of block"),
    ],
)
def test_the_last_block_reads_what_others_wrote_after_a_release_and_an_acquire_alone(barrier, order, race, seed):
    """Warp 1's stores, read by the block that takes the last ticket: a barrier, a release, an acquire, a barrier."""
    text = source(HAND_OVER.format(barrier=barrier, order=order))
    ticket, cells = np.zeros(64, np.uint32), np.zeros(5 * 64, np.uint32)
    if race is None:
        run(text, ticket, cells, 5, shared=4, seed=seed)
        assert ticket[0] == 32 and cells.tolist() == list(range(64)) * 5
    else:
        with pytest.raises(ptx.PtxError, match=f"a race: {race}"):
            run(text, ticket, cells, 5, shared=4, seed=seed)


def test_blocks_and_warps_that_touch_the_same_memory_race():
    refused("a race: write of block", "st.global.b32 [%rd10], %r1;")
    refused("a race: write of block", "setp.eq.b32 %p1, %r1, 0; @%p1 st.global.b32 [%rd10], %r2;", blocks=2)
    refused(
        "a race: (read|write) of block",
        "setp.eq.b32 %p1, %r1, 0; ld.global.b32 %r5, [%rd10]; bar.sync 0; @%p1 st.global.b32 [%rd10], %r2;",
        blocks=300,
    )
    refused("a race: atomic of block", "st.global.b32 [%rd1], %r1; red.global.gpu.relaxed.add.u32 [%rd10], %r1;")
    # Atomic operations may meet, and one block's accesses are ordered by its barriers.
    fine = """
        red.global.gpu.relaxed.add.u32 [%rd10], %r1;
        st.global.b32 [%rd2], %r1;
        bar.sync 0;
        xor.b32 %r5, %r1, 63;
        mad.lo.s32 %r6, %r2, 64, %r5;
        mad.wide.s32 %rd3, %r6, 4, %rd11;
        ld.global.b32 %r7, [%rd3];
        bar.sync 0;
        st.global.b32 [%rd3], %r7;
    """
    run(source(fine), *np.zeros((2, 128), np.uint32), 2, seed=0)
    shared = "shl.b32 %r5, %r1, 2; xor.b32 %r6, %r5, 128; st.shared.b32 [%r5], %r1;{} ld.shared.b32 %r7, [%r6];"
    refused("a race: read of warp", shared.format(""), shared=256)
    run(source(shared.format("bar.sync 0;")), *np.zeros((2, 64), np.uint32), shared=256)
    refused("a race: write of warp", "st.shared.b32 [global_smem], %r1;", shared=4)
    # What is there already may be stored again.
    run(source("st.shared.b32 [global_smem], %r2;"), *np.zeros((2, 64), np.uint32), shared=4, seed=1)


# Faults planted in the kernels that fastddim compiles.


@pytest.fixture(scope="module")
def device():
    if triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter compiles nothing")
    device = Machine(90, seed=0)
    with device.installed():
        yield device


@pytest.fixture
def plant(device):
    """Sets what is done to the PTX of the launches that follow."""

    def edit(change):
        device.edit = change

    yield edit
    device.edit = None


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(batch=3, elements=5000, limit=None, **options):
    guided = "guidance" in options
    output, x = draw(batch * (1 + guided), elements, seed=1), draw(batch, elements)
    return fastddim.ddim_step(output, x, options.pop("table", TABLE), options.pop("step", 4), limit=limit, backend="triton",
                              **options)  # fmt: skip


def replace(pattern, replacement, count=0):
    def edit(text):
        edited, changes = re.subn(pattern, replacement, text, count=count)
        assert changes, pattern
        return edited

    return edit


def test_a_fused_operation_in_two_roundings_is_found(plant):
    row = torch.tensor([[0.0, 1.0, 0.3, 0.0, 1.0, 0.0]])
    x, output = draw(2, 500), draw(2, 500, seed=1)
    exact = [
        nearest(Fraction(float(row[0, 2])) * Fraction(float(a)) + Fraction(float(b)))
        for a, b in zip(x.flatten(), output.flatten(), strict=True)
    ]
    take = lambda: fastddim.ddim_step(output, x, row, 0, backend="triton")[0].flatten().numpy()  # noqa: E731
    assert np.array_equal(take(), exact)

    def split(text):
        text = re.sub(
            r"fma\.rn\.f32 \t?(\S+), (\S+), (\S+), (\S+);",
            r"mul.rn.f32 %planted1, \2, \3; add.rn.f32 \1, %planted1, \4;",
            text.replace("fma.rn.f32 \t", "fma.rn.f32 "),
        )
        assert "%planted1" in text
        return text.replace(".reg .pred", ".reg .f32 %planted<2>;\n\t.reg .pred", 1)

    plant(split)
    assert not np.array_equal(take(), exact)


def test_an_element_past_the_end_is_found(plant):
    for opcode, elements in ((r"st\.global\.b32", 323), (r"ld\.global\.b32", 323), (r"st\.global\.v4\.b32", 2048)):
        plant(None)
        step(1, elements)
        plant(replace(rf"({opcode} .*?\[ %rd\d+ \+ )0 \]", r"\g<1>4 ]"))
        with pytest.raises(ptx.PtxError, match=r"outside a tensor of \d+ bytes, by 4 bytes|no multiple of 16"):
            step(1, elements)


def advance():
    """The state after a step that moves its index on."""
    return step(step=torch.tensor(3), advance=True, workspace=Workspace())


# Some versions of Triton put one behind the other.
BARRIERS = r"(?:bar\.sync\s+0;\s*)+"
WITH_TICKETS = {
    "the index": advance,
    "a histogram": lambda: step(2, 20001, DynamicThreshold(0.9, 1.5)),
    "deviations": lambda: step(2, 20001, guidance=Guidance(2.0, 0.7)),
}


@pytest.mark.parametrize("name", WITH_TICKETS)
def test_a_ticket_without_order_and_one_without_its_barrier_are_found(plant, name):
    WITH_TICKETS[name]()
    orderings = ["atom.global.gpu.relaxed", "atom.global.gpu.release", "atom.global.cta.acq_rel"]
    changes = [lambda text, order=order: text.replace("atom.global.gpu.acq_rel", order) for order in orderings]
    for change in (*changes, without_barrier):
        plant(change)
        with pytest.raises(ptx.PtxError, match="a race: "):
            WITH_TICKETS[name]()


def without_barrier(text):
    """What lies between a kernel's last access to global memory and the ticket that tells of it, without barriers."""
    ticket = text.find("atom.global.gpu.acq_rel")
    if ticket < 0:
        return text
    start = max(
        text.rindex(name, 0, ticket)
        for name in (".global.b", "global.gpu.relaxed", ".global.v")
        if name in text[:ticket]
    )
    return text[:start] + re.sub(BARRIERS, "", text[start:ticket]) + text[ticket:]


def test_a_reduction_without_any_of_its_barriers_is_found(plant):
    take = lambda: step(2, 3000, DynamicThreshold(0.9, 1.5), guidance=Guidance(2.0, 0.7))  # noqa: E731
    seen = []
    plant(lambda text: seen.append(text) or text)
    expected = take()
    barriers = [found.span() for found in re.finditer(BARRIERS, seen[0])]
    found = 0
    for start, end in barriers:
        plant(lambda text, start=start, end=end: text[:start] + text[end:])
        try:
            actual = take()
        except ptx.PtxError as error:
            found += "a race: " in str(error)
        else:
            # Another barrier is near, as Triton's own beside one of the kernel's.
            assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert found >= 0.7 * len(barriers) > 8


def test_results_that_are_read_before_they_are_written_are_found(plant):
    def edit(text):
        """The state's pointer is that of the next state."""
        return re.sub(r"\[(\w+)_param_1\]", r"[\1_param_4]", text)

    step(limit=Clip())
    plant(edit)
    with pytest.raises(ptx.PtxError, match="memory is read before it was written"):
        step(limit=Clip())


def test_an_instruction_that_is_not_exact_is_found(plant):
    table = StepTable.build(SCHEDULE, SCHEDULE.pairs(10), eta=1.0)
    step(seeds=seed_tensor(range(3)), table=table)
    plant(replace(r"sqrt\.rn\.f32", "sqrt.approx.f32"))
    with pytest.raises(ptx.PtxError, match=r"^PTX line \d+, sqrt\.approx\.f32 .*: unknown instruction: .approx is not"):
        step(seeds=seed_tensor(range(3)), table=table)
