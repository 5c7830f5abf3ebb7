"""What similarity_weight asks of its arguments."""

from ..similarity.contract import of_a_kind, two_matrices

CONTRACT = (*two_matrices("x", "y"), *of_a_kind())
