"""Identities of square, for property tests: see declare.Law. Exact on integers."""

from __future__ import annotations


def signs_do_not_matter(run, tensors, options):
    (x,) = tensors
    y, dx = run((x,), **options)
    negated, dx2 = run((-x,), **options)
    return [(y, negated), (dx, -dx2)]


LAWS = {law.__name__: law for law in (signs_do_not_matter,)}
