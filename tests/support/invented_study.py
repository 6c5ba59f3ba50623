"""Studies of invented numbers, for what reads studies: pages, findings, advice, MLflow."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from aquilamoe.ablation.ranking import horizon_of, judge, leaders_of
from aquilamoe.ablation.study import Ancestor, Control, Entry, Seed, Study

SOURCE_LOSS, POINTS = 3.6, 20
SOURCE_FLOPS, GROWN_FLOPS = 2.7e6, 9.8e6  # of a token
EQUAL_FLOPS = 9.8e12  # of a variant's million tokens


def invent(
    ends: Mapping[str, float],
    starts: Mapping[str, float] = {},
    tokens: Mapping[str, int] = {},
    noise: float = 0.01,
    seeds: tuple[int, ...] = (1, 2, 3),
    continued: float | None = 3.4,
    scratch: Mapping[float, float] = {},
    failed: Mapping[str, str] = {},
    baseline: str | None = None,
    source: tuple[int, int] = (450_000, 2_000_000),
) -> Study:
    """A study: `invent(ends={"fpi": 3.3, "aki": 3.2}, noise=0.01)`; the first is the baseline.

    ends, starts: held-out losses of every variant; tokens: of its stage, if not a million. continued, scratch: what the
    controls of equal FLOPs end with, the latter by ratio of learning rates. failed: variants without a result, and why.
    source: its parameters and tokens.
    """
    names = [*ends, *failed]
    known = _Numbers(source[1], noise, seeds, names)
    entries = [
        known.variant(name, starts.get(name, 3.9), end, tokens.get(name, 1_000_000)) for name, end in ends.items()
    ]
    entries += [_entry(name, None, {}, dict.fromkeys(seeds, reason)) for name, reason in failed.items()]
    entries += [known.control("prepare", 1.0, continued)] if continued is not None else []
    entries += [known.control(None, ratio, end) for ratio, end in scratch.items()]
    judged = judge(entries, baseline or names[0])
    variants = [each for each in judged if each.control is None]
    return Study(
        name="ablation_invented",
        description="Invented numbers.",
        command="python workflows/ablations.py +ablation=invented",
        objective={"stage": "dense", "metric": "loss_end"},
        axes={"method": names},
        baseline=baseline or names[0],
        seeds=list(seeds),
        horizon=horizon_of(variants, baseline or names[0]),
        ancestors={"source": _source(*source)},
        entries=judged,
        leaders=leaders_of(variants),
    )


@dataclass
class _Numbers:
    """Draws the seeds of variants and of controls."""

    source_tokens: int
    noise: float
    seeds: tuple[int, ...]
    names: list[str]
    draw: Random = field(default_factory=lambda: Random(0))

    def variant(self, name: str, start: float, end: float, tokens: int) -> Entry:
        return _entry(name, None, {n: self._seed(start, end, tokens, GROWN_FLOPS, True) for n in self.seeds}, {})

    def control(self, of: str | None, ratio: float, end: float) -> Entry:
        """As many FLOPs as the variants' lines, from the source on or from nothing."""
        kind = f"continued_{of}_flops" if of else "scratch_flops"
        control = Control(
            kind=kind,
            of=of,
            equal="flops",
            learning_rate_ratio=ratio,
            best=False,
            stands_for=self.names,
            differences={},
        )
        whole = EQUAL_FLOPS + self.source_tokens * SOURCE_FLOPS
        tokens = round(EQUAL_FLOPS / SOURCE_FLOPS if of else whole / GROWN_FLOPS)
        start, per_token = (SOURCE_LOSS, SOURCE_FLOPS) if of else (8.0, GROWN_FLOPS)
        values = {n: self._seed(start, end, tokens, per_token, of is not None) for n in self.seeds}
        return _entry(f"{kind}_x{ratio:g}", control, values, {})

    def _seed(self, start: float, end: float, tokens: int, flops_per_token: float, grown: bool) -> Seed:
        shift, steep = self.draw.gauss(0, self.noise), 4.0
        ancestors = self.source_tokens * SOURCE_FLOPS if grown else 0.0
        curve = []
        for index in range(POINTS + 1):
            share = (math.exp(-steep * index / POINTS) - math.exp(-steep)) / (1 - math.exp(-steep))
            at = tokens * index // POINTS
            curve.append((float(at), ancestors + at * flops_per_token, end + (start - end) * share + shift))
        jump = {"loss_source": SOURCE_LOSS, "loss_grown": start, "loss_jump": start - SOURCE_LOSS}
        ranks = {"kl": 0.1, "rank_grown": 0.6, "rank_end": 0.7}
        recovery = {"recovery_tokens": 2e5, "recovery_flops": 2e12}
        return Seed(
            fingerprint=f"{self.draw.getrandbits(48):012x}",
            value=curve[-1][2],
            loss=curve[-1][2],
            tokens=tokens,
            flops=tokens * flops_per_token,
            lineage_tokens=tokens + (self.source_tokens if grown else 0),
            lineage_flops=curve[-1][1],
            ancestors=["source"] if grown else [],
            figures={**jump, **ranks, **recovery} if grown else {},
            curve=curve,
        )


def _entry(name: str, control: Control | None, values: dict[int, Seed], lacking: dict[int, str]) -> Entry:
    return Entry(
        name=name,
        axes={} if control else {"method": name},
        control=control,
        params_total=1_630_000,
        params_active=1_630_000,
        learning_rate=1e-3,
        seeds=values,
        missing=lacking,
    )


def _source(params: int, tokens: int) -> Ancestor:
    cost = tokens * SOURCE_FLOPS
    curve = [(cost * index / POINTS, SOURCE_LOSS + 4 * math.exp(-index / 3)) for index in range(POINTS + 1)]
    return Ancestor(
        stage="prepare",
        params=params,
        learning_rate=3e-3,
        tokens=tokens,
        flops=cost,
        loss=curve[-1][1],
        curve=curve,
    )
