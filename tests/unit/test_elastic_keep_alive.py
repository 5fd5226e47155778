"""How long idle experts are kept, with idle times and answers worked out by hand."""

import numpy as np

from shared.elastic.keep_alive import NEVER, Fixed, Histogram, KeepAlive, Window

ONE, BOTH = np.array([0]), np.array([0, 1])


def wanted(policy: KeepAlive, now: float) -> list[bool]:
    return policy.windows(0).wanted(now).tolist()


def use(policy: KeepAlive, times: list[float]) -> None:
    for time in times:
        policy.observe(0, ONE, time)


def test_a_fixed_time_begins_with_every_use() -> None:
    policy = Fixed(1, 2, seconds=10)
    assert wanted(policy, 0) == [False, False], "never used"
    policy.observe(0, BOTH, 0)
    policy.observe(0, ONE, 5)
    assert wanted(policy, 10) == [True, True]
    assert wanted(policy, 15) == [True, False]
    assert wanted(policy, 15.1) == [False, False]
    assert policy.windows(0).warm.tolist() == [NEVER, NEVER]


def test_knatives_window_ends_at_a_tick_and_leaves_a_grace_period() -> None:
    policy = Window(1, 2)
    use(policy, [1.5])
    assert policy.windows(0).stop[0] == 62 + 30
    assert wanted(policy, 92) == [True, False]
    assert wanted(policy, 93) == [False, False]


def test_layers_do_not_mix() -> None:
    policy = Fixed(2, 2, seconds=1)
    policy.observe(1, ONE, 0)
    assert policy.windows(1).wanted(0).tolist() == [True, False]
    assert wanted(policy, 0) == [False, False]


def test_an_expert_that_is_used_all_the_time_is_kept_for_the_tail_of_its_idle_times() -> None:
    policy = Histogram(1, 2, fallback=100, start_s=0.1)
    use(policy, [0.1 * n for n in range(50)])
    last = 0.1 * 49
    windows = policy.windows(0)
    assert windows.warm[0] == NEVER
    assert last + 0.1 <= windows.end[0] <= last + 0.2, "0.1 s lies between 2^-4 and 2^-3"
    assert windows.stop[0] == windows.end[0]


def test_an_expert_with_regular_long_pauses_is_stopped_at_once_and_started_ahead() -> None:
    policy = Histogram(1, 2, fallback=100, start_s=1.0)
    use(policy, [10.0 * n for n in range(20)])
    windows = policy.windows(0)
    assert windows.stop[0] == 190
    assert windows.warm[0] == 190 + 8 - 1.0, "10 s lies between 8 and 16 s, a start takes 1 s"
    assert windows.end[0] == 190 + 16
    assert wanted(policy, 191) == [False, False]
    assert wanted(policy, 200) == [True, False]
    assert wanted(policy, 207) == [False, False]


def test_an_expert_of_which_little_is_known_is_kept_for_the_fallback() -> None:
    policy = Histogram(1, 2, fallback=100, start_s=1.0)
    use(policy, [0, 10, 20])
    assert wanted(policy, 120) == [True, False]
    assert wanted(policy, 121) == [False, False]


def test_old_habits_fade() -> None:
    policy = Histogram(1, 1, fallback=1)
    use(policy, [10.0 * n for n in range(600)])
    use(policy, [6000 + 0.1 * n for n in range(4000)])
    windows = policy.windows(0)
    assert windows.end[0] - (6000 + 0.1 * 3999) < 1


def test_memory_is_bounded_and_a_use_at_the_same_time_counts_once() -> None:
    policy = Histogram(1, 1, fallback=1, fewest=1)
    use(policy, [float(n % 7) for n in range(10_000)])
    assert np.isfinite(policy.windows(0).end).all()
    assert policy._counts.sum() <= Histogram.MOST
