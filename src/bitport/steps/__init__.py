"""One step a file: `(graph, plan, context) -> (graph, plan)`. Plumbing only; the maths is in `numerics/`."""
