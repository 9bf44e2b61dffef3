"""What a results file says, for people: a table of each question in the terminal and on the site, and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .results import Key, Results, labels_of, mean, verdict

Found = dict[Key, dict[int, dict[str, Any]]]
DIGITS_SCORE, PAIRS_SCORE = "one-shot accuracy, %", "mean reciprocal rank x 100"
# question -> title, what x is, score, the label all others are compared with
QUESTIONS = {
    "losses": ("Every loss, each at its best temperature", "", DIGITS_SCORE, "InfoNCE"),
    "batch": ("Debiasing as the batch grows", "images in a batch", DIGITS_SCORE, "InfoNCE, t 0.2"),
    "beta": ("Hard negatives against beta", "beta", DIGITS_SCORE, "tau_plus 0.1"),
    "alpha": ("The Bayesian loss against alpha", "alpha", DIGITS_SCORE, "InfoNCE"),
    "found": ("False negatives known, guided, detected", "", DIGITS_SCORE, "InfoNCE"),
    "soft": ("Soft labels over a queue", "", DIGITS_SCORE, "MoCo"),
    "coverage": ("More negatives than classes need", "images in a batch", DIGITS_SCORE, "InfoNCE"),
    "pairs": ("Docstrings and code, heads on frozen MiniLM", "", PAIRS_SCORE, "InfoNCE"),
    "whole": ("Docstrings and code, all of MiniLM, batches of 64", "", PAIRS_SCORE, "InfoNCE"),
}
COLORS = ("#0b6fb8", "#d1495b", "#2a9d6f", "#e09f3e", "#6a4c93")


def show(results: Results, site: Path | None) -> None:
    """Print every table; with the folder of the site also put them and the pictures there."""
    asked = [question for question in QUESTIONS if results.of(question)]
    for question in asked:
        print(f"\n{QUESTIONS[question][0]}\n{table(results, question)}", end="")
    if site is None:
        return
    page = site / "study.md"
    text = page.read_text(encoding="utf-8")
    for question in asked:
        begin, end = f"<!-- study {question} -->\n", f"<!-- end of study {question} -->"
        before, _, rest = text.partition(begin)
        if end not in rest:
            raise SystemExit(f"{page} has no marks for {question}: {begin.strip()} and {end}.")
        picture = f"![{QUESTIONS[question][0]}](pictures/study-{question}.png)"
        text = f"{before}{begin}{table(results, question)}\n{picture}\n\n{end}{rest.partition(end)[2]}"
        draw(results, question, site / "pictures" / f"study-{question}.png")
    page.write_text(text, encoding="utf-8")


def table(results: Results, question: str) -> str:
    """Markdown: mean and standard deviation over seeds, and the difference to the baseline with the same seeds."""
    found = results.of(question)
    _, x_name, score, baseline = QUESTIONS[question]
    heads = ["run", *([x_name] if x_name else []), "temperature", score, f"against {baseline}"]
    lines = [heads, ["---"] * len(heads)]
    labels = labels_of(list(found))
    for (label, x), seeds in sorted(found.items(), key=lambda run: (labels.index(run[0][0]), run[0][1] or 0.0)):
        against = found.get((baseline, x), found.get((baseline, None)))
        if question == "coverage":
            against = found[baseline, max(other for _, other in found if other is not None)]
        elif question == "beta":
            against = found[label, 0.0]
        place = [] if not x_name else ["" if x is None else f"{x:g}"]
        temperature = f"{next(iter(seeds.values()))['temperature']:g}"
        lines.append([label, *place, temperature, str(mean(seeds))])
        lines[-1].append("" if against is None or against is seeds else verdict(seeds, against))
    if question == "coverage":
        lines[0][-1] = "against the largest batch"
    if question == "beta":
        lines[0][-1] = "against beta 0"
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def draw(results: Results, question: str, path: Path) -> None:
    """Bars where labels are compared, curves where there is an x; what stands beside a curve without x is a line."""
    plt = _pyplot()
    found = results.of(question)
    title, x_name, score, baseline = QUESTIONS[question]
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = labels_of(list(found))
    figure, axes = plt.subplots(figsize=(7, 3.4 if x_name else 0.6 + 0.42 * len(labels)), layout="constrained")
    if x_name:
        _curves(axes, found, labels)
        axes.set(xlabel=x_name, ylabel=score)
        if question in ("batch", "coverage"):
            axes.set_xscale("log", base=2)
            ticks = sorted({x for _, x in found if x is not None})
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        if question == "coverage":
            _coverage(axes, [x for _, x in found if x is not None])
        axes.legend(frameon=False, fontsize=8)
    else:
        means = [mean(seeds) for seeds in found.values()]
        reference = mean(found[baseline, None]).value
        colors = [COLORS[0] if label == baseline else "#9fb8cc" for label in labels]
        axes.barh(labels, [m.value for m in means], xerr=[m.spread for m in means], color=colors, height=0.7)
        axes.axvline(reference, color=COLORS[0], lw=0.8, ls=":")
        axes.set_xlim(left=max(0.0, min(m.value - m.spread for m in means) - 8))
        axes.invert_yaxis()
        axes.set_xlabel(score)
    axes.set_title(title, loc="left", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curves(axes: Any, found: Found, labels: list[str]) -> None:
    for label, color in zip(labels, COLORS * 2, strict=False):
        points = sorted((x, mean(seeds)) for (other, x), seeds in found.items() if other == label and x is not None)
        if points:
            x, means = [p[0] for p in points], [p[1] for p in points]
            axes.plot(x, [m.value for m in means], "o-", color=color, ms=4, label=label)
            low, high = [m.value - m.spread for m in means], [m.value + m.spread for m in means]
            axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
        else:
            axes.axhline(mean(found[label, None]).value, color=color, lw=1.2, ls="--", label=label)


def _coverage(axes: Any, batches: list[float]) -> None:
    from contrastive_ext.theory import coverage_probability

    right = axes.twinx()
    right.plot(sorted(batches), [100 * float(coverage_probability(int(b), num_classes=10)) for b in sorted(batches)],
               color="#888", lw=1, ls=":")  # fmt: skip
    right.set_ylabel("probability that a batch has all ten classes, %", color="#666", fontsize=8)
    right.spines["right"].set_visible(True)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt
