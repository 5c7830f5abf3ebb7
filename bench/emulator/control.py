"""In which order blocks run when a kernel's threads have parted, so that threads meet again where their ways do."""

from __future__ import annotations

import networkx as nx

from .ptx import Kernel


def ranks(kernel: Kernel) -> list[int]:
    """Each block's rank; of threads that have parted those at the lowest rank run first. A block ranks after those that
    lead to it, and what follows a loop after all of the loop."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(kernel.blocks)))
    for block in kernel.blocks:
        leaves_always = block.last.opcode.startswith(("bra", "ret", "exit")) and not block.last.guard
        if not leaves_always and block.number + 1 < len(kernel.blocks):
            graph.add_edge(block.number, block.number + 1)
        if block.target is not None:
            graph.add_edge(block.number, block.target)
    reached = {0} | nx.descendants(graph, 0)
    order = _arranged(graph.subgraph(reached), 0)
    rank = {number: i for i, number in enumerate(order)}
    return [rank.get(block.number, len(order)) for block in kernel.blocks]


def _arranged(graph: nx.DiGraph, entry: int) -> list[int]:
    """The graph's blocks in topological order, each loop in one run. Jumps back to `entry` do not count."""
    forward = nx.DiGraph(graph)
    forward.remove_edges_from([*graph.in_edges(entry)])
    condensed = nx.condensation(forward)
    order: list[int] = []
    # depth first, so that a loop's body comes before what follows the loop
    for component in reversed([*nx.dfs_postorder_nodes(condensed, condensed.graph["mapping"][entry])]):
        blocks = condensed.nodes[component]["members"]
        if len(blocks) == 1:
            order += blocks
            continue
        heads = [b for b in sorted(blocks) if any(p not in blocks for p in forward.predecessors(b))]
        order += _arranged(forward.subgraph(blocks), heads[0])
    return order
