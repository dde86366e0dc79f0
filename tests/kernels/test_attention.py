from functools import partial

import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import attention_shapes
from torch.library import opcheck

from fusedit.benchmarks.accuracy import poisoned
from fusedit.kernels import attention as module
from fusedit.kernels.attention import attention, attention_reference, parts

HALVES = [torch.bfloat16, torch.float16]
FORMS = pytest.mark.parametrize("form", ["qkv", "q kv", "q k v"])
LONG, SHORT = 131, 77  # keys: one more than what a program holds, and what CLIP gives
# What more keys do is held by the tests of accuracy; interpreted they take seconds each.
LONG_IS_SLOW = pytest.param(LONG, marks=[] if torch.cuda.is_available() else pytest.mark.slow)


def made(form, heads, width, queries, keys, dtype, device, *, batch=2, spread=1.0):
    """Inputs by name, all with gradients."""
    sizes = {"q": (queries,), "k": (keys,), "v": (keys,), "kv": (keys, 2), "qkv": (queries, 3)}
    inputs = {}
    for name in form.split():
        shape = batch, *sizes[name], heads, width
        inputs[name] = spread * torch.randn(shape, dtype=dtype, device=device)
    return {name: value.requires_grad_() for name, value in inputs.items()}


def ours(scale=None, **inputs):
    return attention(*inputs.values(), scale=scale)


def definition(scale=None, **inputs):
    return attention_reference(*inputs.values(), scale=scale)


def results(inputs, direction, function=ours):
    """The output, then the gradient of each input."""
    out = function(**inputs)
    return [out, *torch.autograd.grad(out, [*inputs.values()], direction)]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def with_blocks(monkeypatch, **changes):
    """Launches every kernel with some of its blocks changed."""
    pick = module.pick

    def changed(kernel, device, **sizes):
        blocks = pick(kernel, device, **sizes)
        return blocks | {name: value for name, value in changes.items() if name in blocks}

    monkeypatch.setattr(module, "pick", changed)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", attention_shapes(), ids=str)
def test_matches_pytorch(shape, dtype, device):
    heads, width, queries, keys = shape
    form = "qkv" if queries == keys else "q kv"
    inputs = made(form, heads, width, queries, keys, dtype, device)
    assert_as_accurate_as_torch(ours, definition, inputs)


@FORMS
@pytest.mark.parametrize("keys", [SHORT, LONG_IS_SLOW])
def test_projections_come_in_one_two_or_three_tensors(form, keys, device):
    inputs = made(form, 3, 40, keys, keys, torch.bfloat16, device)
    assert_as_accurate_as_torch(ours, definition, inputs)
    direction = torch.ones(2, keys, 3, 40, dtype=torch.bfloat16, device=device)
    assert all(grad.is_contiguous() for grad in results(inputs, direction)[1:])


@pytest.mark.parametrize("width", [8, 16, 24, 48, 56, 72, 96, 120, 128, 136, 152])
@pytest.mark.parametrize("keys", [SHORT, LONG])
def test_any_width_of_eights(width, keys, device):
    inputs = made("q kv", 1, width, 33, keys, torch.float16, device, batch=1)
    assert_as_accurate_as_torch(ours, definition, inputs)


@pytest.mark.parametrize(
    ("width", "keys", "short"),
    [(160, 80, True), (160, 81, False), (96, 128, True), (8, 129, False)],
)
def test_a_program_holds_all_keys_where_they_fit(width, keys, short, device):
    inputs = made("q kv", 1, width, 33, keys, torch.bfloat16, device, batch=1)
    assert module._is_short(inputs["kv"].select(2, 0)) == short
    assert_as_accurate_as_torch(ours, definition, inputs)


@pytest.mark.parametrize("queries", [1, 15, 127, 128, 129, 257])
@pytest.mark.parametrize("keys", [2, 15, 63, 65, 128, 129, 200])
def test_lengths_that_no_tile_divides(queries, keys, device):
    inputs = made("q kv", 1, 40, queries, keys, torch.bfloat16, device, batch=1)
    assert_as_accurate_as_torch(ours, definition, inputs)


@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    width=st.integers(1, 20).map(lambda eights: 8 * eights),
    queries=st.integers(1, 150),
    keys=st.integers(2, 150),
    dtype=st.sampled_from(HALVES),
)
@settings(max_examples=15, deadline=None)
def test_any_shape(batch, heads, width, queries, keys, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = made("q k v", heads, width, queries, keys, dtype, device, batch=batch)
    assert_as_accurate_as_torch(ours, definition, inputs)


@pytest.mark.parametrize("keys", [SHORT, LONG])
@pytest.mark.parametrize(
    "blocks", [{"SPLIT": 0, "SPLIT_KEYS": 0}, {"QUERIES": 64, "KEYS": 32}], ids=str
)
def test_whatever_the_table_says(blocks, keys, device, monkeypatch):
    with_blocks(monkeypatch, **blocks)
    inputs = made("q kv", 2, 40, 100, keys, torch.bfloat16, device)
    assert_as_accurate_as_torch(ours, definition, inputs)


@pytest.mark.parametrize(("programs", "of_head"), [(1, 1), (6, 3), (1000, 5)])
def test_programs_of_a_head_share_its_queries(programs, of_head, device, monkeypatch, launches):
    with_blocks(monkeypatch, PROGRAMS=programs, QUERIES=64)
    inputs = made("q kv", 2, 40, 300, SHORT, torch.bfloat16, device, batch=1)
    assert_as_accurate_as_torch(ours, definition, inputs)
    assert launches.count("sum_kernel") == (of_head > 1)
    plan = module._plan("short_backward", inputs["q"], inputs["kv"].select(2, 0))
    assert plan.programs == of_head


@pytest.mark.parametrize("dtype", HALVES)
def test_one_key_is_the_answer(dtype, device):
    inputs = made("q kv", 2, 40, 70, 1, dtype, device)
    direction = torch.randn_like(inputs["q"])
    out, grad_q, grad_kv = results(inputs, direction)
    assert torch.equal(out, inputs["kv"][:, :, 1].expand_as(out))
    assert grad_q.abs().max() < 1e-5  # what cancels in fp32
    assert grad_kv[:, :, 0].abs().max() < 1e-3
    torch.testing.assert_close(grad_kv[:, 0, 1], direction.float().sum(1).to(dtype))


@pytest.mark.parametrize("keys", [SHORT, LONG])
@pytest.mark.parametrize("dtype", HALVES)
def test_logits_of_ten_thousand(dtype, keys, device):
    inputs = made("q kv", 1, 64, 70, keys, dtype, device)
    logits = inputs["q"][0, :, 0] @ inputs["kv"][0, :, 0, 0].T
    scale = 1e4 / float(logits.detach().abs().max())
    assert_as_accurate_as_torch(partial(ours, scale), partial(definition, scale), inputs)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("keys", [SHORT, LONG])
def test_all_logits_of_a_row_are_far_from_zero(sign, keys, device):
    inputs = made("q kv", 1, 64, 70, keys, torch.float16, device)
    with torch.no_grad():  # 64 * 12 * 13 and as much again by scale
        inputs["q"].fill_(12.0)
        inputs["kv"][:, :, 0] = sign * (13 + 0.01 * inputs["kv"][:, :, 0])
    assert_as_accurate_as_torch(partial(ours, 1.0), partial(definition, 1.0), inputs)


@pytest.mark.parametrize("scale", [0.01, 1.0])
@pytest.mark.parametrize("keys", [SHORT, LONG])
def test_scale_is_the_callers(scale, keys, device):
    inputs = made("q kv", 2, 40, 50, keys, torch.bfloat16, device)
    assert_as_accurate_as_torch(partial(ours, scale), partial(definition, scale), inputs)


@pytest.mark.parametrize("keys", [SHORT, LONG])
def test_the_order_of_keys_does_not_matter(keys, device):
    inputs = made("q kv", 2, 80, 50, keys, torch.bfloat16, device)
    order = torch.randperm(keys, device=device)
    shuffled = inputs | {"kv": inputs["kv"].detach()[:, order].requires_grad_()}
    direction = torch.randn_like(inputs["q"])
    out, grad_q, grad_kv = results(inputs, direction)
    expected = [out, grad_q, grad_kv[:, order]]
    for first, second in zip(expected, results(shuffled, direction), strict=True):
        torch.testing.assert_close(first, second, rtol=2e-2, atol=1e-2 * float(first.abs().max()))


@pytest.mark.parametrize("keys", [SHORT, LONG])
def test_the_bits_are_the_same_on_every_run(keys, device):
    inputs = made("q kv", 2, 40, 300, keys, torch.bfloat16, device)
    direction = torch.randn_like(inputs["q"])
    first, *others = [results(inputs, direction) for _ in range(3)]
    assert all(same_bits(first, other) for other in others)


@pytest.mark.parametrize("keys", [SHORT, LONG])
def test_a_query_that_is_not_finite_spoils_itself_alone(keys, device):
    inputs = made("q kv", 1, 40, 50, keys, torch.bfloat16, device)
    with torch.no_grad():
        inputs["q"][1, 7] = torch.inf
    finite = ours(**inputs).isfinite().all(dim=(2, 3))
    assert (~finite).nonzero().tolist() == [[1, 7]]


@pytest.mark.parametrize("form", ["qkv", "q kv"])
def test_only_the_output_and_the_log_sum_exp_are_kept(form, device):
    inputs = made(form, 2, 40, 200, 200, torch.bfloat16, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.append(tuple(value.shape)) or value, lambda value: value
    ):
        out = ours(**inputs)
    own = [tuple(value.shape) for value in inputs.values()]
    assert kept == [*own, tuple(out.shape), (2, 2, 200)]


@pytest.mark.parametrize(
    ("width", "keys", "expected"),
    [
        (40, LONG, ["forward_kernel", "backward_queries_kernel", "backward_keys_kernel"]),
        (40, SHORT, ["forward_kernel", "backward_kernel"]),
        (160, SHORT, ["forward_kernel", "backward_queries_kernel", "backward_keys_kernel"]),
    ],
)
def test_how_many_kernels_run(width, keys, expected, device, launches):
    inputs = made("q kv", 1, width, 60, keys, torch.bfloat16, device)
    ours(**inputs).sum().backward()
    assert list(launches) == expected


def test_fp32_is_the_definitions(device, launches):
    inputs = made("q kv", 2, 40, 20, SHORT, torch.float32, device)
    assert torch.equal(ours(**inputs), definition(**inputs))
    assert not launches


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0)])
@pytest.mark.parametrize("keys", [SHORT, LONG])
def test_nothing_to_do(batch, queries, keys, device):
    inputs = made("q kv", 2, 40, queries, keys, torch.bfloat16, device, batch=batch)
    with poisoned():
        out = ours(**inputs)
        out.sum().backward()
    assert out.shape == (batch, queries, 2, 40)
    assert all(torch.equal(v.grad, torch.zeros_like(v)) for v in inputs.values())


@pytest.mark.parametrize("keys", [SHORT, LONG])
def test_strides_and_addresses_of_any_kind(keys, device):
    wide = torch.randn(2, 3, keys, 2, 5, 48, dtype=torch.bfloat16, device=device)
    views = (
        wide[:, 0, :, :, :3, :40],  # heads apart by more than their width
        wide[:, 1, :, :, :3, 3:43],  # at no multiple of 16 bytes
        wide[:, :, :, 0, 1].permute(0, 2, 1, 3)[..., :40].unsqueeze(2).expand(2, keys, 2, 3, 40),
        wide.flatten()[1 : 1 + 2 * keys * 2 * 3 * 40].view(2, keys, 2, 3, 40),
        wide[:, 2].transpose(-1, -2)[:, :, :, :40, :3].transpose(-1, -2),
        wide.flatten().as_strided((2, keys, 2, 3, 40), (248 * keys, 244, 120, 40, 1)),
    )
    for view in views:
        assert view.shape == (2, keys, 2, 3, 40)
        inputs = made("q kv", 3, 40, 30, keys, torch.bfloat16, device)
        inputs["kv"] = view.detach().requires_grad_()
        assert_as_accurate_as_torch(ours, definition, inputs)
    inputs = made("q k v", 3, 40, 30, keys, torch.bfloat16, device)  # k and v lie differently
    inputs["k"] = views[3][:, :, 0].detach().requires_grad_()
    assert_as_accurate_as_torch(ours, definition, inputs)


def test_a_strided_output_gradient(device):
    inputs = made("q kv", 2, 40, 30, SHORT, torch.bfloat16, device)
    assert_as_accurate_as_torch(
        lambda **inputs: ours(**inputs).transpose(1, 2).contiguous(),
        lambda **inputs: definition(**inputs).transpose(1, 2).contiguous(),
        inputs,
    )


def test_samples_and_rows_may_lie_far_apart(device):
    memory = torch.empty(2**31 + 2**20, dtype=torch.float16, device=device)  # touched in places
    for keys in (7, LONG):
        kv = torch.randn(2, keys, 2, 1, 16, dtype=torch.float16, device=device)
        for strides in ((2**31 + 64, 16, 16, 1), (64, 2**29 - 8, 16, 1)):
            q = memory.as_strided((2, 4, 1, 16), strides).normal_()
            torch.testing.assert_close(
                attention(q, kv), attention_reference(q, kv), rtol=1e-2, atol=1e-2
            )
    with pytest.raises(ValueError, match="a sample of q spans 2147483648 elements or more"):
        attention(memory.as_strided((1, 4, 1, 16), (1, 2**29, 16, 1)), kv[:1])


@FORMS
@pytest.mark.parametrize("keys", [16, LONG_IS_SLOW])
def test_opcheck(form, keys, device):
    first, *others = made(form, 2, 16, keys, keys, torch.float16, device).values()
    opcheck(module._attention, (first, others, 0.25))
    with torch.no_grad():
        out, lse = module._attention(first, others, 0.25)
        projections = [value.detach() for value in (first, *others)]
    opcheck(module._attention_backward, (torch.randn_like(out), projections, out, lse, 0.25))


@FORMS
@pytest.mark.parametrize("keys", [SHORT, LONG_IS_SLOW])
def test_compiles_whole(form, keys, device, launches):
    inputs = made(form, 2, 40, keys, keys, torch.bfloat16, device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    direction = torch.randn(2, keys, 2, 40, dtype=torch.bfloat16, device=device)
    assert same_bits(results(inputs, direction), results(inputs, direction, compiled))
    assert launches.count("forward_kernel") == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("keys", [SHORT, 1024])
def test_is_captured_in_a_graph(keys):
    inputs = made("q kv", 8, 40, 1024, keys, torch.bfloat16, "cuda")
    direction = torch.randn_like(inputs["q"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(inputs, direction)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(inputs, direction)
    with torch.no_grad():
        for value in inputs.values():
            value.normal_()
    graph.replay()
    assert same_bits(captured, results(inputs, direction))


@pytest.mark.parametrize(
    ("size", "split", "expected"),
    [
        (40, True, (32, 16)), (80, True, (64, 16)), (160, True, (128, 32)), (77, True, (64, 16)),
        (64, True, (64, 0)), (56, True, (64, 0)), (96, True, (64, 32)), (1, True, (16, 0)),
        (40, False, (64, 0)), (160, False, (256, 0)), (24, True, (32, 0)), (136, True, (128, 32)),
    ],
)  # fmt: skip
def test_sizes_are_held_in_powers_of_two(size, split, expected):
    assert parts(size, split=split) == expected


def projections(*shapes, dtype=torch.bfloat16):
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("given", "scale", "error", "message"),
    [
        ([], None, ValueError, "takes qkv, q and kv, or q, k and v; got 0"),
        (projections((1, 2, 1, 8)), None, ValueError, r"qkv must be \[n, rows, 3, heads, width\]"),
        (projections((1, 2, 2, 1, 8)), None, ValueError, r"qkv must be \[1, 2, 3, 1, 8\], got"),
        (projections((1, 2, 1, 8), (1, 4, 2, 2, 8)), None, ValueError, r"kv must be \[1, 4, 2, 1,"),
        (projections((1, 2, 1, 8), (1, 4, 1, 8), (1, 5, 1, 8)), None, ValueError,
         r"v must be \[1, 4, 1, 8\], got \[1, 5, 1, 8\]"),
        (projections((1, 2, 1, 12), (1, 4, 2, 1, 12)), None, ValueError, "multiple of 8 up to 160"),
        (projections((1, 2, 1, 168), (1, 4, 2, 1, 168)), None, ValueError, "160, got 168"),
        (projections((1, 2, 1, 8), (1, 0, 2, 1, 8)), None, ValueError, "kv must have a row"),
        (projections((1, 2, 3, 1, 8)), 0.0, ValueError, "scale must be finite and above"),
        (projections((1, 2, 3, 1, 8)), float("nan"), ValueError, "scale must be finite"),
        (projections((1, 2, 3, 1, 8)), 1e-46, ValueError, "finite and above 1.2e-38, got 1e-46"),
        (projections((1, 2, 3, 1, 8), dtype=torch.float64), None, TypeError, "must be fp32, bf16"),
        (projections((1, 2, 1, 8)) + projections((1, 4, 2, 1, 8), dtype=torch.float16), None,
         TypeError, "kv must be torch.bfloat16"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused(given, scale, error, message):
    with pytest.raises(error, match=message):
        attention(*given, scale=scale)
