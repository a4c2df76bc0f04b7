"""The averages as functions: coefficients that do not saturate, the impulse response, the choice of a backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laws import assert_close, assert_same
from megablocks.functional import damped_ema, ema_backend, ema_kernel
from megablocks.functional.ema import coefficients
from megablocks.state import EMAState

SATURATED = (20.0, 100.0, 1000.0, -20.0, -100.0, -1000.0)


def parameters(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """alpha, delta, beta, eta, ready for gradients."""
    return [torch.randn(*shape).to(dtype).requires_grad_() for _ in range(4)]


@pytest.mark.parametrize("backend", ema_backend().available)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("delta", SATURATED)
@pytest.mark.parametrize("alpha", SATURATED)
def test_saturated_parameters_give_no_nan(alpha, delta, dtype, backend):
    length = 70
    params = parameters(2, 3, dtype=dtype)
    with torch.no_grad():
        params[0].fill_(alpha)
        params[1].fill_(delta)
    x = torch.randn(1, length, 2).to(dtype).requires_grad_()
    y = damped_ema(x, *params, backend=backend)
    assert bool(y.isfinite().all())
    for gradient in torch.autograd.grad(y.float().square().sum(), [x, *params]):
        assert bool(gradient.isfinite().all())


def test_the_logarithm_of_what_is_kept_is_exact():
    # Logits from "forgets nothing", short of a product below float32's least number, to "keeps nothing"; float64 says
    # what float32 should.
    logits = torch.linspace(-40.0, 40.0, 241)
    alpha, delta = (grid.reshape(1, -1) for grid in torch.meshgrid(logits, logits, indexing="ij"))
    found = coefficients(alpha, delta, alpha, alpha).log_q.double()
    a, d = alpha.double(), delta.double()
    # log(1 - s(a) s(d)) = log(s(-a) + s(a) s(-d)), each term exact
    log_sigmoid = torch.nn.functional.logsigmoid
    fast = torch.logaddexp(log_sigmoid(-a), log_sigmoid(a) + log_sigmoid(-d))
    slow = torch.log1p(-a.sigmoid() * d.sigmoid())
    expected = torch.where(a.sigmoid() * d.sigmoid() < 0.5, slow, fast)
    assert ((found - expected) / expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_coefficients_are_float32_at_least(dtype):
    assert all(row.dtype == torch.float32 for row in coefficients(*parameters(2, 3, dtype=dtype)))
    assert all(row.dtype == torch.float64 for row in coefficients(*parameters(2, 3)))


def test_gradients_of_the_coefficients():
    # Around p = 1/2 as well, where one formula hands over to the other.
    alpha = torch.tensor([[-30.0, -2.0, 0.0, 1.0, 9.0]], dtype=torch.float64)
    delta = torch.tensor([[1.0, 1.0, 0.0, 0.999, 9.0]], dtype=torch.float64)
    params = [tensor.requires_grad_() for tensor in (alpha, delta, torch.ones_like(alpha), torch.ones_like(alpha))]
    torch.autograd.gradcheck(lambda *args: tuple(coefficients(*args)), params)


@pytest.mark.parametrize("backend", ema_backend().available)
def test_the_impulse_response_is_what_an_impulse_gives(backend):
    params = parameters(3, 4)
    impulse = torch.zeros(1, 70, 3, dtype=torch.float64)
    impulse[:, 0] = 1.0
    y = damped_ema(impulse, *params, backend=backend)
    assert_close(y[0].T, ema_kernel(*params, 70))


def test_slow_decays_at_a_long_lag():
    # Relative error of the float32 impulse response at lag 65,536 (law 7).
    params = [torch.linspace(-13.0, -9.0, 8).unsqueeze(-1), *(torch.ones(8, 1) for _ in range(3))]
    found = ema_kernel(*params, 65_537)[:, -1].double()
    expected = ema_kernel(*(parameter.double() for parameter in params), 65_537)[:, -1]
    assert ((found - expected) / expected).abs().max() < 1e-3


def test_without_omega_there_is_no_skip():
    params, x = parameters(3, 2), torch.randn(1, 4, 3, dtype=torch.float64)
    assert_same(damped_ema(x, *params), damped_ema(x, *params, torch.zeros(3, dtype=torch.float64)))
    omega = torch.randn(3, dtype=torch.float64)
    assert_close(damped_ema(x, *params, omega), damped_ema(x, *params) + omega * x)


def test_averages_are_not_lowered_by_autocast():
    params, x = parameters(3, 2, dtype=torch.float32), torch.randn(1, 80, 3)
    y = damped_ema(x, *params)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(damped_ema(x, *params), y)


def test_ema_backend_tells_and_sets():
    before = ema_backend()
    assert {"recurrent", "blocked"} <= set(before.available)
    assert before.default == "auto"
    params, x = parameters(3, 2), torch.randn(1, 4, 3, dtype=torch.float64)
    with ema_backend("recurrent"):
        assert ema_backend().default == "recurrent"
        damped_ema(x, *params)
        assert ema_backend().last_used == "recurrent"
        with ema_backend("blocked"):
            damped_ema(x, *params)
            assert ema_backend().last_used == "blocked"
        assert ema_backend().default == "recurrent"
        damped_ema(x, *params, backend="blocked")
        assert ema_backend().last_used == "blocked"
    assert ema_backend().default == "auto"


def test_ema_backend_stays_set_without_with():
    try:
        ema_backend("recurrent")
        assert ema_backend().default == "recurrent"
    finally:
        ema_backend("auto")
    assert ema_backend().default == "auto"


def test_ema_backend_is_put_back_after_an_error():
    with pytest.raises(ZeroDivisionError), ema_backend("recurrent"):
        _ = 1 / 0
    assert ema_backend().default == "auto"


@pytest.mark.parametrize(
    "ask", [ema_backend, lambda name: damped_ema(torch.ones(1, 1, 1), *parameters(1, 1), backend=name)]
)
def test_an_unknown_backend_is_answered_with_the_known(ask):
    with pytest.raises(
        ValueError, match=r"^`backend` must be one of 'recurrent', 'blocked'.*, or 'auto', but is 'fft'\.$"
    ):
        ask("fft")


def test_arguments_that_do_not_fit_are_named():
    x, params = torch.randn(2, 5, 3), [torch.randn(3, 2) for _ in range(4)]
    both = [torch.cat([parameter, parameter]) for parameter in params]
    state = EMAState(torch.zeros(2, 3, 2))
    with pytest.raises(
        ValueError, match=r"^A state needs an average that looks back only, but these coefficients are bid"
    ):
        damped_ema(x, *both, state=state)
    with pytest.raises(
        TypeError, match=r"^`state` of MultiDimensionDampedEMA with truncation=3 must be TruncatedEMAState"
    ):
        damped_ema(x, *params, truncation=3, state=state)
    with pytest.raises(
        ValueError, match=r"^`truncation` must be at least 1, but is 0; use `None` for no truncation\.$"
    ):
        damped_ema(x, *params, truncation=0)
    with pytest.raises(
        ValueError, match=r"^`alpha` must have shape \(3, N\), or \(6, N\) for a bidirectional average, to fit"
    ):
        damped_ema(x, torch.randn(9, 2), *params[1:])
    with pytest.raises(ValueError, match=r"^`eta` must have the shape of `alpha`, \(3, 2\), but has \(3, 4\)\.$"):
        damped_ema(x, *params[:3], torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"^`omega` must have shape \(3,\), but has shape \(2,\)\.$"):
        damped_ema(x, *params, torch.randn(2))
    with pytest.raises(ValueError, match=r"^`x` must have shape \(batch, length, width\), but has shape \(5, 3\); "):
        damped_ema(x[0], *params)


@pytest.mark.parametrize("length", [1, 5, 70])
def test_a_state_follows_a_change_of_precision(length):
    params, x = [torch.randn(3, 2) for _ in range(4)], torch.randn(2, length, 3)
    narrow, wide = EMAState(torch.randn(2, 3, 2)), [parameter.double() for parameter in params]
    y, after = damped_ema(x.double(), *wide, state=narrow)
    expected, _ = damped_ema(x.double(), *wide, state=EMAState(narrow.hidden.double()))
    assert after.hidden.dtype == torch.float64
    torch.testing.assert_close(y, expected)
    y, after = damped_ema(x, *params, state=EMAState(narrow.hidden.double()))
    assert (y.dtype, after.hidden.dtype) == (torch.float32, torch.float32)
    # A wide input to narrow params is computed as widely as it is returned.
    torch.testing.assert_close(damped_ema(x.double(), *params), damped_ema(x.double(), *wide))
