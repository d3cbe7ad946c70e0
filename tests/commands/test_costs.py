"""The arithmetic of costs: against sums by hand, and properties that hold at any scale."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcdistill.commands.costs import (
    ALONE,
    DECODING,
    FULL,
    INSIDE_GBIT,
    LIVE,
    NETWORK,
    STUDENT,
    TEACHER,
    TOP_K,
    Measured,
    Prices,
    Scale,
    as_dict,
    assumptions,
    exchange,
    ways,
    workers_needed,
)

PAIR = Measured(
    read=0.004,
    teacher=0.003,
    step=0.001,
    evaluate=0.0005,
    store=0.0002,
    load=0.0001,
    top_k_store=0.0003,
    top_k_load=0.0002,
    row_bytes=2000,
    top_k_bytes=402,
)
AT = Scale(images=1000, epochs=10, batch=100, workers=8)

seconds = st.floats(1e-6, 1.0)
pairs = st.builds(
    Measured,
    read=seconds,
    step=seconds,
    teacher=seconds,
    evaluate=seconds,
    store=seconds,
    load=st.floats(0, 1e-6),
    row_bytes=st.integers(1000, 10**5),
    top_k_bytes=st.integers(1, 999),
    parameters=st.integers(0, 10**9),
)
scales = st.builds(
    Scale,
    images=st.integers(1, 10**9),
    epochs=st.integers(1, 300),
    batch=st.integers(1, 4096),
    val_images=st.integers(0, 10**5),
    nodes=st.integers(1, 64),
    gpus=st.integers(1, 8),
    workers=st.integers(0, 32),
    cores=st.sampled_from((0, 0, 4)),
    link_gbit=st.floats(1, 1000),
)


def by_name(found):
    return {way.name: way for way in found}


def test_a_training_by_hand():
    found = by_name(ways(PAIR, AT))
    assert list(found) == [LIVE, FULL, TOP_K, ALONE]
    assert found[LIVE].epoch == pytest.approx(1000 * (0.003 + 0.001))  # decoding takes 0.5 s beside it
    assert found[LIVE].bound == TEACHER
    assert found[FULL].epoch == pytest.approx(1000 * (0.001 + 0.0001))
    assert found[FULL].bound == STUDENT
    assert found[FULL].build == pytest.approx(10 * 1000 * (0.003 + 0.0002))
    assert found[FULL].total == pytest.approx(32 + 11)
    assert found[FULL].disk == 10 * 1000 * 2000
    assert found[TOP_K].disk == 10 * 1000 * 402
    assert found[TOP_K].total == pytest.approx(10 * 1000 * 0.0033 + 10 * 1000 * 0.0012)
    assert found[FULL].pays_from == pytest.approx(3.2 / 2.9)


def test_what_bounds_is_found_where_it_is_waited_for():
    slow = replace(PAIR, read=0.1)
    one = ways(slow, AT)[0]
    assert one.bound == DECODING
    assert one.epoch == pytest.approx(1000 * 0.1 / 8)
    assert workers_needed(slow, one, AT) == 25
    assert ways(slow, AT)[1].pays_from is None, "a cache saves no time where decoding is waited for"
    assert ways(replace(PAIR, parameters=10**10), replace(AT, nodes=2))[0].bound == NETWORK


def test_cores_that_are_shared_make_times_add_up():
    shared = replace(AT, cores=2)
    assert ways(PAIR, shared)[0].epoch == pytest.approx(1000 * (0.004 / 2 + 0.004))
    assert ways(PAIR, replace(AT, workers=0))[0].epoch == pytest.approx(1000 * 0.008)


def test_validation_and_prices_count():
    with_val = ways(PAIR, replace(AT, val_images=100))[0]
    assert with_val.epoch == pytest.approx(4.0 + 100 * 0.0005)
    prices = Prices(device_hour=3.6, terabyte_month=1000, months=2)
    full = by_name(ways(PAIR, AT, prices))[FULL]
    storage = 10 * 1000 * 2000 / 1e12 * 1000 * 2
    assert full.pays_from == pytest.approx((32 * 0.001 + storage) / (29 * 0.001))


def test_the_exchange_is_a_rings():
    assert exchange(10**6, AT) == 0
    assert exchange(10**6, replace(AT, gpus=4)) == pytest.approx(2 * 3 / 4 * 4e6 / (INSIDE_GBIT * 1e9 / 8))
    assert exchange(10**6, replace(AT, nodes=2)) == pytest.approx(2 * 1 / 2 * 4e6 / (100e9 / 8))


def test_a_student_alone_has_one_way():
    (only,) = ways(Measured(read=0.001, step=0.01), AT)
    assert only.name == ALONE
    assert as_dict(only)["pays_from"] is None


def test_assumptions_say_what_was_scaled():
    one = " ".join(assumptions(AT))
    assert "Gbit/s" not in one
    several = " ".join(assumptions(replace(AT, nodes=4, gpus=8), Prices()))
    assert "100 Gbit/s between nodes" in several
    assert "each of the 32" in several
    assert "dollars" in several


@given(pairs, scales)
def test_no_way_is_faster_than_the_student_alone_and_more_devices_never_slow_down(one, at):
    found = by_name(ways(one, at))
    assert found[ALONE].epoch <= found[FULL].epoch * (1 + 1e-9)
    assert found[ALONE].epoch <= found[LIVE].epoch * (1 + 1e-9)
    assert found[TOP_K].disk < found[FULL].disk
    local = by_name(ways(replace(one, parameters=0), at))
    more = by_name(ways(replace(one, parameters=0), replace(at, nodes=2 * at.nodes)))
    for name in found:
        assert more[name].epoch <= local[name].epoch * (1 + 1e-9)


@given(pairs, scales, st.integers(1, 50))
def test_a_cache_pays_exactly_from_where_it_says(one, at, students):
    found = by_name(ways(one, at))
    live, full = found[LIVE], found[FULL]
    cheaper = full.build + students * at.epochs * full.epoch < students * at.epochs * live.epoch
    if full.pays_from is not None and abs(students - full.pays_from) > 1e-6 * students:
        assert cheaper == (students > full.pays_from)
