# SPDX-License-Identifier: Apache-2.0
"""Allocation: the law of the knapsack by brute force, the metrics, measuring without a trace."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
import tiny
import torch
from torch import nn

from dtq.allocate import parse_budget
from dtq.allocate.allocation import choose
from dtq.allocate.knapsack import LIMIT, Option, knapsack
from dtq.allocate.measure import measure, sensitivities
from dtq.allocate.metrics import GROUPS, METRICS, groups_of
from dtq.errors import InputError
from dtq.models import ROLES, InputGroup, Linear
from dtq.pipelines.recorded_calls import RecordedCall, subsample

# --- knapsack --------------------------------------------------------------------------------


def cost(choice) -> int:
    return sum(option.cost for option in choice.values())


def sensitivity(choice) -> float:
    return math.fsum(option.sensitivity for option in choice.values())


def tables(kind: str, rng: random.Random, items: int, options: int):
    """Random instances: costs and sensitivities unrelated, convex, or from a few values."""
    draw = {
        "any": lambda k: Option(f"o{k}", rng.randint(1, 50), rng.random()),
        "convex": lambda k: Option(f"o{k}", 10 * (k + 1), 4.0**-k),
        "ties": lambda k: Option(f"o{k}", rng.choice((2, 4, 4, 8)), rng.choice((0.0, 0.1, 0.3))),
        "wide": lambda k: Option(f"o{k}", rng.randint(1, 10**9), 10 ** rng.uniform(-9, 0)),
    }[kind]
    result = {}
    for i in range(items):
        scale = 1.0 if kind == "ties" else rng.uniform(0.1, 10)
        drawn = [draw(k) for k in range(options)]
        result[f"i{i}"] = [Option(o.name, o.cost, scale * o.sensitivity) for o in drawn]
    return result


def all_choices(items):
    """Every choice there is, as (sensitivity, cost, picks), by brute force."""
    for picks in itertools.product(*items.values()):
        yield math.fsum(o.sensitivity for o in picks), sum(o.cost for o in picks), picks


def budgets(items, count: int = 7) -> list[int]:
    least = sum(min(o.cost for o in options) for options in items.values())
    most = sum(max(o.cost for o in options) for options in items.values())
    return [least + (most - least) * i // (count - 1) for i in range(count)]


@pytest.mark.parametrize("kind", ["any", "convex", "ties", "wide"])
def test_optimum_by_brute_force(kind):
    rng = random.Random(kind)
    for _ in range(40):
        items = tables(kind, rng, rng.randint(1, 5), rng.randint(1, 4))
        choices = list(all_choices(items))
        for budget in budgets(items):
            chosen = knapsack(items, budget)
            best = min(d for d, c, _ in choices if c <= budget)
            assert list(chosen) == list(items)
            assert all(chosen[item] in items[item] for item in items)
            assert cost(chosen) <= budget
            assert sensitivity(chosen) == pytest.approx(best, rel=1e-12, abs=1e-15)
            # and nothing as good is cheaper
            assert cost(chosen) == min(c for d, c, _ in choices if d <= sensitivity(chosen) + 1e-15)


@pytest.mark.parametrize("kind", ["any", "convex", "ties", "wide"])
@pytest.mark.parametrize("limit", [1, 5])
def test_thinned_is_optimal_up_to_one_item(kind, limit):
    rng = random.Random(kind)
    for _ in range(40):
        items = tables(kind, rng, 5, 4)
        choices = list(all_choices(items))
        # what one upgrade can save at most
        step = max(
            max(o.sensitivity for o in t) - min(o.sensitivity for o in t) for t in items.values()
        )
        for budget in budgets(items):
            chosen = knapsack(items, budget, limit=limit)
            assert cost(chosen) <= budget
            best = min(d for d, c, _ in choices if c <= budget)
            assert sensitivity(chosen) <= best + step + 1e-12


def network(seed: int, count: int = 200):
    """Input groups of one DiT-like network in five formats."""
    rng = random.Random(seed)
    items = {}
    for i in range(count):
        weights = 1152 * 1152 * (3, 1, 4, 4, 1)[i % 5]
        scale = 10 ** rng.uniform(-6, -2)
        items[f"i{i}"] = [
            Option(f"b{b}", int(weights * b / 8), scale * 4.0**-b * rng.uniform(0.3, 3))
            for b in (2.25, 3.25, 4.25, 6.5, 8.25)
        ]
    return items


def relaxed(items, budget: int) -> float:
    """The linear relaxation: options may be mixed; no choice is better. By its dual."""

    def dual(price: float) -> float:
        return (
            sum(min(o.sensitivity + price * o.cost for o in t) for t in items.values())
            - price * budget
        )

    return max(dual(10 ** (e / 200)) for e in range(-3200, -1200))


@pytest.mark.parametrize(("limit", "loss"), [(1, 0.02), (4096, 0.0025), (LIMIT, 0.001)])
def test_large_is_near_the_relaxation_and_monotone(limit, loss):
    items, last = network(0), math.inf
    for budget in budgets(items, 5)[1:4]:
        chosen = knapsack(items, budget, limit=limit)
        assert cost(chosen) <= budget
        assert 1 <= sensitivity(chosen) / relaxed(items, budget) <= 1 + loss
        assert sensitivity(chosen) <= last
        last = sensitivity(chosen)


@pytest.mark.parametrize("limit", [1, 4, 4096])
def test_monotone_in_budget(limit):
    rng = random.Random(limit)
    for kind in ("any", "convex", "ties", "wide"):
        items = tables(kind, rng, 8, 4)
        sums = [sensitivity(knapsack(items, b, limit=limit)) for b in budgets(items, 60)]
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(sums))


def test_monotone_in_sensitivity():
    rng = random.Random(0)
    for _ in range(50):
        shape = [(2, rng.uniform(1, 2)), (4, rng.uniform(0.1, 1)), (8, 0.0)]
        scales = [rng.uniform(0.1, 10) for _ in range(5)]
        items = {
            f"i{i}": [Option(f"o{c}", c, s * d) for c, d in shape] for i, s in enumerate(scales)
        }
        for budget in range(10, 41, 3):
            chosen = knapsack(items, budget)
            by_need = [chosen[f"i{i}"].cost for i in sorted(range(5), key=lambda i: scales[i])]
            assert by_need == sorted(by_need)
            # two items that swap their sensitivities swap their options
            swapped = knapsack({**items, "i0": items["i1"], "i1": items["i0"]}, budget)
            assert (swapped["i0"], swapped["i1"]) == (chosen["i1"], chosen["i0"])


def test_equal_sensitivities_upgrade_the_cheapest_first():
    sizes = [7, 3, 11, 5, 2]
    items = {f"i{n}": [Option("low", n, 1.0), Option("high", 2 * n, 0.25)] for n in sizes}
    for raised in range(6):
        cheapest = sorted(sizes)[:raised]
        chosen = knapsack(items, sum(sizes) + sum(cheapest))
        assert sorted(int(i[1:]) for i, o in chosen.items() if o.name == "high") == cheapest


def test_too_small_names_the_smallest_budget():
    items = {"a": [Option("x", 300, 1.0), Option("y", 500, 0.0)], "b": [Option("x", 33, 1.0)]}
    with pytest.raises(InputError, match=r"200 bytes .* at least 333 bytes \(2\.664 bits"):
        knapsack(items, 200, weights=1000)
    assert cost(knapsack(items, parse_budget("2.664", 1000))) == 333
    with pytest.raises(InputError, match=r"at least 333 bytes\. Raise it"):
        knapsack(items, 332)


def test_infinite_sensitivity_is_never_chosen():
    items = {"a": [Option("x", 1, math.inf), Option("y", 5, 2.0)], "b": [Option("x", 1, 1.0)]}
    assert knapsack(items, 10)["a"].name == "y"
    with pytest.raises(InputError, match="at least 6 bytes"):
        knapsack(items, 5)
    with pytest.raises(InputError, match=r"^a, b: no option gives finite"):
        knapsack({"a": [Option("x", 1, math.inf)], "b": [Option("x", 1, math.nan)]}, 9)


# --- metrics ---------------------------------------------------------------------------------

SHAPES = {"image": (2, 4, 8, 8), "video": (2, 4, 5, 8, 8), "tokens": (2, 64, 16)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", METRICS)
def test_metric_laws(name, shape):
    torch.manual_seed(0)
    metric, reference, noise = METRICS[name], torch.randn(shape), torch.randn(shape)
    assert metric(reference, reference) == 0
    small, large = (
        metric(reference, reference + 0.01 * noise),
        metric(reference, reference + 0.02 * noise),
    )
    assert large == pytest.approx(4 * small, rel=1e-3)  # squared
    assert 0.1e-4 < small < 10e-4  # relative
    assert metric(7 * reference, 7 * (reference + 0.01 * noise)) == pytest.approx(small, rel=1e-3)
    for bad in (math.nan, math.inf):
        broken = reference.clone()
        broken[(0,) * reference.ndim] = bad
        assert metric(reference, broken) == math.inf


def test_metrics_see_what_they_are_for():
    torch.manual_seed(0)
    reference = torch.randn(2, 4, 6, 8, 8)
    checker = ((torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1).expand_as(reference)
    shift = torch.ones_like(reference)
    flicker = torch.tensor([1.0, -1.0]).repeat(3)[:, None, None].expand_as(reference)
    both = torch.randn(1, 4, 6, 8, 8).expand_as(reference)  # the same in both halves of guidance

    def errors_of(error):
        return {
            name: metric(reference, reference + 0.1 * error) for name, metric in METRICS.items()
        }

    assert errors_of(shift)["content"] > 100 * errors_of(shift)["fidelity"]
    assert errors_of(checker)["fidelity"] > 100 * errors_of(checker)["content"]
    assert errors_of(flicker)["temporal"] > 100 * errors_of(flicker)["fidelity"]
    assert errors_of(shift)["temporal"] < 1e-12
    assert errors_of(both)["text"] < 1e-12 < errors_of(both)["mse"]


def test_metrics_fall_back():
    torch.manual_seed(0)
    reference, output = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    assert METRICS["temporal"](reference, output) == METRICS["fidelity"](reference, output)
    assert METRICS["text"](reference, output) == METRICS["content"](reference, output)
    one = torch.randn(1, 4, 1, 1), torch.randn(1, 4, 1, 1)
    assert METRICS["fidelity"](*one) == METRICS["mse"](*one)


def test_components_without_energy_stay_finite():
    still = torch.randn(1, 4, 1, 8, 8).expand(2, 4, 5, 8, 8)  # no motion, no guidance
    output = still + 0.01 * torch.randn(still.shape)
    for name in ("temporal", "text"):
        assert METRICS[name](still, still) == 0
        assert 1 < METRICS[name](still, output) < math.inf
    zero = torch.zeros(2, 4, 8, 8)
    assert {metric(zero, zero) for metric in METRICS.values()} == {0}


def test_every_role_has_a_group():
    assert set(GROUPS) == set(ROLES)
    assert set(GROUPS.values()) <= set(METRICS)
    names = {
        "blocks.0.attn1.to_q": ("attn.q", "fidelity"),
        "blocks.0.attn2.to_k": ("xattn.k", "text"),
        "blocks.0.ff.net.2": ("ffn.down", "fidelity"),
        "temporal_blocks.0.attn1.to_q": ("attn.q", "temporal"),
        "temporal_blocks.0.ff.net.2": ("ffn.down", "fidelity"),
    }
    groups = [InputGroup(n, (Linear(n, role, (4, 4), True),)) for n, (role, _) in names.items()]
    assert groups_of(groups) == {n: group for n, (_, group) in names.items()}


# --- measuring -------------------------------------------------------------------------------


def record(model, latents, count: int = 2) -> list[RecordedCall]:
    calls = []
    for i in range(count):
        kwargs = {
            "timestep": torch.full((len(latents),), 900 - 400 * i),
            "class_labels": torch.arange(len(latents)),
            "return_dict": False,
        }
        with torch.no_grad():
            calls.append(RecordedCall(i, (latents + i,), kwargs, model(latents + i, **kwargs)[0]))
    return calls


@pytest.mark.parametrize("branches", [1, 2])
def test_spread_keeps_the_branches_of_guidance_together(branches):
    calls = [
        RecordedCall(i * branches + b, (torch.full((1, 4), float(i)),), {}, torch.zeros(1))
        for i in range(20)
        for b in range(branches)
    ]
    for count in (1, 4, 7, 100):
        picked = subsample(calls, count)
        assert len(picked) == max(1, min(20, count // branches)) * branches
        steps = [call.step for call in picked]
        assert steps == sorted(set(steps))
        assert all(step // branches in {s // branches for s in steps[::branches]} for step in steps)
    middle = subsample(calls, 1 * branches)
    assert [c.latents.flatten()[0] for c in middle] == [10.0] * branches


def rounded(linear: nn.Linear, step: float) -> nn.Linear:
    new = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    new.load_state_dict(linear.state_dict())
    new.weight.data = (new.weight / step).round() * step
    return new


ATTENTION, FFN = "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2"


@pytest.fixture
def dit():
    return tiny.dit()


@pytest.fixture
def candidates(dit):
    return {
        "attention": {
            f"{step}": {n: rounded(dit.get_submodule(n), step) for n in (ATTENTION, ATTENTION[:-1] + "k")}
            for step in (0.01, 0.05)
        },
        "ffn": {f"{step}": {FFN: rounded(dit.get_submodule(FFN), step)} for step in (0.01, 0.05)},
    }  # fmt: skip


def test_measure_leaves_no_trace(dit, candidates):
    torch.manual_seed(0)
    calls = record(dit, torch.randn(2, 4, 8, 8))
    modules = dict(dit.named_modules())
    state = {k: v.clone() for k, v in dit.state_dict().items()}
    measured = measure(dit, calls, candidates, progress=False)
    after = dict(dit.named_modules())
    assert list(after) == list(modules)
    assert all(after[name] is module for name, module in modules.items())
    assert all(torch.equal(v, state[k]) for k, v in dit.state_dict().items())
    for call in calls:
        with torch.no_grad():
            assert torch.equal(dit(*call.args, **call.kwargs)[0], call.output)
    assert list(measured) == ["attention", "ffn"]
    for options in measured.values():
        assert set(options["0.01"]) == set(METRICS)
        for name in METRICS:
            assert 0 < options["0.01"][name] < options["0.05"][name] < 1


def test_measure_is_one_item_at_a_time(dit, candidates):
    torch.manual_seed(0)
    calls = record(dit, torch.randn(2, 4, 8, 8))
    alone = measure(dit, calls, {"ffn": candidates["ffn"]}, progress=False)
    assert measure(dit, calls, candidates, progress=False)["ffn"] == alone["ffn"]
    dit.set_submodule(FFN, candidates["ffn"]["0.05"][FFN])
    errors = []
    for call in calls:
        with torch.no_grad():
            errors.append(METRICS["mse"](call.output, dit(*call.args, **call.kwargs)[0]))
    assert alone["ffn"]["0.05"]["mse"] == pytest.approx(sum(errors) / 2)


def test_measure_restores_on_errors(dit, candidates):
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    calls = record(dit, torch.randn(2, 4, 8, 8))
    modules = dict(dit.named_modules())
    both = {FFN: Broken(), ATTENTION: candidates["attention"]["0.01"][ATTENTION]}
    with pytest.raises(RuntimeError, match="broken"):
        measure(dit, calls, {"x": {"y": both}}, progress=False)
    assert all(m is modules[n] for n, m in dit.named_modules())
    with pytest.raises(AttributeError):
        measure(dit, calls, {"x": {"y": {**both, "no.such": Broken()}}}, progress=False)
    assert all(m is modules[n] for n, m in dit.named_modules())


def test_measure_gives_infinity_for_outputs_that_are_not_finite(dit):
    calls = record(dit, torch.randn(2, 4, 8, 8))
    broken = rounded(dit.get_submodule(FFN), 0.01)
    broken.weight.data[0, 0] = math.nan
    measured = measure(dit, calls, {"x": {"y": {FFN: broken}}}, progress=False)
    assert set(measured["x"]["y"].values()) == {math.inf}


def test_guidance_is_recognized_in_one_call_or_in_two(dit, candidates):
    torch.manual_seed(0)
    half = torch.randn(2, 4, 8, 8)
    together = record(dit, half.repeat(2, 1, 1, 1))
    apart = []
    for call in together:
        for i in (0, 2):
            kwargs = {k: v if k == "return_dict" else v[i : i + 2] for k, v in call.kwargs.items()}
            args = (call.args[0][i : i + 2],)
            apart.append(RecordedCall(call.step, args, kwargs, call.output[i : i + 2]))
    plain = record(dit, torch.randn(4, 4, 8, 8))
    one, two, none = (
        measure(dit, calls, {"ffn": candidates["ffn"]}, progress=False)["ffn"]["0.05"]
        for calls in (together, apart, plain)
    )
    assert one == pytest.approx(two, rel=1e-3)
    assert one["text"] != one["content"]
    assert none["text"] == none["content"]


# --- sensitivities and allocation --------------------------------------------------------------------


def random_measurements(rng: random.Random, items: int = 6):
    measured = {
        f"i{i}": {o: {m: rng.uniform(0.1, 1) for m in METRICS} for o in ("w4", "w8")}
        for i in range(items)
    }
    groups = {item: ("text", "fidelity")[i % 2] for i, item in enumerate(measured)}
    return measured, groups


def test_a_metric_per_group_divides_the_plain_error_of_the_group():
    measured, groups = random_measurements(random.Random(0))
    sensitivity_of = sensitivities(measured, groups)
    for group, option in itertools.product(("text", "fidelity"), ("w4", "w8")):
        members = [i for i, g in groups.items() if g == group]
        whole = sum(measured[i][option]["mse"] for i in members)
        assert sum(sensitivity_of[i][option] for i in members) == pytest.approx(whole)
        by_metric = sorted(members, key=lambda i: measured[i][option][group])
        assert sorted(members, key=lambda i: sensitivity_of[i][option]) == by_metric
    plain = sensitivities(measured, groups, per_group_metric=False)
    assert all(plain[i][o] == measured[i][o]["mse"] for i in measured for o in ("w4", "w8"))


def test_a_metric_per_group_at_zero_and_infinity():
    measured, groups = random_measurements(random.Random(0))
    for metrics in measured["i0"].values():
        metrics.update(dict.fromkeys(METRICS, math.inf))
    for i in ("i1", "i3", "i5"):
        measured[i]["w8"]["fidelity"] = 0.0  # the metric sees nothing in the whole group
    measured["i2"]["float"] = dict.fromkeys(METRICS, 0.0)
    sensitivity_of = sensitivities(measured, groups)
    assert sensitivity_of["i0"] == {"w4": math.inf, "w8": math.inf}
    assert all(math.isfinite(sensitivity_of[i]["w4"]) for i in sensitivity_of if i != "i0")
    assert sensitivity_of["i1"]["w8"] == measured["i1"]["w8"]["mse"]
    assert sensitivity_of["i2"]["float"] == 0


def test_choose():
    measured, groups = random_measurements(random.Random(1))
    weights = {item: 100 * (i + 1) for i, item in enumerate(measured)}
    costs = {i: {"w4": n // 2, "w8": n} for i, n in weights.items()}
    for item in measured:
        measured[item]["w8"] = {m: d / 100 for m, d in measured[item]["w4"].items()}
    budget = parse_budget("6", sum(weights.values()))
    sensitivity_of = sensitivities(measured, groups)
    allocation = choose(sensitivity_of, costs, budget, groups=groups, weights=weights)
    assert set(allocation.choice) == set(measured)
    assert allocation.bytes == sum(costs[i][o] for i, o in allocation.choice.items()) <= budget
    assert allocation.sensitivity == pytest.approx(
        sum(sensitivity_of[i][o] for i, o in allocation.choice.items())
    )
    assert (allocation.lowest.cost, allocation.highest.cost) == (1050, 2100)
    assert allocation.lowest.sensitivity > allocation.sensitivity > allocation.highest.sensitivity
    assert json.loads(json.dumps(allocation.to_json()))["rows"][0]["bits"] in (4, 8)
    ordered = list(allocation.choice.values())
    assert set(ordered) == {"w4", "w8"}
    with pytest.raises(InputError, match=r"at least 1050 bytes \(4\.000 bits per weight\)"):
        choose(sensitivity_of, costs, 1000, groups=groups, weights=weights)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4.8", 600_000),
        (" 4 ", 500_000),
        ("12MB", 12_000_000),
        ("1.5GiB", 3 << 29),
        ("800kB", 800_000),
        ("800 KB", 800_000),
        ("64KiB", 65536),
        ("100000b", 100_000),
        (".5mb", 500_000),
        ("0.3MB", 300_000),
        ("1.0019kB", 1001),
    ],
)
def test_parse_budget(text, count):
    assert parse_budget(text, 1_000_000) == count


@pytest.mark.parametrize("text", ["", "four", "-4", "12XB", "4.8.1", "0", "33", "0MB", "1e6", "MB"])
def test_parse_budget_refuses_with_an_example(text):
    with pytest.raises(InputError, match=r"12MB or 1\.5GiB"):
        parse_budget(text, 1_000_000)


def test_a_total_with_overhead_is_kept_to_the_byte():
    """The best choice by brute force, where every choice costs a header, too."""
    rng = random.Random(0)
    items = [f"i{n}" for n in range(5)]
    costs = {i: {"a": 10 * n + 20, "b": 10 * n + 31} for n, i in enumerate(items)}
    errors = {i: {"a": rng.uniform(0.1, 1), "b": rng.uniform(0, 0.1)} for i in items}

    def total(choice):
        return 7 + sum(costs[i][o] for i, o in choice.items())

    every = [dict(zip(items, c, strict=True)) for c in itertools.product(("a", "b"), repeat=5)]
    options = {"groups": dict.fromkeys(items, "g"), "weights": dict.fromkeys(items, 8)}
    least = min(map(total, every))
    for budget in range(least, max(map(total, every)) + 3, 3):
        found = choose(errors, costs, budget, total=total, **options)
        best = min(
            sum(errors[i][o] for i, o in choice.items())
            for choice in every if total(choice) <= budget
        )  # fmt: skip
        assert found.bytes == total(found.choice) <= budget
        assert found.sensitivity == pytest.approx(best)
    with pytest.raises(InputError, match=f"the smallest choice takes {least} bytes"):
        choose(errors, costs, least - 1, total=total, **options)


def test_no_choice_that_fits_is_passed_over_where_headers_differ():
    """One choice has a long header; the one below it on the front fits and must be found."""
    costs = {"x": {"a": 100, "b": 110}, "y": {"a": 100, "b": 101}}
    errors = {"x": {"a": 0.5, "b": 0.0}, "y": {"a": 0.2, "b": 0.1}}
    header = {"aa": 5, "ab": 5, "ba": 60, "bb": 60}

    def total(choice):
        return header[choice["x"] + choice["y"]] + costs["x"][choice["x"]] + costs["y"][choice["y"]]

    options = {"groups": dict.fromkeys(costs, "g"), "weights": dict.fromkeys(costs, 8)}
    found = choose(errors, costs, 206, total=total, **options)
    assert found.choice == {"x": "a", "y": "b"}
    assert found.bytes == 206
