import math

import numpy as np
import pytest
from diagnostics_fakes import flat_run

from pgen.contracts import Run
from pgen.diagnostics import plateau


def test_a_known_slope():
    found = plateau(flat_run(4000, slope=1e-4, noise=0.02))
    assert found.rate == pytest.approx(0.1, abs=0.005)
    assert found.ci_low < 0.1 < found.ci_high and found.ci_low > 0
    assert (found.first_step, found.entries, found.non_finite, found.lr) == (2001, 2000, 0, (0.01, 0.01))


def test_steps_not_logged_do_not_change_the_rate():
    run = flat_run(4000, slope=1e-4, noise=0.02)
    sparse = Run(history={name: values[9::10] for name, values in run.history.items()})
    assert plateau(sparse).rate == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(("num_steps", "ar", "most"), [(300, 0.0, 13), (1000, 0.5, 13), (3000, 0.9, 13), (1000, 0.97, 25)])
def test_intervals_hold_a_flat_bound_about_as_often_as_they_say(num_steps, ar, most):
    outside = [
        not found.ci_low < 0 < found.ci_high for found in (plateau(flat_run(num_steps, ar=ar, seed=s)) for s in range(100))
    ]
    assert 0 < np.sum(outside) <= most


def test_correlated_noise_widens_the_interval():
    def width(ar):
        found = plateau(flat_run(1000, ar=ar))
        return found.ci_high - found.ci_low

    assert width(0.9) > 5 * width(0.0)


def test_time_is_the_sum_of_learning_rates():
    run = flat_run(4000, noise=1e-9)
    run.history["lr"] = np.linspace(0.01, 0.0, 4001)[:-1]
    moved = np.cumsum(run.history["lr"])
    run.history["loss"] = 5.0 - 0.02 * moved
    found = plateau(run)
    assert not found.lr_constant and found.lr[1] == pytest.approx(0.01 / math.sqrt(2), rel=1e-3)
    assert found.first_step == pytest.approx(4000 * (1 - 1 / math.sqrt(2)), abs=2)
    assert found.rate == pytest.approx(1000 * 0.02 * found.lr[1])  # though the last steps hardly changed the loss


def test_learning_rates_need_not_be_logged():
    run = flat_run(200, slope=1e-3)
    logged = plateau(run)
    del run.history["lr"]
    found = plateau(run)
    assert found.lr_constant and math.isnan(found.lr[0])
    assert (found.rate, found.ci_low) == pytest.approx((logged.rate, logged.ci_low))


def test_losses_that_are_not_finite_are_counted():
    run = flat_run(200)
    run.history["loss"][[3, 120, 130]] = [math.nan, math.nan, math.inf]
    found = plateau(run)
    assert found.non_finite == 2 and math.isfinite(found.rate)


def test_a_short_history_is_refused():
    with pytest.raises(ValueError, match="20 finite losses in each of its last quarters, got 19 of 77"):
        plateau(flat_run(77))
