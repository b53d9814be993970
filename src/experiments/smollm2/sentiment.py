"""Rewards for friendly reviews, for --reward-fn and --eval-reward-fn: two lexicons that were made apart.

VADER (Hutto and Gilbert 2014) adds up ratings of words, each by ten people, with rules for negation, emphasis and
capitals. TextBlob's analyser, which is pattern's (De Smedt and Daelemans 2012), averages over adjectives that were
annotated in reviews of products. So the one rewards more words, the other does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

SCALE = 2.0
"""A compound score is in [-1, 1] and of a deviation near 0.5; the trainer's clips are made for one near 1."""


@cache
def _analyser():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """What PPO is trained on: VADER's compound score of each response times `SCALE`, in [-2, 2]."""
    return [SCALE * _analyser().polarity_scores(response)["compound"] for response in responses]


def textblob(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Gold, never trained on: TextBlob's polarity of each response, in [-1, 1]."""
    from textblob import TextBlob

    return [TextBlob(response).sentiment.polarity for response in responses]
