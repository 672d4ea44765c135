"""What a run found, as Markdown for docs/results.md and as lines of results.csv."""

from __future__ import annotations

from collections.abc import Iterator

from compression_worker.contracts import Json
from compression_worker.evaluation.config import EvaluationConfig
from dashboard.verdicts import VerdictKind
from tests.benchmarks.bench_bitdelta import record
from tests.benchmarks.delta_peers.contest import Contest, Line, Round
from tests.benchmarks.delta_peers.measure import MARGIN, compare, figures
from tests.benchmarks.delta_peers.sizes import EQUAL

WORDS = {
    VerdictKind.BETTER: "better",
    VerdictKind.EQUAL: "equal",
    VerdictKind.WORSE: "**worse**",
    VerdictKind.UNCLEAR: "not enough evidence",
}
COLUMNS = ("form", "kept as it is", "size", "true", "nominal", "bits/weight", "perplexity", "KL", "top-1 %")
DETAILS = ("kept as it is", "bits/weight")
"""Columns that the table of ours leaves out."""
CONTEST = ("best peer in as many bytes: its KL", "KL of ours − its", "better than")


def markdown(contest: Contest, config: EvaluationConfig, windows: int) -> str:
    """One table of ours, then the verdicts, every form, round by round, and what is missing."""
    blocks = [_ends(contest, config, windows)]
    if any(one.ours for one in contest.rounds):
        blocks += [_ours(contest, config)]
    verdicts = "\n".join(f"- {line}" for line in _summary(contest, config))
    if verdicts:
        blocks += [f"Ours at equal bytes, by KL (margin {100 * MARGIN:.0f} % of the peer's):\n\n{verdicts}"]
    blocks += [_round(one, config) for one in contest.rounds if one.contended]
    if notes := [*contest.notes, *_too_large(contest)]:
        blocks += ["Not in the tables:\n\n" + "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(blocks) + "\n"


def _ours(contest: Contest, config: EvaluationConfig) -> str:
    """A line for each of ours: its figures, the peer that comes nearest to the variant in no more bytes, the count."""
    lines = [(one, mine) for one in contest.rounds for mine in one.ours]
    found = figures({str(at): mine.windows for at, (_, mine) in enumerate(lines)}, "0", config)
    heads = [head for head in COLUMNS if head not in DETAILS] + [*CONTEST]
    rows = [heads, ["---"] * len(heads)]
    for at, (one, mine) in enumerate(lines):
        cells = zip(COLUMNS, _cells(mine, found, str(at)), strict=True)
        rows.append([*(cell for head, cell in cells if head not in DETAILS), *_standing(mine, one, config)])
    return _lines(rows)


def _standing(mine: Line, one: Round, config: EvaluationConfig) -> list[str]:
    """The best peer in reach with its KL, ours minus that, how many of its size ours beats."""
    peers = [line for line in one.peers if in_reach(line, mine)]
    if not peers:
        return ["no peer was made of this size", "", ""]
    best = min(peers, key=divergence)
    equal = [line for line in peers if not unequal(line, mine)]
    won = [compare(mine.windows, line.windows, config).verdict.kind for line in equal].count(VerdictKind.BETTER)
    name = f"{best.name} ({best.kept} kept{unequal(best, mine)}): {divergence(best):.4f}"
    return [name, _difference(mine, best, config), f"{won} of {len(equal)}"]


def divergence(line: Line) -> float:
    """Mean KL divergence from the variant, in nats a token."""
    tokens, kl = (sum(window[key] for window in line.windows) for key in ("tokens", "kl"))
    return float(kl / tokens)


def _too_large(contest: Contest) -> Iterator[str]:
    for one in contest.rounds:
        for kept in sorted({kept for _, kept in one.too_large}):
            names = "; ".join(name for name, other in one.too_large if other == kept)
            yield f"with {kept} kept as they are, not as small as {megabytes(one.size)}: {names}"


def keep_records(contest: Contest, name: str) -> None:
    """A line of results.csv for each form: its KL, and what it costs."""
    for line in [line for one in contest.rounds for line in (*one.ours, *one.peers)]:
        tokens, agreements = (sum(window[key] for window in line.windows) for key in ("tokens", "agreements"))
        form = f"{name}: {line.name}, {line.kept} kept" + (f", {line.dial}" if line.dial else "")
        unit = f"nats/token; {line.size} bytes, true ratio {line.true:.2f}, top-1 {agreements / tokens:.4f}"
        record(form, divergence(line), unit, benchmark="delta_peers")


def _ends(contest: Contest, config: EvaluationConfig, windows: int) -> str:
    found = figures(dict(contest.ends), "variant", config)
    head = f"{windows} windows of {config.window_tokens} tokens."
    base, variant = (shown(found["perplexity"][name], 2) for name in ("base", "variant"))
    return f"{head} Perplexity of the base {base}, of the variant {variant}; KL of the base {shown(found['kl_divergence']['base'], 4)}."


def _round(one: Round, config: EvaluationConfig) -> str:
    lines = [*one.ours, *one.peers]
    if not lines:
        return f"**At {megabytes(one.size)}** no peer was measured."
    found = figures({str(at): line.windows for at, line in enumerate(lines)}, "0", config)
    heads = [*COLUMNS, *(f"KL of *{line.name}* − this" for line in one.ours)]
    rows = [heads, ["---"] * len(heads)]
    for at, line in enumerate(lines):
        rows.append([*_cells(line, found, str(at)), *_against(line, one, config)])
    return f"**At {megabytes(one.size)}**\n\n" + _lines(rows)


def _lines(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(line: Line, found: dict[str, Json], key: str) -> list[str]:
    ratios = [megabytes(line.size), f"{line.true:.2f}", f"{line.nominal:.4g}", f"{line.bits:.3g}"]
    perplexity, kl, agreement = (found[name][key] for name in ("perplexity", "kl_divergence", "top1_agreement"))
    share = {name: 100 * value for name, value in agreement.items()}
    name = f"{line.name} ({line.dial})" if line.dial else line.name
    return [name, line.kept, *ratios, shown(perplexity, 2), shown(kl, 4), shown(share, 1)]


def _against(line: Line, one: Round, config: EvaluationConfig) -> Iterator[str]:
    for mine in one.ours:
        if line in one.ours:
            yield ""
            continue
        yield _difference(mine, line, config) + unequal(line, mine)


def _difference(mine: Line, line: Line, config: EvaluationConfig) -> str:
    """Ours minus a peer, and the verdict where the peer is in reach."""
    found = compare(mine.windows, line.windows, config)
    span = f"{found.difference:+.4f} ({found.low:+.4f} … {found.high:+.4f})"
    return span + (f" {WORDS[found.verdict.kind]}" if in_reach(line, mine) else "")


def in_reach(line: Line, mine: Line) -> bool:
    """Whether a peer has no more bytes than ours: a larger one that is nearer to the variant proves nothing."""
    return line.size <= mine.size * (1 + EQUAL)


def unequal(line: Line, mine: Line) -> str:
    """A warning where a peer is not of our size; nothing where it is."""
    share = line.size / mine.size
    return "" if abs(share - 1) <= EQUAL else f", at {share:.2f} × our bytes"


def _summary(contest: Contest, config: EvaluationConfig) -> Iterator[str]:
    """For each of ours how it stands against peers of its size; and each peer, smaller ones too, that it does not beat."""
    for one in filter(lambda one: one.contended, contest.rounds):
        for mine in one.ours:
            results = [
                (line, compare(mine.windows, line.windows, config).verdict.kind)
                for line in one.peers
                if in_reach(line, mine)
            ]
            equal = [kind for line, kind in results if not unequal(line, mine)]
            words = (
                f"*{mine.name}* ({megabytes(mine.size)}): better than {equal.count(VerdictKind.BETTER)} of {len(equal)}"
            )
            for kind, text in ((VerdictKind.EQUAL, "Equal to"), (VerdictKind.WORSE, "**Worse** than")):
                words += _listed(results, mine, kind, text)
            yield words + _listed(results, mine, VerdictKind.UNCLEAR, "Not enough evidence against")


def _listed(results: list[tuple[Line, VerdictKind]], mine: Line, kind: VerdictKind, text: str) -> str:
    names = [f"{line.name} ({line.kept} kept{unequal(line, mine)})" for line, found in results if found == kind]
    return f". {text}: {'; '.join(names)}" if names else ""


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 10_000_000 else f"{size / 1e3:.1f} kB"


def shown(estimate: Json, digits: int) -> str:
    """A figure with its interval."""
    value, low, high = (f"{estimate[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low}–{high})"
