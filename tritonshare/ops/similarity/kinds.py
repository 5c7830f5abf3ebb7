"""Kinds of similarity, by name. What each computes: reference.py, and kernels/similarity.py on a device."""

from __future__ import annotations

from typing import Literal, get_args

from ...declare import number_or_none

Kind = Literal["projection", "dot", "cosine", "euclidean", "sqeuclidean", "rbf"]
KINDS = get_args(Kind)
DISTANCES = ("euclidean", "sqeuclidean", "rbf")
DISSIMILARITIES = ("euclidean", "sqeuclidean")  # the smaller, the more similar
PRODUCTS = ("projection", "dot")  # which torch's autocast computes in its lower dtype; distances and cosines in fp32


def autocast(kind, *_):
    return "low" if kind in PRODUCTS else "fp32"


def numbers_of_kind(tensors, kind, gamma, eps):
    return number_or_none(tensors[0], gamma), number_or_none(tensors[1], eps, kind == "cosine")
