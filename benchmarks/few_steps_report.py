"""Tables, the project's targets and the picture of benchmarks.few_steps, from its records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.few_steps_cases import DIGITS, ISOTROPIC, MIXTURE, PATHS, SPREAD
from fastdensity.figures import DETAIL_COLOUR, LOG_DENSITY_COLOUR, _figure

Record = dict[str, Any]
VP_PATH, KARRAS, RECTIFIED = (path.name for path in PATHS)
FIRST_ORDER, SECOND_ORDER = ("euler", "ddim"), ("heun", "dpmpp_2m")
# nats at most, of a solver of first order: path, steps, bound
FIRST_ORDER_BOUNDS = (
    (VP_PATH, 20, 4.0),
    (VP_PATH, 50, 0.5),
    (KARRAS, 20, 8.0),
    (KARRAS, 50, 1.0),
    (RECTIFIED, 50, 5.0),
)
SECOND_ORDER_STEPS, TIMES_BETTER, NATS_ENOUGH = 20, 5.0, 1.0
SAMPLE_MARGIN = 1e-4  # of |x_ref|: closer than this two samples count as equally good


def worst(records: Iterable[Record], form: str, key: str = "log_prob_error") -> float:
    """The largest mean over the quantiles; infinity where a row was not finite."""
    return max((float("inf") if r[form][key] is None else r[form][key] for r in records), default=float("nan"))


def pick(records: Iterable[Record], **wanted: Any) -> list[Record]:
    return [record for record in records if all(record[name] == value for name, value in wanted.items())]


def distinct(records: Iterable[Record], *names: str) -> list[tuple]:
    return list(dict.fromkeys(tuple(record[name] for name in names) for record in records))


def limited(records: list[Record]) -> str:
    """Rows whose guidance was bounded, and rows that were not finite, plain and tracked."""
    rows = sum(r["rows"] for r in records)
    bounded = sum(r["tracked"]["limited_rows"] for r in records)
    broken = [sum(r[form]["non_finite_rows"] for r in records) for form in ("plain", "tracked")]
    notes = f"{bounded}/{rows} limited" if bounded else ""
    return f"{notes}, not finite: {broken[0]} plain, {broken[1]} tracked" if any(broken) else notes


def print_steps(records: list[Record]) -> None:
    """Plain and tracked side by side, the worst of the quantiles."""
    print("\nmean error over the rows, the largest over q: of log p in nats, then of the sample; plain > tracked")
    for target, path in distinct(records, "target", "path"):
        print(f"\n{target}; {path}")
        for solver, steps in distinct(pick(records, target=target, path=path), "solver", "steps"):
            cell = pick(records, target=target, path=path, solver=solver, steps=steps)
            nats = " > ".join(f"{worst(cell, form):9.3g}" for form in ("plain", "tracked"))
            moved = " > ".join(f"{worst(cell, form, 'sample_error'):8.2g}" for form in ("plain", "tracked"))
            print(f"  {solver:9s} {steps:4d}  {nats}   {moved}   {limited(cell)}".rstrip())


def print_accounts(records: list[Record]) -> None:
    print("\nmixture, VP: log p gained less what was to be gained, mean |nats| (signed mean); less what was reported")
    for record in records:
        cells = []
        for form in ("plain", "tracked"):
            values = [record[form][k] for k in ("commanded_error", "mean_of_signed_error", "reported_error")]
            wanted, signed, reported = (float("nan") if value is None else value for value in values)
            cells.append(f"{form} {wanted:8.3g} ({signed:9.3g}), reported {reported:8.3g}")
        bounded = record["tracked"]["limited_rows"]
        note = f"   {bounded}/{record['rows']} limited" if bounded else ""
        print(f"  {record['guidance']:20s} {record['solver']:9s} {record['steps']:4d}  " + "   ".join(cells) + note)


def targets(records: list[Record]) -> Iterator[tuple[bool, str]]:
    """(met, in words) of every bound on log p that the project has set itself, for the worst q."""
    for target in (SPREAD, ISOTROPIC, MIXTURE):
        here = pick(records, target=target)
        for path, steps, bound in FIRST_ORDER_BOUNDS:
            for solver in FIRST_ORDER:
                cell = pick(here, path=path, steps=steps, solver=solver)
                if cell:
                    found = worst(cell, "tracked")
                    yield found <= bound, f"{target}; {path}; {solver} {steps}: {found:.3g} nats, wanted {bound:g}"
        for path, solver in distinct(here, "path", "solver"):
            cell = pick(here, path=path, solver=solver, steps=SECOND_ORDER_STEPS)
            if solver in SECOND_ORDER and cell:
                share = max(map(second_order_share, cell))
                text = f"{worst(cell, 'plain'):.3g} > {worst(cell, 'tracked'):.3g} nats, {share:.3f} of what is allowed"
                yield share <= 1.0, f"{target}; {path}; {solver} {SECOND_ORDER_STEPS}: {text}"


def second_order_share(record: Record) -> float:
    """Tracked error over the larger of a fifth of the plain one and one nat."""
    return worst([record], "tracked") / max(worst([record], "plain") / TIMES_BETTER, NATS_ENOUGH)


def worse_than_plain(records: list[Record], key: str, margin: float = 0.0) -> list[Record]:
    """Where the closed loop is farther from the guided flow than the plain sampler is, by more than the margin."""
    return [
        record for record in records if not worst([record], "tracked", key) <= worst([record], "plain", key) + margin
    ]


def print_worse(records: list[Record], key: str, margin: float) -> None:
    """One line for each solver and number of steps, with the quantiles."""
    for target, path, solver, steps in distinct(records, "target", "path", "solver", "steps"):
        cells = [
            f"q = {r['q']}: {worst([r], 'plain', key):.3g} > {worst([r], 'tracked', key):.3g}"
            for r in worse_than_plain(pick(records, target=target, path=path, solver=solver, steps=steps), key, margin)
        ]
        if cells:
            print(f"  MISSED {target}; {path}; {solver} {steps}: {', '.join(cells)}")


def print_targets(records: list[Record]) -> None:
    print("\ntargets for log p, at the worst q")
    for met, text in targets(records):
        print(f"  {'met   ' if met else 'MISSED'} {text}")
    for name, key, margin in (
        ("log p", "log_prob_error", 0.0),
        (f"sample (to {SAMPLE_MARGIN:g} of its norm)", "sample_error", SAMPLE_MARGIN),
    ):
        good = len(records) - len(worse_than_plain(records, key, margin))
        print(f"\n{name} no worse than plain: {good}/{len(records)}")
        print_worse(records, key, margin)
    compared = [r["reference_change"] for r in records if r["reference_change"] is not None]
    if compared:
        print(f"half as many steps change the references by {max(compared):.1g} of their norm at most")


SOLVER_NAMES = {"euler": "Euler", "ddim": "DDIM", "heun": "Heun (2 calls a step)", "dpmpp_2m": "DPM-Solver++(2M)"}
FORM_STYLES = (
    ("plain", DETAIL_COLOUR, "plain: track=False"),
    ("tracked", LOG_DENSITY_COLOUR, "closed loop: track=True"),
)
TARGET_STYLES: tuple[tuple[str, Any, str], ...] = (
    (SPREAD, "-", "o"),
    (ISOTROPIC, "--", "s"),
    (MIXTURE, ":", "^"),
    (DIGITS, "-.", "D"),
)


def picture(path: Path, records: list[Record]) -> None:
    """Error of log p against the number of steps: a row of panels for each path, a column for each solver."""
    from matplotlib.lines import Line2D

    paths = [name for (name,) in distinct(records, "path")]
    path.parent.mkdir(parents=True, exist_ok=True)
    with _figure(path, (10.0, 0.9 + 2.3 * len(paths))) as figure:
        panels = figure.subplots(len(paths), len(SOLVER_NAMES), sharex=True, sharey=True, squeeze=False)
        for row, name in zip(panels, paths, strict=True):
            for axes, solver in zip(row, SOLVER_NAMES, strict=True):
                draw(axes, pick(records, path=name, solver=solver))
            row[0].set_ylabel(f"{name}\nerror of log p (nats)")
        for axes, title in zip(panels[0], SOLVER_NAMES.values(), strict=True):
            axes.set_title(title, fontsize=9)
        for axes in panels[-1]:
            axes.set_xlabel("steps")
        forms = [Line2D([], [], color=colour, linewidth=2.5, label=label) for _, colour, label in FORM_STYLES]
        forms.append(Line2D([], [], color="0.6", linewidth=0.8, label="one nat"))
        kinds = [
            Line2D([], [], color="0.3", linestyle=style, marker=marker, markersize=4, label=legend(target, records))
            for target, style, marker in TARGET_STYLES
            if pick(records, target=target)
        ]
        figure.legend(handles=forms, loc="outside lower left", frameon=False)
        figure.legend(handles=kinds, loc="outside lower right", ncols=1, frameon=False)
        figure.suptitle(
            "How far log p of a sample ends from where guidance was to take it: mean over samples, at the worst q"
        )


def legend(target: str, records: list[Record]) -> str:
    """With the quantiles that were tried."""
    tried = ", ".join(f"{q:g}" for (q,) in sorted(distinct(pick(records, target=target), "q")))
    return f"{target} (worst of q = {tried})" if "," in tried else f"{target} (q = {tried})"


def draw(axes: Any, records: list[Record]) -> None:
    """Both forms on every target; what is not finite is left out."""
    from matplotlib.ticker import NullLocator

    steps = sorted({record["steps"] for record in records})
    for form, colour, _ in FORM_STYLES:
        for target, style, marker in TARGET_STYLES:
            cells = {count: pick(records, target=target, steps=count) for count in steps}
            errors = [worst(cell, form) if cell else float("nan") for cell in cells.values()]
            axes.plot(steps, errors, style, color=colour, marker=marker, markersize=4, linewidth=1.3)
    axes.set(xscale="log", yscale="log")
    axes.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(steps, [str(count) for count in steps])
    axes.grid(alpha=0.25, linewidth=0.6)
