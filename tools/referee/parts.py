"""Importing this registers every part of every rule."""

from tools.referee import (  # noqa: F401  each registers its own
    claims,
    code,
    constants,
    files,
    probes,
    scores,
    shadow,
    stored,
    texts,
    training,
    weights,
)
