"""Figures as papers print them: how answers, captions and retrieval are scored, tabled and shown."""

Figures = dict[str, float]  # in percent, CIDEr x 100


class MetricError(ValueError):
    """A figure that cannot be computed; the message says what is missing or wrong."""
