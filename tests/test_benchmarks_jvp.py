"""The jvp benchmark on tiny sizes: its gate, its records, what it refuses. Nothing here asserts a time."""

from __future__ import annotations

import json

import pytest
import torch

import fastdensity as fd
from benchmarks import jvp, jvp_cases, jvp_memory, jvp_peers

MAKES = {
    "mlp": lambda: jvp_cases.mlp(2, width=16, layers=3, batch=4),
    "dit block": lambda: jvp_cases.dit_block(2, width=16, heads=2, tokens=6, batch=2),
    "attention": lambda: jvp_cases.attention(12, batch=2, size=8),
}


@pytest.fixture(autouse=True)
def without_grad():
    with torch.no_grad():
        yield


def eager(case):
    case.compiled = False
    return case


@pytest.mark.parametrize("name", MAKES)
def test_record_holds_times_errors_and_targets(name, capsys):
    case = eager(MAKES[name]())
    record = jvp.case_record(case, rounds=1)
    timed = {"fastdensity", "func.jvp per tangent", "vmap(jvp)", "floor"}
    assert set(record["median_seconds"]) == timed
    assert all(seconds > 0 for seconds in record["median_seconds"].values())
    assert set(record["relative_errors"]) == timed - {"floor"}
    assert all(0 <= error < 1e-5 for errors in record["relative_errors"].values() for error in errors)
    assert len(record["targets"]) == len(case.targets)
    assert record["failed"] == {}
    assert record["rounds"] == 1
    json.dumps(record)
    jvp.print_table([record])
    assert case.name in capsys.readouterr().out


def test_gate_refuses_to_time_a_wrong_result():
    case = eager(MAKES["mlp"]())
    vectors = case.vectors()
    value, tangents = fd.jvp(case.fn, case.primals, vectors)
    variants = {"fastdensity": lambda: (value, tangents * (1 + 1e-3)), **jvp_peers.rivals(case, vectors, False)}
    with pytest.raises(SystemExit, match=r"wrong on MLP .*tangents.*not timed"):
        jvp.gate(case, variants, vectors)


def test_gate_leaves_out_rivals_that_fail_or_are_wrong():
    case = eager(MAKES["mlp"]())
    vectors = case.vectors()
    value, tangents = fd.jvp(case.fn, case.primals, vectors)

    def fails():
        raise NotImplementedError("no forward mode\n  here")

    variants = {
        "fastdensity": lambda: (value, tangents),
        **jvp_peers.rivals(case, vectors, False),
        "fails": fails,
        "zero": lambda: (value, torch.zeros_like(tangents)),
    }
    errors, failed = jvp.gate(case, variants, vectors)
    assert set(failed) == {"fails", "zero"}
    assert failed["fails"] == "NotImplementedError: no forward mode here"
    assert failed["zero"].startswith("wrong")
    assert errors["zero"][1] == 1.0


def test_rivals_on_group_norm_agree_however_it_is_written():
    norm = torch.nn.GroupNorm(2, 4)
    x = torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last)
    results = []
    for compiled in (False, True):
        with jvp_peers.helped(compiled):
            results.append(jvp_peers.one_jvp(norm, (x,), torch.ones_like(x) * x.sin()))
    torch.testing.assert_close(*results)
    assert torch.nn.GroupNorm.forward.__module__.startswith("torch")


def test_targets_are_held_against_the_floor_and_the_fastest_rival():
    case = eager(MAKES["dit block"]())
    seconds = {"fastdensity": 2.0, "vmap(jvp)": 3.0, "func.jvp per tangent": 5.0, "floor": 1.9}
    rival, floor = jvp.targets_of(case, seconds)
    assert rival["reached"] == 1.5
    assert "vmap(jvp)" in rival["wanted"]
    assert not rival["met"]
    assert floor["reached"] == pytest.approx(2.0 / 1.9)
    assert floor["met"]


def test_overhead_and_trace_records():
    case = MAKES["mlp"]()
    trace, overhead = jvp.trace_record(case), jvp.overhead_record(case, calls=2, repeats=1)
    assert trace["median_seconds"]["fd.trace_jvp"] > 0
    assert overhead["median_seconds"]["fd.jvp without its graph"] > 0
    value, _ = fd.jvp(case.fn, case.primals, case.vectors())  # the graph is back
    torch.testing.assert_close(value, case.fn(*case.primals))


def test_memory_is_that_of_the_call_and_not_of_the_process_that_asks():
    held = torch.ones(2**27)
    assert jvp_memory.peak_bytes("func.jvp", 512) > 8 * 512 * 512 * held.itemsize
