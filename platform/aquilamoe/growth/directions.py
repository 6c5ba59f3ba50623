"""Directions that separate the copies of an expert: what a signed split adds to the rows of a router.

Every expert of a layer gets m copies, and copy c the row of its original plus `o_c`. All E rows of one c are therefore
shifted by the same `o_c . x`. With `a` the largest and `b` the second of the m shifts of a token, it chooses one copy
of each of its k experts exactly if `a - b` exceeds the gap between its first and its k-th score. A good set of
directions has few tokens with small differences (the fence), and as many tokens of every expert on each side.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from aquilamoe.growth import rng

# Of the search for a direction that few tokens lie across. It has few numbers to choose, for with many it would part
# the calibration tokens and no others: the best of several spaces is taken, on tokens that were not searched on.
DIMENSIONS = (32, 128)
STARTS = 3
STEPS = 150
RATE = 0.03
FENCE = 0.15
SHARPNESS = 3.0
BALANCE = 0.2
SEARCHED = 0.75  # of the tokens
# The two sides have at least so many of the tokens.
LEAST_SIDE = 0.4
PLACES = 33
POWER_ROUNDS = 6  # of subspace iteration
MEAN_ROUNDS = 25  # of k-means
RIDGE = 1e-4  # of the mean square of a channel
LEAST_SHIFT = 1.0  # of `auto`, where no token needs any
QUANTILE = 0.98


@dataclass(frozen=True)
class RouterInputs:
    """What a router reads on the calibration tokens, and what it makes of them.

    x_nd: float32 or wider. rows_ed: the router's, of the same dtype. chosen: experts of a token.
    """

    x_nd: Tensor
    rows_ed: Tensor
    chosen: int

    @cached_property
    def logits_ne(self) -> Tensor:
        return self.x_nd @ self.rows_ed.T

    @cached_property
    def experts_nk(self) -> Tensor:
        return self.logits_ne.topk(self.chosen, dim=1).indices

    @cached_property
    def gap_n(self) -> Tensor:
        """Between the first and the last score that a token chooses."""
        top_nk = self.logits_ne.topk(self.chosen, dim=1).values
        return top_nk[:, 0] - top_nk[:, -1]

    @cached_property
    def mean_d(self) -> Tensor:
        return self.x_nd.mean(dim=0)

    @cached_property
    def factor_dd(self) -> Tensor:
        """Cholesky factor of the second moments of the inputs, with a ridge."""
        moments_dd = self.x_nd.T @ self.x_nd / len(self.x_nd)
        moments_dd.diagonal().add_(RIDGE * moments_dd.diagonal().mean())
        return torch.linalg.cholesky(moments_dd)

    def parts(self, share: float) -> tuple["RouterInputs", "RouterInputs"]:
        """The first tokens, and the others."""
        count = max(1, int(share * len(self.x_nd)))
        return replace(self, x_nd=self.x_nd[:count]), replace(self, x_nd=self.x_nd[count:])

    def fit(self, values_n: Tensor) -> Tensor:
        """The row (d,) whose products with the inputs come closest to these values."""
        products_d = self.x_nd.T @ values_n / len(self.x_nd)
        return torch.cholesky_solve(products_d[:, None], self.factor_dd)[:, 0]

    @cached_property
    def one_d(self) -> Tensor:
        """The row whose product with every input is as near to 1 as can be."""
        return self.fit(torch.ones(len(self.x_nd), dtype=self.x_nd.dtype))

    def covary(self, vectors_sd: Tensor) -> Tensor:
        """Covariance of the inputs times vectors (s, d)."""
        centred_nd = self.x_nd - self.mean_d
        return (vectors_sd @ centred_nd.T) @ centred_nd / len(self.x_nd)


def neutral(inputs: RouterInputs, earlier_sd: Tensor) -> Tensor:
    """Orthonormal rows (r, d) that a direction avoids: the mean, what favours experts, and what repeats earlier ones.

    A direction at right angles to them is uncorrelated with the differences of scores, and with the earlier
    directions. Where experts span most of the channels, balance is left to the search.
    """
    avoided = [inputs.mean_d[None], inputs.covary(earlier_sd)]
    if 2 * len(inputs.rows_ed) < inputs.x_nd.shape[1]:
        avoided.append(inputs.covary(inputs.rows_ed - inputs.rows_ed.mean(dim=0)))
    return _orthonormal(torch.cat(avoided))


def _orthonormal(vectors_sd: Tensor) -> Tensor:
    """A basis (r, d) of what vectors span."""
    sizes = vectors_sd.norm(dim=1, keepdim=True)
    _, singular, basis_rd = torch.linalg.svd(vectors_sd / sizes.clamp(min=1e-30), full_matrices=False)
    return basis_rd[singular > 1e-4]


def _without(vectors_sd: Tensor, basis_rd: Tensor) -> Tensor:
    return vectors_sd - (vectors_sd @ basis_rd.T) @ basis_rd


def scaled(inputs: RouterInputs, u_d: Tensor) -> Tensor:
    """A direction with a deviation of 1, moved to where few tokens are near zero and about half on either side."""
    u_d = u_d / (inputs.x_nd @ u_d).std(correction=0).clamp(min=1e-30)
    read_n, ones_n = inputs.x_nd @ u_d, inputs.x_nd @ inputs.one_d
    sorted_n = read_n.sort().values
    last = len(sorted_n) - 1
    first, second = sorted_n[int(LEAST_SIDE * last)], sorted_n[int((1 - LEAST_SIDE) * last)]
    places = [first + (second - first) * step / (PLACES - 1) for step in range(PLACES)]
    best = min(places, key=lambda place: _at_fence(inputs.gap_n, read_n - place * ones_n))
    u_d = u_d - best * inputs.one_d
    return u_d / (inputs.x_nd @ u_d).std(correction=0).clamp(min=1e-30)


def _at_fence(gap_n: Tensor, read_n: Tensor) -> tuple[float, float]:
    """What a direction is judged by: the shift that tokens need, then how many are near zero."""
    return needed(gap_n, 2 * read_n.abs()), (1 / (1 + (read_n / FENCE).square())).mean().item()


def learned(inputs: RouterInputs, earlier_sd: Tensor, random: rng.Stream) -> Tensor:
    """A direction (d,) that few tokens lie across, and that halves the tokens of every expert.

    earlier_sd: the directions before it, whose sides it halves again. random: of the first steps.
    Searched in spaces of leading principal components, from several of these.
    """
    searched, others = inputs.parts(SEARCHED)
    basis_rd = neutral(searched, earlier_sd)
    components_rd = _leading(searched, basis_rd, random)
    cells_cn = _cells(searched, earlier_sd)
    candidates = []
    for size in sorted({min(size, len(components_rd)) for size in DIMENSIONS}):
        space_rd = components_rd[:size]
        with torch.inference_mode(False), torch.enable_grad():
            found_sr = _search((searched.x_nd @ space_rd.T).clone(), cells_cn.clone())
        candidates += [scaled(searched, u_d) for u_d in found_sr @ space_rd]
    return min(candidates, key=lambda u_d: _at_fence(others.gap_n, others.x_nd @ u_d))


def _leading(inputs: RouterInputs, basis_rd: Tensor, random: rng.Stream) -> Tensor:
    """The leading principal components (r, d) beside the avoided directions, by subspace iteration."""
    channels = inputs.x_nd.shape[1]
    count = max(1, min(max(DIMENSIONS), channels - len(basis_rd)))
    found_rd = torch.from_numpy(rng.normal((count, channels), random)).to(inputs.x_nd.dtype)
    for _ in range(POWER_ROUNDS):
        found_rd = torch.linalg.qr(_without(inputs.covary(_without(found_rd, basis_rd)), basis_rd).T).Q.T
    small_rr = found_rd @ inputs.covary(found_rd).T
    return torch.linalg.eigh((small_rr + small_rr.T) / 2).eigenvectors.flip(1).T @ found_rd


def _cells(inputs: RouterInputs, earlier_sd: Tensor) -> Tensor:
    """What is to be halved: the tokens of each expert on each side of earlier directions, as weights (c, n)."""
    experts = len(inputs.rows_ed)
    sides_n = torch.zeros(len(inputs.x_nd), dtype=torch.int64)
    for u_d in earlier_sd:
        sides_n = 2 * sides_n + (inputs.x_nd @ u_d > 0)
    members_cn = torch.zeros(experts << len(earlier_sd), len(inputs.x_nd), dtype=inputs.x_nd.dtype)
    for expert_n in inputs.experts_nk.T:
        members_cn[expert_n + experts * sides_n, torch.arange(len(inputs.x_nd))] = 1
    counts_c1 = members_cn.sum(dim=1, keepdim=True)
    return (members_cn / counts_c1.clamp(min=1))[counts_c1[:, 0] > 0]


def _search(coordinates_nr: Tensor, cells_cn: Tensor) -> Tensor:
    """Directions (s, r), moved from the first axes until few tokens are near zero and every cell is halved."""
    size = coordinates_nr.shape[1]
    scaled_nr = coordinates_nr / coordinates_nr.std(dim=0, correction=0).mean().clamp(min=1e-30)
    free_sr = torch.eye(min(STARTS, size), size, dtype=coordinates_nr.dtype) * size**0.5  # entries of about 1
    free_sr.requires_grad_()
    optimizer = torch.optim.Adam([free_sr], lr=RATE)
    for _ in range(STEPS):
        z_ns = scaled_nr @ free_sr.T
        z_ns = z_ns / z_ns.std(dim=0, correction=0)
        at_fence_s = (1 / (1 + (z_ns / FENCE).square())).mean(dim=0)
        sides_ns = (SHARPNESS * z_ns).tanh()
        uneven_s = (cells_cn @ sides_ns).square().mean(dim=0) + sides_ns.mean(dim=0).square()
        optimizer.zero_grad()
        (at_fence_s + BALANCE * uneven_s).sum().backward()
        optimizer.step()
    return free_sr.detach()


def random_direction(inputs: RouterInputs, earlier_sd: Tensor, random: rng.Stream) -> Tensor:
    """A drawn direction (d,), balanced and scaled by the inputs."""
    u_1d = torch.from_numpy(rng.normal((1, inputs.x_nd.shape[1]), random)).to(inputs.x_nd.dtype)
    return scaled(inputs, _without(u_1d, neutral(inputs, earlier_sd))[0])


def blind_directions(rows_ed: Tensor, gain_d: Tensor, count: int, random: rng.Stream) -> Tensor:
    """Drawn directions (count, d) where no input is known: at right angles to differences of the rows and each other.

    gain_d: of the norm before the router. Its inputs are this times numbers whose mean square is 1: were they
    independent, a product with a direction would have a deviation of 1.
    """
    drawn_cd = torch.from_numpy(rng.normal((count, rows_ed.shape[1]), random)).to(rows_ed.dtype)
    basis_rd = _orthonormal(rows_ed - rows_ed.mean(dim=0))
    if 2 * len(basis_rd) < rows_ed.shape[1]:
        drawn_cd = _without(drawn_cd, basis_rd)
    drawn_cd = torch.linalg.qr(drawn_cd.T).Q.T[:count]
    return drawn_cd / (drawn_cd * gain_d).norm(dim=1, keepdim=True).clamp(min=1e-30)


def signs(u_jd: Tensor) -> Tensor:
    """Rows (2^j, d) of all sums of j directions with a sign each."""
    codes = torch.arange(1 << len(u_jd))[:, None] >> torch.arange(len(u_jd)).flip(0) & 1
    return (1 - 2 * codes).to(u_jd.dtype) @ u_jd


def corners(vectors_md: Tensor) -> Tensor:
    """m vectors less their mean: the rows of as many copies as no power of two is."""
    return vectors_md - vectors_md.mean(dim=0)


def centroids(inputs: RouterInputs, count: int, random: rng.Stream) -> Tensor:
    """Rows (count, d): the centres of spherical k-means of the inputs, each nearest to as many tokens."""
    basis_rd = neutral(inputs, inputs.x_nd[:0])
    points_nd = torch.nn.functional.normalize(_without(inputs.x_nd - inputs.mean_d, basis_rd), dim=1)
    first = int(random.random_raw(1)[0] % len(points_nd))
    centres_cd = points_nd[first : first + 1]
    for _ in range(count - 1):  # the next centre is the point that is farthest from all of them
        farthest = (points_nd @ centres_cd.T).amax(dim=1).argmin()
        centres_cd = torch.cat([centres_cd, points_nd[farthest : farthest + 1]])
    for _ in range(MEAN_ROUNDS):
        nearest_n = (points_nd @ centres_cd.T).argmax(dim=1)
        sums_cd = torch.zeros_like(centres_cd).index_add_(0, nearest_n, points_nd)
        centres_cd = torch.nn.functional.normalize(sums_cd, dim=1)
    return balanced(inputs, corners(centres_cd))


def balanced(inputs: RouterInputs, rows_md: Tensor) -> Tensor:
    """Rows whose products are the largest for as many tokens each, with a deviation of 1 over rows and tokens."""
    products_nm = inputs.x_nd @ rows_md.T
    rows_md = rows_md / (products_nm - products_nm.mean(dim=1, keepdim=True)).square().mean().sqrt().clamp(min=1e-30)
    products_nm = inputs.x_nd @ rows_md.T
    offsets_m = products_nm.mean(dim=0)
    for step in range(2 * MEAN_ROUNDS):
        winners_n = (products_nm - offsets_m).argmax(dim=1)
        shares_m = winners_n.bincount(minlength=len(rows_md)) / len(winners_n)
        offsets_m = offsets_m + (shares_m - 1 / len(rows_md)) / (1 + 0.1 * step)
    return rows_md - offsets_m[:, None] * inputs.one_d


def margin(products_nm: Tensor) -> Tensor:
    """Of each token (n,), how far the best of the copies is before the second."""
    best_n2 = products_nm.topk(2, dim=1).values
    return best_n2[:, 0] - best_n2[:, 1]


def needed(gap_n: Tensor, margin_n: Tensor) -> float:
    """The shift that 98 % of the tokens need, `margin_n` being what a shift of 1 separates their copies by."""
    shifts_n = torch.where(gap_n > 0, gap_n / margin_n.clamp(min=1e-30), 0.0)
    return shifts_n.double().sort().values[min(len(shifts_n) - 1, math.ceil(QUANTILE * len(shifts_n)) - 1)].item()


def common_row(inputs: RouterInputs, rows_md: Tensor) -> Tensor:
    """The row (d,) that, subtracted from all of a softmax router, makes its z-loss small and changes nothing else.

    rows_md: what is added to the rows of the m copies.
    """
    sums_n = inputs.logits_ne.logsumexp(dim=1) + (inputs.x_nd @ rows_md.T).logsumexp(dim=1)
    return inputs.fit(sums_n)
