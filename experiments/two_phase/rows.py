"""What the theory says, as numbers with bounds.

Each function takes what that of its name in `measure` gives. They follow the claims and
the settings of Boursier, Pesme, Dragomir, arXiv 2505.20172.
"""

from typing import Any

import numpy as np

from ..shared.rows import check, law_check, Row


def balance_bound(task: str) -> float:
    return 1e-10 if task == "fourier_diagonal" else 1e-6


def rate(found: Any, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """λ and errors of the law error ~ λᵖ: up to a largest λ, and above rounding."""
    used = (found.lams <= largest) & (found.errors >= 10 * found.rtol)
    return found.lams[used], found.errors[used]


def fast_phase(found: Any) -> list[Row]:
    """Proposition 1: θ_λ → θ_GF on a fixed interval of time."""
    sentence = f"sup over [0, {found.end:.3g}] of ‖θ_λ − θ_GF‖ ~ λ^p"
    each = rate(found, 0.1 / found.end)
    return [law_check("fast phase", *each, "≥ 0.95", sentence)]


def slow_phase(found: Any) -> list[Row]:
    """Proposition 2: θ_λ(s/λ) → w°(s), uniformly on s ∈ [ε, regular]."""
    low, high = found.ends
    sentence = f"sup over s ∈ [{low:g}, {high:.2g}] of ‖θ_λ(s/λ) − w°(s)‖ ~ λ^p"
    composite = "composite prediction from t = 0 on: error ~ λ^p, "
    composite += f"over {found.used:.0f} λ, of which it takes three"
    return [
        law_check("drift", *rate(found, found.largest), "1 ± 0.1", sentence),
        check(
            "composite", found.composite, "1 ± 0.1", composite, given=found.used >= 3
        ),
    ]


def derivative(found: Any) -> list[Row]:
    """DΦ = P on M."""
    sentence = "‖DΦ v − P v‖ at Φ(θ₀), random directions v, ‖v‖ = 1"
    rows = [check("DΦ = P", found.off.max(), "≤ 1e-6", sentence)]
    if found.codimension >= 0:
        sentence = "rank of ∇²F at Φ(θ₀), the codimension of the manifold"
        bound, sure = f"= {found.codimension}", not found.ambiguous
        rows.append(check("rank", found.rank, bound, sentence, also=sure))
    return rows


def matching(found: Any) -> list[Row]:
    """Lemma 2: at t(λ) = −ln λ/2c, between the phases, θ_λ is at Φ(θ₀)."""
    off = found.off
    if off.size < 3:
        return [check("matching", np.nan, "", "a trend needs three λ below 0.1")]
    told = ", ".join(f"{x:.1e}" for x in off)
    sentence = "‖θ_λ(t(λ)) − Φ‖/‖Φ‖ falls monotonically as λ → 0, t(λ) = −ln λ/2c, "
    sentence += f"c = η = {found.c:.2g}: {told}"
    return [
        Row("matching", off[-1], "monotone", bool((np.diff(off) < 0).all()), sentence)
    ]


def limits(found: Any) -> list[Row]:
    """Propositions 3, 4: the limits λ → 0 and t → ∞ do not commute."""
    where = f"at λ = {found.lam:.0e}, s = {found.s:g}"
    differ = f"the limits do not commute: ‖θ_λ(∞) − Φ‖/‖Φ‖, {where}"
    kkt = f"θ_λ(∞) is a KKT point: ‖P w‖/‖w‖, {where}"
    return [
        check("limits", found.apart, "≥ 1e-2", differ),
        check("rest", found.kkt, "≤ 1e-4", kkt),
    ]


def widths(found: Any) -> list[Row]:
    """The drop is as wide in log t for all λ; the plateau before it grows as 1/λ."""
    drops, plateaus = np.asarray(found.drops), np.asarray(found.plateaus)
    if drops.size < 2 or not np.isfinite([*drops, *plateaus]).all():
        return [check("widths", np.nan, "", "too few λ show a whole drop")]
    apart = np.abs(drops / drops.mean() - 1).max()
    slope = np.polyfit(np.log(1 / found.lams), plateaus, 1)[0]
    drop = f"width of the {found.what}'s drop (10 % to 90 %) in ln t is "
    drop += f"{drops.mean():.3f} for every λ; largest deviation"
    plateau = "width of the plateau in ln t, against ln 1/λ"
    return [
        check("widths", apart, "≤ 0.05", drop),
        check("plateau", slope, "1 ± 0.05", plateau),
    ]


def onset(found: Any) -> list[Row]:
    """Appendix E: grokking needs λ‖w‖ ≪ ‖∇F(θ₀)‖."""
    ratios = found.ratios[np.argsort(found.criteria)]
    if ratios.size < 3:
        return [check("onset", np.nan, "", "a trend needs three λ")]
    if not np.isfinite(ratios).all():
        return [check("onset", np.nan, "", "heuristic: weight decay rules at once")]
    sentence = "t_WD/t_GF at the least λ; it falls as λ‖Φ‖/‖∇F(θ₀)‖ grows, for all λ"
    ok = bool((np.diff(ratios) < 0).all())
    return [Row("onset", ratios[0], "monotone", ok, sentence)]


def invariant(found: Any) -> list[Row]:
    """The balance law."""
    sentence = (
        f"Δ(t) = Δ(0) e^(−2λt), λ = {found.lam:.0e}: error/‖Δ(0)‖ at rtol "
        f"{found.rtol:.0e} ({found.usual:.1e} at {found.own:.0e})"
    )
    bound = f"≤ {balance_bound(found.task):g}"
    return [check("balance law", found.off, bound, sentence)]


def end_point(found: Any) -> list[Row]:
    """Where the drift ends, against an independent convex program."""
    what, bound = "least norm (closed form)", "≤ 1e-3"
    if "diagonal" in found.task:
        what = "least ℓ1 norm (linear program)"
    if "completion" in found.task:
        what, bound = "least nuclear norm (CVXPY)", "≤ 1e-2"
    where = f"λ = {float(found.lam):.0e}, s = {float(found.s):g}"
    sentence = f"end of the run at {where}, against the {what}"
    given = np.isfinite(found.off)
    return [check("end point", found.off, bound, sentence, given=given)]


def linear(found: Any) -> list[Row]:
    """Linear regression."""
    decay = "part in ker X decays at the rate λ: error"
    return [
        check("closed form", found.off, "≤ 1e-8", "largest error over all λ and t"),
        check("kernel", found.slopes.max(), "≤ 1e-6", decay),
    ]


def fourier(found: Any) -> list[Row]:
    """Figure 4."""
    sentence = "β(t = 1e5), λ = 1e-4, against the least ℓ1 norm"
    return [
        check("fit", found.train, "≤ 1e-7", "train loss at t = 100, λ = 1e-4"),
        check("sparse", found.off, "≤ 1e-3", sentence),
    ]


def completion(found: Any) -> list[Row]:
    """Figure 2."""
    plateau = "test loss at t = 0.1/λ, relative difference from its plateau"
    rows = [
        check("fit", found.train, "≤ 1e-4", "train loss at t = 3, λ = 1e-3"),
        check("plateau", abs(found.test), "≤ 0.2", plateau),
    ]
    if np.isnan(found.off):
        return [*rows, check("low rank", np.nan, "", "CVXPY missing: no oracle")]
    if found.exact:
        for share, bound, at in zip(
            found.shares, ("≤ 0.02", "≤ 0.01"), found.ends, strict=False
        ):
            sentence = f"singular value {found.rank + 1} over the first at t = {at:.0e}"
            rows.append(check("low rank", share, bound, sentence))
    else:
        sentence = "the least nuclear norm is not the target here: rank not judged"
        rows.append(check("low rank", np.nan, "", sentence))
    sentence = (
        f"UVᵀ at t = {found.ends[-1]:.0e}, λ = 1e-3, against the least nuclear norm"
    )
    return [*rows, check("nuclear", found.off, "≤ 1e-2", sentence)]


def initial_scale(found: Any) -> list[Row]:
    """Small initial weights leave nothing for the second phase to do."""
    sizes, drops = found.sizes, found.drops
    told = lambda values: ", ".join(
        f"{v:.3g} at {s:g}" for s, v in zip(found.scales, values, strict=True)
    )
    rising, name = bool((np.diff(sizes) > 0).all()), "scale"
    fall = f"fall of ‖θ‖² after the fast phase, by scale: {told(drops)}"
    return [
        Row(name, sizes[0], "monotone", rising, f"‖Φ‖² by scale: {told(sizes)}"),
        check(name, drops[0], "≤ 0.05", fall),
    ]


def relu(found: Any) -> list[Row]:
    """Figure 3."""
    before, after = found.kinks
    end, lam = float(found.end), float(found.lam)
    where = f"s = {lam * end:.2g}"
    return [
        check("simulation", end, f"= {float(found.wanted):.17g}",
              f"time reached in {int(found.steps)} steps"),
        check("fit", found.fitted, "≤ 1", "time at which the train loss is a tenth"),
        check("onset", found.begins * lam, "0.05 … 2",
              "λ · (time at which ‖θ‖² has fallen by 10 %)"),
        check("kinks", after, f"< {before}",
              f"of the function, {before} at first, at {where}"),
        check("balance law", found.balance, "≤ 1e-3", f"to {where}: error/‖Δ(0)‖"),
    ]  # fmt: skip
