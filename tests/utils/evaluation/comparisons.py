"""Comparisons of two systems with known outcomes."""

from utils.judging.pairwise import Verdict, tally

WIN, LOSS, TIE = (Verdict.FIRST, Verdict.SECOND), (Verdict.SECOND, Verdict.FIRST), (Verdict.TIE, Verdict.TIE)
ONE_ORDER, LOST = (Verdict.FIRST, Verdict.TIE), (Verdict.FAILED, Verdict.FIRST)


def comparison(a, b, outcomes, texts_a=None, texts_b=None):
    verdicts = [verdict for outcome in outcomes for verdict in outcome]
    count = len(outcomes)
    return tally(a, b, texts_a or ["one two"] * count, texts_b or ["three"] * count, verdicts)
