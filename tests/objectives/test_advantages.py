import numpy as np

from lljax.objectives.advantages import deviations, group_relative, leave_one_out

NAN = np.nan
REWARDS = np.asarray([[1.0, 0.0, 0.5, 0.5], [2.0, NAN, 1.0, NAN], [3.0, NAN, NAN, NAN]], np.float32)


def test_deviations_are_of_a_sample_and_leave_out_what_has_no_reward():
    wanted = [np.std([1, 0, 0.5, 0.5], ddof=1), np.std([2, 1], ddof=1), 0]
    np.testing.assert_allclose(deviations(REWARDS), wanted, rtol=1e-6)


def test_advantages_are_relative_to_the_answers_with_a_reward():
    got = group_relative(REWARDS, "none")
    wanted = [[0.5, -0.5, 0, 0], [0.5, 0, -0.5, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(got, wanted, atol=1e-7)
    assert got.dtype == np.float32
    scaled = group_relative(REWARDS, "group")
    np.testing.assert_allclose(
        scaled[1], [0.5 / (np.std([2, 1], ddof=1) + 1e-4), 0, -scaled[1, 0], 0]
    )
    whole = np.nanstd(REWARDS, ddof=1) + 1e-4
    np.testing.assert_allclose(
        group_relative(REWARDS, "batch"), np.asarray(wanted) / whole, rtol=1e-5
    )


def test_equal_rewards_have_no_advantage_under_any_scale():
    equal = np.full((2, 4), 0.7, np.float32)
    for scale in ("group", "batch", "none"):
        assert not group_relative(equal, scale).any()
    assert not leave_one_out(equal).any()


def test_leave_one_out_compares_with_the_other_answers():
    got = leave_one_out(REWARDS)
    np.testing.assert_allclose(got[0], [1 - 1 / 3, 0 - 2 / 3, 0.5 - 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(got[1], [2 - 1, 0, 1 - 2, 0], atol=1e-6)
    np.testing.assert_allclose(got[2], 0)
