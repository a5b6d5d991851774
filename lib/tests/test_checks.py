"""Checks of single values."""

import pytest

from lib import checks


def test_numbers_that_do_not_fit_a_tensor_are_refused():
    checks.positive_int("seed", 2**63 - 1)
    with pytest.raises(ValueError, match=r"^seed is 9223372036854775808, expected .* at most 9223372036854775807\.$"):
        checks.positive_int("seed", 2**63, least=0)
    with pytest.raises(ValueError, match=r"^rate is a whole number above"):
        checks.positive_float("rate", 10**400)
    with pytest.raises(ValueError, match=r"^rate is a whole number below"):
        checks.positive_float("rate", -(10**400))
    with pytest.raises(ValueError, match=r"^seed is a number of more than 30 digits, expected .* at least 0\.$"):
        checks.positive_int("seed", -(10**5000), least=0)
    checks.thread_count("threads", 0)
    for threads in (-1, 100_000):
        with pytest.raises(ValueError, match=f"^threads is {threads}, expected"):
            checks.thread_count("threads", threads)


def test_a_descending_range_of_iterations_is_taken_as_a_list_is():
    wanted = range(10, -1, -5)
    assert list(checks.record_iterations(wanted, 50)) == checks.record_iterations(list(wanted), 50) == [0, 5, 10]
    with pytest.raises(ValueError, match="asks for iterations 0 to 10, expected them within 0 to 9"):
        checks.record_iterations(wanted, 9)
