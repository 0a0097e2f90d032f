"""How many drafted tokens are accepted, next to arctic-inference's suffix tree?

Recorded responses are replayed as greedy verification would: draft, count the drafted
tokens that agree with the text, go on after the first that does not. Every response is
replayed with 0, 1, 3 and 7 of its group's other responses in the tree as finished
references, beside its own history and the prompt.

The figures are mean acceptance lengths (1 + accepted / steps) at equal mean numbers of
drafted tokens a step. Each arm is run over a range of settings and judged by the upper
hull of what they reach: any point of it is had by mixing two settings. Ours varies the
confidence at which drafts end, the rival's everything it has, including two trees (one
of the request's own text and one of the group) as its cache keeps them, or one.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from common import print_result, result_line
from drafting import add_arguments, import_arctic, read_traces, settings_of

from aseer.dgds.cst import SuffixForest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aseer.data.trace import TraceGroup

SIBLINGS = (0, 1, 3, 7)
DRAFT_COUNTS = (1, 2, 3, 4, 5, 6, 7)
MAX_DRAFT = 16  # For both arms.
CONFIDENCES = (
    *(0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1, 0.08),
    *(0.06, 0.05, 0.04, 0.03, 0.02, 0.015, 0.01, 0.005, 0.002, 0.0),
)
CALIBRATED_AT = 0.02
ARCTIC_DEPTH = 64
CALIBRATION_BINS = 10


class Case(NamedTuple):
    """A response to replay, and the finished responses it may draw from."""

    prompt: NDArray[np.int32]
    response: NDArray[np.int32]
    siblings: list[NDArray[np.int32]]


class Tally(NamedTuple):
    """What a replay counted."""

    steps: int
    drafted: int
    accepted: int

    def point(self) -> tuple[float, float]:
        """Drafted tokens a step, and acceptance length."""
        return self.drafted / self.steps, 1 + self.accepted / self.steps


class ArcticSetting(NamedTuple):
    """Arguments of the rival's `speculate`, and whether it keeps two trees."""

    max_tokens: int
    factor: float
    offset: float
    min_prob: float
    two_trees: bool


def cases_of(
    groups: Sequence[TraceGroup], num_siblings: int, stride: int
) -> list[Case]:
    """Choose each stride-th response of each group, its siblings in cyclic order."""
    cases = []
    for group in groups:
        texts = group.responses
        for i in range(0, len(texts), stride):
            others = [texts[(i + k) % len(texts)] for k in range(1, len(texts))]
            cases.append(Case(group.prompt, texts[i], others[:num_siblings]))
    return cases


def num_agreeing(draft: Sequence[int], text: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = zip(draft, text, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def replay_ours(
    cases: Sequence[Case], min_confidence: float
) -> tuple[Tally, list[tuple[float, bool]]]:
    """Replay all cases as one batch; the tally, and (confidence, accepted) pairs."""
    forest = SuffixForest()
    requests = []
    for case in cases:
        group = forest.open_group(case.prompt)
        for sibling in case.siblings:
            writer = np.array([forest.open_request(group)])
            forest.append(writer, sibling, np.array([0, len(sibling)]))
        requests.append(forest.open_request(group))
    places = dict.fromkeys(range(len(cases)), 0)
    steps = drafted = accepted = 0
    calibration: list[tuple[float, bool]] = []
    while places:
        rows = np.array([requests[i] for i in places])
        limits = np.full(len(rows), MAX_DRAFT, np.int32)
        drafts = forest.draft(rows, limits, min_confidence=min_confidence)
        fresh = []
        for row, (i, place) in enumerate(list(places.items())):
            span = slice(drafts.offsets[row], drafts.offsets[row + 1])
            draft, rest = drafts.tokens[span], cases[i].response[place:]
            right = num_agreeing(draft.tolist(), rest[: len(draft)].tolist())
            steps, drafted, accepted = steps + 1, drafted + len(draft), accepted + right
            calibration += [
                (float(confidence), k < right)
                for k, confidence in enumerate(drafts.confidences[span])
            ]
            fresh.append(rest[: right + 1])
            places[i] = place + right + 1
            if places[i] >= len(cases[i].response):
                del places[i]
        offsets = np.concatenate(([0], np.cumsum([len(x) for x in fresh])))
        forest.append(rows, np.concatenate(fresh), offsets)
    return Tally(steps, drafted, accepted), calibration


def replay_arctic(
    cases: Sequence[Case], settings: Sequence[ArcticSetting]
) -> list[Tally]:
    """Replay all cases under every setting.

    What the trees hold at a place in a text does not depend on the setting, so every
    setting drafts at every place, and its replay is read off afterwards.
    """
    tallies = [Tally(0, 0, 0)] * len(settings)
    for case in cases:
        drafts = arctic_drafts(case, settings)
        for k, column in enumerate(drafts):
            steps = drafted = accepted = place = 0
            while place < len(column):
                size, right = column[place]
                steps, drafted, accepted = steps + 1, drafted + size, accepted + right
                place += right + 1
            sums = zip(tallies[k], (steps, drafted, accepted), strict=True)
            tallies[k] = Tally(*(a + b for a, b in sums))
    return tallies


def arctic_drafts(
    case: Case, settings: Sequence[ArcticSetting]
) -> list[list[tuple[int, int]]]:
    """Draft at every place: for each setting, (drafted, accepted) by place."""
    module = import_arctic()
    own, shared, everything = (module.SuffixTree(ARCTIC_DEPTH) for _ in range(3))
    for number, sibling in enumerate(case.siblings):
        shared.extend_ndarray(number + 1, sibling)
        everything.extend_ndarray(number + 1, sibling)
    own.extend_ndarray(0, case.prompt)
    everything.extend_ndarray(0, case.prompt)
    text = np.concatenate((case.prompt, case.response))
    truth = case.response.tolist()
    columns: list[list[tuple[int, int]]] = [[] for _ in settings]
    for place in range(len(truth)):
        end = len(case.prompt) + place
        context = text[max(0, end - ARCTIC_DEPTH) : end]
        rest = truth[place : place + 32]
        for setting, column in zip(settings, columns, strict=True):
            trees = (own, shared) if setting.two_trees else (everything,)
            drafts = [t.speculate_ndarray(context, *setting[:4], False) for t in trees]
            draft = max(drafts, key=lambda d: d.score).token_ids
            column.append((len(draft), num_agreeing(draft, rest)))
        for tree in (own, shared, everything):
            tree.extend_ndarray(0, text[end : end + 1])
    return columns


def arctic_settings(*, smoke: bool) -> list[ArcticSetting]:
    """List the settings that the rival is tried with."""
    limits = [(k, 8.0, 16.0) for k in (1, 2, 3, 4, 5, 6, 8, 11, MAX_DRAFT)]
    limits += [
        (MAX_DRAFT, factor, offset) for factor in (1.0, 2.0) for offset in (0.0, 1.0)
    ]
    probabilities = (0.0, 0.1, 0.3, 0.6)
    everything = [
        ArcticSetting(*limit, prob, two_trees)
        for limit, prob, two_trees in itertools.product(
            limits, probabilities, (False, True)
        )
    ]
    return everything[::40] if smoke else everything


def hull_at(
    points: Sequence[tuple[float, float]], counts: Sequence[float]
) -> list[float]:
    """Upper concave hull of (drafted, length) points, from (0, 1), at `counts`."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted([(0.0, 1.0), *points]):
        while len(hull) > 1:
            (ax, ay), (bx, by) = hull[-2:]
            if (bx - ax) * (y - ay) < (by - ay) * (x - ax):
                break
            hull.pop()
        if not hull or y > hull[-1][1]:
            hull.append((x, y))
    xs, ys = zip(*hull, strict=True)
    return [float(y) for y in np.interp(counts, xs, ys)]


def calibration_curve(pairs: Sequence[tuple[float, bool]]) -> list[dict[str, float]]:
    """Group predictions into equal bins; what was predicted, and what came true."""
    predicted, came_true = np.array(pairs, float).T
    bins = np.minimum((predicted * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    return [
        {
            "predicted": float(predicted[bins == b].mean()),
            "accepted": float(came_true[bins == b].mean()),
            "n": int((bins == b).sum()),
        }
        for b in np.unique(bins)
    ]


def plot(points: Sequence[dict[str, Any]], curves: dict[int, Any], path: Path) -> None:
    """Draw acceptance against drafted tokens, and confidence against acceptance."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for siblings in SIBLINGS:
        mine = [point for point in points if point["siblings"] == siblings]
        x = [point["drafted_per_step"] for point in mine]
        (line,) = left.plot(
            x, [point["ours"] for point in mine], "o-", label=f"{siblings} siblings"
        )
        left.plot(x, [p["arctic"] for p in mine], "x--", color=line.get_color())
        curve = curves[siblings]
        right.plot(
            [b["predicted"] for b in curve], [b["accepted"] for b in curve], "o-"
        )
    left.set(xlabel="drafted tokens a step", ylabel="mean acceptance length")
    left.set_title("solid: ours, dashed: arctic-inference")
    left.legend()
    right.plot([0, 1], [0, 1], "k:")
    right.set(xlabel="confidence", ylabel="share accepted", title="calibration")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--stride", type=int, default=2, help="replay each n-th text")
    args = parser.parse_args()
    import_arctic()
    groups = read_traces(args.traces, smoke=args.smoke)
    rivals = arctic_settings(smoke=args.smoke)
    points: list[dict[str, Any]] = []
    curves = {}
    for siblings in SIBLINGS:
        cases = cases_of(groups, siblings, args.stride)
        replays = {c: replay_ours(cases, c) for c in CONFIDENCES}
        ours = hull_at([tally.point() for tally, _ in replays.values()], DRAFT_COUNTS)
        arctic = hull_at(
            [tally.point() for tally in replay_arctic(cases, rivals)], DRAFT_COUNTS
        )
        curves[siblings] = calibration_curve(replays[CALIBRATED_AT][1])
        points += [
            {
                "siblings": siblings,
                "drafted_per_step": count,
                "ours": ours[k],
                "arctic": arctic[k],
                "ratio": ours[k] / arctic[k],
            }
            for k, count in enumerate(DRAFT_COUNTS)
        ]
    if args.plot:
        plot(points, curves, args.plot)
    figures = {"points": points, "calibration": curves}
    line = result_line("bench_acceptance", settings=settings_of(args), figures=figures)
    print_result(line, save_as=args.save)


if __name__ == "__main__":
    main()
